"""Token losses: pure functions of log-probs. T tokens, all responses of a micro-batch behind one another.

Source: PPO's clipped surrogate (arXiv 1707.06347) with an upper clip of its own (DAPO, arXiv 2503.14476) and a bound
for negative advantages (dual clip, arXiv 1912.09729).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class TokenLosses:
    """What a `Surrogate` gives, of each of T tokens.

    Args:
        loss: (T,), with gradient.
        clipped: (T,) bool.
        dual_clipped: (T,) bool.
        approx_kl: (T,) old less new log-prob, without gradient.
    """

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor
    approx_kl: Tensor


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> TokenLosses:
    """Clipped policy-gradient loss of each token, not aggregated.

    Args:
        log_probs, old_log_probs: (T,), current (with gradient) and at sampling. Pass ``log_probs.detach()`` as old
            for the first update after a rollout: the ratio is 1 and the gradient plain policy gradient.
        advantages: (T,), each token's response's.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_dual: upper bound of the loss over -advantage where the advantage is negative; > 1.
    """
    advantages = advantages.to(log_probs.dtype)
    difference = log_probs - old_log_probs
    ratio = difference.clamp(-20.0, 20.0).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.maximum(plain, clipped)
    bound = -advantages * clip_dual
    negative = advantages < 0
    return TokenLosses(
        loss=torch.where(negative, torch.minimum(surrogate, bound), surrogate),
        clipped=(clipped > plain).detach(),
        dual_clipped=((surrogate > bound) & negative).detach(),
        approx_kl=-difference.detach(),
    )


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """(T,) max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2 of each token, not aggregated; and (T,) bool,
    where the bound takes the gradient. The form of PPO's first implementation, which the paper has not.

    Args:
        values, old_values: (T,), current (with gradient) and at sampling.
        returns: (T,).
        clip: c; None: no bound.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    bound = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return torch.maximum(plain, bound) / 2, (bound > plain).detach()


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """(T,) per-token estimate of KL(policy || reference), with gradient (J. Schulman, "Approximating KL Divergence").

    With log r = log q - log p of the reference q and the policy p, on-policy:

    - k1 = -log r: unbiased as a value; as a loss useless, for its gradient has expectation zero;
    - k2 = (log r)^2 / 2: biased as a value; its gradient as a loss is an unbiased one of KL(p || q);
    - k3 = r - 1 - log r: unbiased and never negative as a value; its gradient as a loss is one of KL(q || p).
    """
    log_ratio = reference_log_probs - log_probs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return log_ratio.clamp(-20.0, 20.0).exp() - 1 - log_ratio


def importance_weights(
    trainer_log_probs: Tensor,
    engine_log_probs: Tensor,
    sequence: Tensor,
    n_responses: int,
    correction: Literal["token", "sequence-mask"],
    cap: float,
) -> Tensor:
    """(T,) detached weights of the tokens of whole responses: they correct for the engine having sampled from slightly
    other probabilities than the trainer computes from the same weights.

    Args:
        trainer_log_probs, engine_log_probs: (T,) log p(y_t given x, y_<t) of the weights that sampled, by each.
        sequence: (T,) the number of each token's response, below ``n_responses``.
        correction: ``"token"``: min(ratio, cap) (truncated importance sampling); ``"sequence-mask"``: 0 on every
            token of a response whose sequence ratio is above ``cap`` or below 1 / ``cap``, else 1.
    """
    difference = (trainer_log_probs - engine_log_probs).detach().clamp(-20.0, 20.0)
    if correction == "token":
        return difference.exp().clamp(max=cap)
    ratios = difference.new_zeros(n_responses).index_add_(0, sequence, difference)
    return (ratios.abs() <= math.log(cap)).to(difference)[sequence]
