"""Advantages of a group's responses, and which responses contribute: pure functions of rewards.

Source: arXiv 2604.14142, section 3; GRPO's advantage is arXiv 2402.03300, equation 1.
"""

from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["std", "mean"]
Contributing = Literal["all", "positive", "negative"]


def group_advantages(rewards: Tensor, group_ids: Tensor, normalisation: Normalisation) -> Tensor:
    """Advantage of each response within the group of its prompt.

    Args:
        rewards: (N,), any float type; the arithmetic is float64, so that the result does not depend on it.
        group_ids: (N,), int; responses with the same number answer the same prompt, in any order.
        normalisation: ``"std"``: (r - mean) / (std + 1e-6), std unbiased (GRPO); ``"mean"``: r - mean (pre-train
            space, Dr. GRPO). A group of one has mean 0 and std 1.

    Returns:
        (N,), float64. Exactly 0 where all rewards of a group are equal, found by comparison: the float mean of equal
        rewards may miss them by a rounding error, which the division by std + 1e-6 would blow up.
    """
    rewards = rewards.double()
    groups, index = group_ids.unique(return_inverse=True)
    n_groups = len(groups)
    count = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, index, torch.ones_like(rewards))
    single = count == 1
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    mean = torch.where(single, 0.0, mean)
    advantages = rewards - mean[index]
    if normalisation == "std":
        variance = torch.zeros_like(count).index_add_(0, index, advantages**2) / (count - 1).clamp(min=1)
        std = torch.where(single, 1.0, variance.sqrt())
        advantages = advantages / (std[index] + 1e-6)
    lowest = torch.full_like(count, torch.inf).scatter_reduce_(0, index, rewards, "amin")
    highest = torch.full_like(count, -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    all_equal = (lowest == highest) & ~single
    return torch.where(all_equal[index], 0.0, advantages)


def contributing_responses(advantages: Tensor, contributing: Contributing) -> Tensor:
    """(N,) bool: the responses that the objective's denominator counts.

    ``"all"`` counts responses of zero advantage too, although they have no gradient.
    """
    if contributing == "positive":
        return advantages > 0
    if contributing == "negative":
        return advantages < 0
    return torch.ones_like(advantages, dtype=torch.bool)
