from typing import Any

from prerl_lightning.errors import InputError
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.term import Term


class Objective(PolicyModule):
    """The sum of any terms, chosen axis by axis without Python; configs/objectives/ has the published ones.

    Args:
        terms: each ``{space: ..., advantage: ..., contributing: ...}`` and more, as `Term` documents.
        kwargs: as for every objective.
    """

    def __init__(self, terms: list[Term], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.terms = tuple(terms)
        if not terms:
            raise InputError("Objective.terms: there is none. Give one or more, such as {space: post-train}.")
