"""Coefficients of a term that follow a schedule: pure functions of the step of a life, with nothing to store.

A number is one that stays. ``step`` counts optimizer steps of the life, from 0; it is the same in a resumed run.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from prerl_lightning.errors import check_bounds


class Coefficient(ABC):
    """``__call__(step)``: a number, at an optimizer step of the life, from 0."""

    @abstractmethod
    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class _Between(Coefficient):
    """From one number to another, and then that.

    Args:
        start: at step 0; at least 0.
        end: from step ``steps`` on; at least 0.
        steps: optimizer steps of the life; at least 1.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"start": 0, "end": 0, "steps": 1})

    def __call__(self, step: int) -> float:
        part = self.part(min(step / self.steps, 1.0))
        return (1 - part) * self.start + part * self.end

    @abstractmethod
    def part(self, progress: float) -> float:
        """Of the way, 0 to 1, at a ``progress`` from 0 to 1."""


@dataclass(frozen=True)
class Linear(_Between):
    """From ``start`` to ``end`` in ``steps`` equal parts, then ``end``."""

    def part(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(_Between):
    """From ``start`` to ``end`` by half a cosine, slow at both ends, then ``end``."""

    def part(self, progress: float) -> float:
        return 0.5 * (1 - math.cos(math.pi * progress))


@dataclass(frozen=True)
class Exponential(Coefficient):
    """``end`` + (``start`` - ``end``) / 2 ** (step / ``half_life``).

    Args:
        start: at step 0; at least 0.
        end: what it goes towards; at least 0.
        half_life: optimizer steps of the life; above 0.
    """

    start: float
    end: float
    half_life: float

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"start": 0, "end": 0}, {"half_life": 0})

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * 0.5 ** (step / self.half_life)
