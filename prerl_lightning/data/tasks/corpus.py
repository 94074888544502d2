"""What the embedded tasks share: a held-out tenth, and the corpus that a tiny model is pre-trained on."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import check_bounds

Split = Literal["train", "held_out"]


def is_held_out(question: str) -> bool:
    """A tenth of all questions, from training and corpus alike. (A linear hash once picked a systematic slice.)"""
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 10 == 0


class DrawnProblems(ProblemSet):
    """Problem i is a function of (seed, split, i) alone.

    Args:
        split: ``train`` or ``held_out``.
        size: number of problems.
        seed: of the problems.
    """

    def __init__(self, split: Split = "train", size: int = 4096, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size, seed
        check_bounds(self, type(self).__name__, {"size": 1})

    def __len__(self) -> int:
        return self.size


class Corpus(ABC):
    """Documents to pre-train a tiny model on, for `prerl pretrain`.

    Attributes:
        tokens: the vocabulary; text is cut into these, the longest first.
    """

    tokens: Sequence[str]

    @abstractmethod
    def document(self, rng: random.Random) -> str:
        """One document, without BOS and end of text."""

    @abstractmethod
    def held_out(self, size: int) -> ProblemSet:
        """Problems with a verifier of their own, none of which is in a document."""

    def habits(self, answers: Sequence[tuple[str, str]]) -> dict[str, float]:
        """What there is to know of (ground truth, answer) pairs of held-out problems, beside how many are right."""
        return {}


@dataclass(frozen=True)
class Stage:
    """Part of a pre-training: AdamW with warm-up and cosine decay to a tenth.

    Args:
        corpus: to draw documents from; all stages have to have the tokens of the first.
        steps: optimizer steps.
        tokens: in a batch, about.
        lr: highest learning rate.
        warmup: steps until it is reached.
    """

    corpus: Corpus
    steps: int
    tokens: int = 2048
    lr: float = 2.5e-3
    warmup: int = 100
