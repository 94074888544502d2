"""Advantages of responses, and which responses contribute: pure functions of rewards.

An `Advantage` is one of the axes of a `Term`: a frozen object, so that a configuration can choose it by its class.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prerl_lightning.errors import check_bounds
from prerl_lightning.metrics.evaluation import is_right
from prerl_lightning.types import Rollout

Normalisation = Literal["std", "mean"]
Contributing = Literal["all", "positive", "negative"]
EPSILON = 1e-6  # beside a std


class Advantage(ABC):
    """``__call__(rewards, group_ids)``: (N,) rewards, (N,) int -> (N,) float64 advantages, of the rollout of all ranks.

    Responses with the same group id answer the same prompt, in any order. What looks at more than that has
    ``of_rollout(rewards, rollout)`` too. ``of_groups = False`` where a prompt's responses are not compared.
    """

    of_groups: ClassVar[bool] = True  # compares the responses of a prompt: a group of one has nothing to learn from

    @abstractmethod
    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor: ...

    def of_rollout(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """What a `Term` asks for: an advantage that looks at more than the rewards overrides this."""
        return self(rewards, rollout.group_ids)


@dataclass(frozen=True)
class GroupStd(Advantage):
    """(r - mean) / (std + 1e-6) of the group: GRPO (arXiv 2402.03300, equation 1)."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        return group_advantages(rewards, group_ids, "std")


@dataclass(frozen=True)
class GroupMean(Advantage):
    """r - mean of the group: pre-train space (arXiv 2604.14142, section 3), Dr. GRPO (arXiv 2503.20783)."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        return group_advantages(rewards, group_ids, "mean")


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """r - mean of the group's others: RLOO (arXiv 2402.14740). It is `GroupMean` times G / (G - 1)."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        _, index, count = group_ids.unique(return_inverse=True, return_counts=True)
        others = (count - 1).clamp(min=1).double()
        return group_advantages(rewards, group_ids, "mean") * (torch.where(count > 1, count, 1) / others)[index]


@dataclass(frozen=True)
class BatchStd(Advantage):
    """(b - mean(b)) / (std(b) + 1e-6) over the whole rollout: REINFORCE++ (arXiv 2501.03262).

    Each response counts once; its implementations in OpenRLHF and verl weigh responses by their tokens. Over the
    rollout of all ranks, whatever the minibatches; std unbiased.

    Args:
        less_group_mean: b is r - mean of the group (REINFORCE++-baseline), and is only divided; False: b is r.
    """

    less_group_mean: bool = False

    @property
    def of_groups(self) -> bool:  # type: ignore[override]
        return self.less_group_mean

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        if not self.less_group_mean:
            return group_advantages(rewards, torch.zeros_like(group_ids), "std")  # of one group
        centred = group_advantages(rewards, group_ids, "mean")
        return centred / (centred.std() + EPSILON) if len(centred) > 1 else centred


@dataclass(frozen=True)
class SignedReward(Advantage):
    """+ ``positive`` for a right response (a reward of 1 or more), -1 for a wrong one, without a baseline: groups that
    are all wrong, or all right, count.

    With ``positive: 0.1`` W-REINFORCE, with ``contributing: negative`` beside it NSR, with ``positive`` PSR, all by
    their authors (arXiv 2506.01347).

    Args:
        positive: lambda, above 0.
    """

    positive: float = 1.0
    of_groups = False

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, above={"positive": 0})

    def of_rollout(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        return self(rollout.rewards, rollout.group_ids)  # a reward that a sum has normalised tells nothing of right

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        right = is_right(rewards).double()
        return right * self.positive - (1 - right)


@dataclass(frozen=True)
class ConstantBaseline(Advantage):
    """r - ``baseline``: REINFORCE (Williams, 1992).

    Args:
        baseline: the same for all responses, such as 0.5 where half of the answers are right.
    """

    baseline: float = 0.0
    of_groups = False

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, least={"baseline": -torch.inf})

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        return rewards.double() - self.baseline


