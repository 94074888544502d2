"""The base of all problem sets: a sized sequence of `Problem`, cheap to construct, opened in `load`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from prerl_lightning.rewards.score import Reward
from prerl_lightning.types import Problem


class ProblemSet(ABC):
    """A sized, indexable set of problems.

    `load` is called once a process, before the engine starts, and is where files are opened and columns checked:
    it raises ``ValueError`` or ``FileNotFoundError`` with the path, the row or column, and the mend.
    """

    given_as = "Files(path) reads a file, to which rows are written first; NamedProblems(name) is a set that is known."

    @property
    def reward(self) -> Reward | None:
        """The verifier that belongs to this set, where it has one: what ``data.reward`` falls back to."""
        return None

    def forms(self, truth: str) -> Sequence[str]:
        """Responses of which one should earn the full reward, if ``truth`` is an answer and the verifier reads it:
        tried where a run starts. None: a truth of this set is no answer, or the set is right by construction."""
        return ()

    def load(self) -> None:  # noqa: B027  (optional: a procedural set has nothing to open)
        """Open the source and check it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Problem: ...

    def __iter__(self) -> Iterator[Problem]:
        return (self[i] for i in range(len(self)))
