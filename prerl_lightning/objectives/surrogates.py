"""Surrogates: the loss of each token, not aggregated, from its ratio and its response's advantage.

A `Surrogate` is one of the axes of a `Term`. At the first update of a rollout, so at every one where a rollout has one,
current and old log-probs are the same, and all of these have the same gradient, -A of the log-prob: which of them is
taken matters with several ``minibatches`` or ``epochs`` alone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from prerl_lightning.errors import check_bounds
from prerl_lightning.objectives.losses import TokenLosses, clipped_surrogate


@dataclass(frozen=True, eq=False)
class Tokens:
    """The T response tokens of a micro-batch, in which responses are whole: what surrogates and weights look at.

    Args:
        log_probs: (T,) current, with gradient.
        old_log_probs: (T,) of the weights that sampled, in the term's space; at the first update the current ones.
        advantages: (T,) of each token's response, in the log-probs' type.
        response: (T,) the number of each token's response among the rollout's.
        lengths: (N,) tokens of each response of the rollout.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    response: Tensor
    lengths: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """(T,) of current over old, with gradient, within e^-20 and e^20."""
        return (self.log_probs - self.old_log_probs).clamp(-20.0, 20.0)

    def response_means(self, values: Tensor) -> Tensor:
        """(T,) for each token the mean of (T,) ``values`` over its response."""
        sums = values.new_zeros(len(self.lengths)).index_add(0, self.response, values)
        return (sums / self.lengths.clamp(min=1))[self.response]

    def losses(self, loss: Tensor, clipped: Tensor | None = None) -> TokenLosses:
        """``clipped``: (T,) bool; None: no token is."""
        none = torch.zeros_like(loss, dtype=torch.bool)
        apart = (self.old_log_probs - self.log_probs).detach()
        return TokenLosses(loss, none if clipped is None else clipped.detach(), none, apart)


def by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """(T,) in the advantages' type: ``positive`` where they are above 0."""
    return torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)


class Surrogate(ABC):
    """``__call__(tokens)``: `Tokens` -> `TokenLosses`, which ``tokens.losses(loss)`` makes of (T,) losses."""

    @abstractmethod
    def __call__(self, tokens: Tokens) -> TokenLosses: ...


@dataclass(frozen=True)
class PPOClip(Surrogate):
    """-min(r A, clip(r) A), and for A < 0 at most -A ``clip_dual``: `losses.clipped_surrogate`.

    Args:
        clip_low, clip_high: r is clipped to [1 - clip_low, 1 + clip_high].
        clip_dual: > 1.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 10.0

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"clip_low": 0, "clip_high": 0}, {"clip_dual": 1})

    def __call__(self, tokens: Tokens) -> TokenLosses:
        bounds = self.clip_low, self.clip_high, self.clip_dual
        return clipped_surrogate(tokens.log_probs, tokens.old_log_probs, tokens.advantages, *bounds)


@dataclass(frozen=True)
class GSPO(Surrogate):
    """-min(s A, clip(s) A) with the ratio of the response, s = exp(mean of its tokens' log-ratios), for each of its
    tokens: GSPO (arXiv 2507.18071, equations 5 to 7), whose own aggregation is `SeqMeanTokenMean`.

    Args:
        clip_low, clip_high: s is clipped to [1 - clip_low, 1 + clip_high]; 3e-4 and 4e-4 in the paper's section 5.1.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"clip_low": 0, "clip_high": 0})

    def __call__(self, tokens: Tokens) -> TokenLosses:
        ratio = tokens.response_means(tokens.log_probs - tokens.old_log_probs).clamp(-20.0, 20.0).exp()
        plain = -tokens.advantages * ratio
        clipped = -tokens.advantages * ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return tokens.losses(torch.maximum(plain, clipped), clipped > plain)


@dataclass(frozen=True)
class CISPO(Surrogate):
    """-min(r, ``highest``) A log p, the ratio without gradient: a token beyond the bound keeps its gradient, with the
    bound for a weight (arXiv 2506.13585, equations 4 and 5, without a lower bound, as there).

    Args:
        highest: the paper's 1 + epsilon_high, of which it gives no number; 5 is from arXiv 2510.13786.
    """

    highest: float = 5.0

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, above={"highest": 0})

    def __call__(self, tokens: Tokens) -> TokenLosses:
        ratio = tokens.log_ratios.detach().exp()
        weight = ratio.clamp(max=self.highest)
        return tokens.losses(-weight * tokens.advantages * tokens.log_probs, ratio > self.highest)


@dataclass(frozen=True)
class SAPO(Surrogate):
    """-(4 / tau) sigmoid(tau (r - 1)) A: a gate that closes softly on both sides of r = 1, where its slope is 1
    (arXiv 2511.20347). Its own aggregation is `SeqMeanTokenMean`.

    Args:
        positive, negative: tau where A > 0, and elsewhere.
    """

    positive: float = 1.0
    negative: float = 1.05

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, above={"positive": 0, "negative": 0})

    def __call__(self, tokens: Tokens) -> TokenLosses:
        tau = by_sign(tokens.advantages, self.positive, self.negative)
        gate = torch.sigmoid(tau * (tokens.log_ratios.exp() - 1)) * 4 / tau
        return tokens.losses(-gate * tokens.advantages)


@dataclass(frozen=True)
class DPPO(Surrogate):
    """-min(r, ``highest``) A log p, the ratio without gradient, of tokens whose probability has not yet moved by more
    than a bound the way that A pushes it; of others nothing: the trust region is one of total variation, seen at the
    sampled token alone, so that rare tokens may move by large ratios (DPPO-Binary-TV, arXiv 2602.04879).

    Args:
        low, high: bounds of q - p for A < 0 and of p - q for A > 0, q the probability at sampling; 0.2 as in verl.
        highest: of the weight; 20 as in verl.
    """

    low: float = 0.2
    high: float = 0.2
    highest: float = 20.0

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, above={"low": 0, "high": 0, "highest": 0})

    def __call__(self, tokens: Tokens) -> TokenLosses:
        moved = (tokens.log_probs.exp() - tokens.old_log_probs.exp()).detach()
        beyond = torch.where(tokens.advantages > 0, moved > self.high, moved < -self.low)
        weight = tokens.log_ratios.detach().exp().clamp(max=self.highest).masked_fill(beyond, 0.0)
        return tokens.losses(-weight * tokens.advantages * tokens.log_probs, beyond)


@dataclass(frozen=True)
class PolicyGradient(Surrogate):
    """-A log p, without a ratio: REINFORCE (Williams, 1992). Beyond the first update of a rollout it is biased, since
    nothing says that other weights sampled."""

    def __call__(self, tokens: Tokens) -> TokenLosses:
        return tokens.losses(-tokens.advantages * tokens.log_probs)
