import re
from typing import Any

from prerl_lightning.errors import InputError
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term

LONGEST = 60  # characters of a name


class Objective(PolicyModule):
    """The sum of any terms, chosen axis by axis without Python; configs/objectives/ has the published ones.

    Args:
        terms: each ``{space: ..., advantage: ..., contributing: ...}`` and more, as `Term` documents.
        name: what it is called in a run's lines and in reports, such as RLOO; None: what its terms choose, such as
            LeaveOneOut PolicyGradient.
        kwargs: as for every objective.
    """

    def __init__(self, terms: list[Term], name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.terms, self.name = tuple(terms), name
        if not terms:
            raise InputError("Objective.terms: there is none. Give one or more, such as {space: post-train}.")
        if name is not None and (not re.fullmatch(r"[\w.+ -]+", name) or len(name) > LONGEST):
            raise InputError(
                f"Objective.name: {name!r}: a name is up to {LONGEST} letters, digits, spaces and . + - _, as RLOO is."
            )

    @property
    def title(self) -> str:
        found = self.name or " + ".join(term.title for term in self.terms)
        return found if len(found) <= LONGEST else f"{found[: LONGEST - 3]}..."