@dataclass(frozen=True)
class LENS(Advantage):
    """`GroupStd` of rewards that charge a wrong response for the policy's confidence in it, so that all-wrong groups
    teach: LENS (arXiv 2510.08696, section 5.1).

    With c = exp(mean log-prob of a response's tokens) by the engine that sampled it and G responses a group, the reward
    of a right response (a reward of 1 or more) is 1, that of a wrong one -c / (D - c) / G, with D = 2 max c or, if
    larger and the group is mixed, 1 / mean(right / c). An all-wrong group's are centred alone, times ``all_wrong``.
    OURS: one denominator for all groups, and c in the second D, where the paper may mean the likelihood.

    Args:
        all_wrong: the paper's alpha, 0.25 in all its runs; 0: `GroupStd` of the mixed groups alone.
    """

    all_wrong: float = 0.25

    def __post_init__(self) -> None:
        check_bounds(self, type(self).__name__, {"all_wrong": 0})

    def of_rollout(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        of_response = torch.arange(len(rollout)).repeat_interleave(rollout.lengths)
        sums = torch.zeros(len(rollout), dtype=torch.float64).index_add_(0, of_response, rollout.log_probs.double())
        # log-probs that are not finite leave their response out of the loss, and must not spoil its group
        confidences = (sums / rollout.lengths.clamp(min=1)).exp().nan_to_num(0.0, posinf=0.0)
        return self(rollout.rewards, rollout.group_ids, confidences)  # as in `SignedReward`

    def __call__(self, rewards: Tensor, group_ids: Tensor, confidences: Tensor | None = None) -> Tensor:
        """``confidences``: (N,) the c above; None: all are 1."""
        right = is_right(rewards).double()
        c = torch.ones_like(right) if confidences is None else confidences.double()
        groups, index, size = group_ids.unique(return_inverse=True, return_counts=True)
        zeros = torch.zeros(len(groups), dtype=torch.float64)
        difficulty = 2 * zeros.scatter_reduce(0, index, c, "amax")
        inverse = zeros.index_add(0, index, torch.where(right > 0, 1 / c, 0.0)) / size
        difficulty = torch.maximum(difficulty, torch.where(inverse > 0, 1 / inverse, 0.0))
        apart = (difficulty[index] - c).clamp(min=torch.finfo(torch.float64).tiny)
        calibrated = right - (1 - right) * c / apart / size[index]
        wrong = (zeros.index_add(0, index, right) == 0)[index]
        centred = group_advantages(calibrated, group_ids, "mean")
        return torch.where(wrong, self.all_wrong * centred, group_advantages(calibrated, group_ids, "std"))


NORMALISATIONS: dict[Normalisation, Advantage] = {"std": GroupStd(), "mean": GroupMean()}


def group_advantages(rewards: Tensor, group_ids: Tensor, normalisation: Normalisation) -> Tensor:
    """Advantage of each response within the group of its prompt.

    Args:
        rewards: (N,), any float type; the arithmetic is float64, so that the result does not depend on it.
        group_ids: (N,), int; responses with the same number answer the same prompt, in any order.
        normalisation: ``"std"``: (r - mean) / (std + 1e-6), std unbiased; ``"mean"``: r - mean. A group of one has mean
            0 and std 1.

    Returns:
        (N,), float64. Exactly 0 where a reward is the group's mean but for the mean's rounding error, which a division
        by std + 1e-6 would blow up, and whose sign would decide whether the response contributes.
    """
    rewards = rewards.double()
    groups, index = group_ids.unique(return_inverse=True)
    zeros = torch.zeros(len(groups), dtype=torch.float64)
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    single = count == 1
    mean = torch.where(single, 0.0, zeros.index_add(0, index, rewards) / count)
    advantages = rewards - mean[index]
    rounding = count * torch.finfo(torch.float64).eps * zeros.scatter_reduce(0, index, rewards.abs(), "amax")
    advantages = torch.where((advantages.abs() <= rounding[index]) & ~single[index], 0.0, advantages)
    if normalisation == "std":
        variance = zeros.index_add(0, index, advantages**2) / (count - 1).clamp(min=1)
        std = torch.where(single, 1.0, variance.sqrt())
        advantages = advantages / (std[index] + EPSILON)
    return advantages


def all_equal(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(N,) bool: the responses whose group has one reward, as a group of one always has."""
    groups, index = group_ids.unique(return_inverse=True)
    lowest = torch.full((len(groups),), torch.inf, dtype=rewards.dtype).scatter_reduce_(0, index, rewards, "amin")
    highest = torch.full_like(lowest, -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    return (lowest == highest)[index]


def contributing_responses(advantages: Tensor, contributing: Contributing) -> Tensor:
    """(N,) bool: the responses that the objective's denominator counts.

    ``"all"`` counts responses of zero advantage too, although they have no gradient.
    """
    if contributing == "positive":
        return advantages > 0
    if contributing == "negative":
        return advantages < 0
    return torch.ones_like(advantages, dtype=torch.bool)


def generalised_advantages(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Of each token its advantage by GAE (arXiv 1506.02438, equation 16): sum over k of (gamma lambda)^k d_{t+k} with
    d_t = r_t + gamma V_{t+1} - V_t, and V = 0 behind a response's last token.

    Args:
        rewards: (T,), that come with each token.
        values: (T,), of the text in front of each token.
        lengths: (N,) tokens of each response, one behind the other in the other two.

    Returns:
        (T,), of the rewards' type.
    """
    found = torch.zeros_like(rewards)
    ends = lengths.cumsum(0)
    following, value = rewards.new_zeros(len(lengths)), rewards.new_zeros(len(lengths))  # of the token behind
    for back in range(1, int(lengths.max()) + 1 if len(lengths) else 0):  # all responses at once, from their ends
        some = lengths >= back
        here = ends[some] - back
        following[some] = rewards[here] + gamma * value[some] - values[here] + gamma * gae_lambda * following[some]
        found[here], value[some] = following[some], values[here]
    return found
