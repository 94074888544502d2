"""Aggregations: how token losses become one loss, sum(weight * token loss) / denominator.

An `Aggregation` is one of the axes of a `Term`. The denominator is one number for all micro-batches and ranks, so that
the gradient depends on neither.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prerl_lightning.errors import check_bounds

AggregationName = Literal["token-mean", "seq-mean-token-mean"]


class Aggregation(ABC):
    """``weights(lengths)``: of each token of responses with (N,) lengths, (N,) float64; ``denominator(lengths)``: what
    their sum is divided by, of the (M,) lengths of the contributing responses of a minibatch."""

    @abstractmethod
    def weights(self, lengths: Tensor) -> Tensor:
        """(N,) float64: of each token of responses with (N,) ``lengths``, before division by the denominator."""

    @abstractmethod
    def denominator(self, lengths: Tensor) -> float:
        """Over (M,) ``lengths`` of the contributing responses of a minibatch, all ranks', each of at least a token."""


@dataclass(frozen=True)
class TokenMean(Aggregation):
    """Over all contributing tokens: DAPO (arXiv 2503.14476)."""

    def weights(self, lengths: Tensor) -> Tensor:
        return torch.ones(len(lengths), dtype=torch.float64)

    def denominator(self, lengths: Tensor) -> float:
        return float(lengths.sum())


@dataclass(frozen=True)
class SeqMeanTokenMean(Aggregation):
    """Mean over contributing responses of the mean over each one's tokens: GRPO as published (arXiv 2402.03300)."""

    def weights(self, lengths: Tensor) -> Tensor:
        return 1.0 / lengths.double().clamp(min=1)

    def denominator(self, lengths: Tensor) -> float:
        return float(len(lengths))


@dataclass(frozen=True)
class ConstantLength(Aggregation):
    """Sum over tokens / (contributing responses * ``tokens``): no response weighs more for being short, nor a step for
    its responses being short. Dr. GRPO (arXiv 2503.20783, section 3.2).

    Args:
        tokens: the longest response there can be, data.sampling.max_new_tokens; at least 1.
    """

    tokens: int

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"tokens": 1})

    def weights(self, lengths: Tensor) -> Tensor:
        return torch.ones(len(lengths), dtype=torch.float64)

    def denominator(self, lengths: Tensor) -> float:
        return float(len(lengths) * self.tokens)


OF_NAME: dict[AggregationName, Aggregation] = {"token-mean": TokenMean(), "seq-mean-token-mean": SeqMeanTokenMean()}
