"""Weights of tokens or responses: what their loss is multiplied by, beside the advantage.

A weight is one of the axes of a `Term`: any function from `Tokens` to (T,) factors without gradient, by its import path
or, with options of its own, a class whose instances are such. The denominator does not know of it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from prerl_lightning.errors import check_bounds
from prerl_lightning.objectives.surrogates import Tokens, by_sign


class Weight(ABC):
    """``__call__(tokens)``: `Tokens` -> (T,) factors, without gradient."""

    @abstractmethod
    def __call__(self, tokens: Tokens) -> Tensor: ...


@dataclass(frozen=True)
class BySign(Weight):
    """``positive`` where the advantage is above 0, ``negative`` elsewhere.

    Args:
        positive, negative: at least 0.
    """

    positive: float = 1.0
    negative: float = 1.0

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"positive": 0, "negative": 0})

    def __call__(self, tokens: Tokens) -> Tensor:
        return by_sign(tokens.advantages, self.positive, self.negative)


@dataclass(frozen=True)
class Confidence(Weight):
    """c ** ``power`` on responses of negative advantage, where c = exp(mean log-prob of the response's tokens) by the
    weights that sampled, in the term's space; 1 on others: a mistake is punished more, the surer the policy was of it.

    That the penalty of a wrong response grows with its length-normalised likelihood is said by CW-NSR (arXiv
    2605.07137). The power law is the plainest such form and OURS: the paper's formula was not at hand. `LENS` charges
    for confidence in the reward.

    Args:
        power: 0 is no weight, 1 the likelihood itself.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"power": 0})

    def __call__(self, tokens: Tokens) -> Tensor:
        confidence = tokens.response_means(tokens.old_log_probs.detach()).mul(self.power).exp()
        return torch.where(tokens.advantages < 0, confidence, 1.0)
