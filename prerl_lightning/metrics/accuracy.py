"""avg@k, pass@k and greedy accuracy from one matrix of samples."""

from math import comb

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that k samples hold a right one, from ``correct`` of n (arXiv 2107.03374)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


class SampleAccuracy(Metric):
    """Over problems, from k rewards each; sums only, so ranks add up exactly.

    avg@k is the mean reward; pass@j, for j = 2, 4, ... up to k, counts a reward of 1 or more as right; greedy is the
    mean reward of the greedy responses.
    """

    full_state_update = False
    higher_is_better = True
    reward: Tensor
    problems: Tensor
    samples: Tensor
    greedy: Tensor
    greedy_problems: Tensor
    passed: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, size in (("reward", 1), ("problems", 1), ("samples", 1), ("greedy", 1), ("greedy_problems", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("passed", torch.zeros(16, dtype=torch.float64), dist_reduce_fx="sum")  # by log2 of j

    def update(self, rewards: Tensor, greedy: Tensor | None = None) -> None:
        """rewards (P, k); greedy (P,)."""
        n_problems, k = rewards.shape
        self.reward += rewards.double().mean(1).sum().to(self.reward.device)
        self.problems += n_problems
        self.samples += n_problems * k
        for row in (rewards >= 1).sum(1).tolist():
            for exponent in range(k.bit_length()):
                self.passed[exponent] += pass_at_k(k, row, 1 << exponent)
        if greedy is not None:
            self.greedy += greedy.double().sum().to(self.greedy.device)
            self.greedy_problems += len(greedy)

    def compute(self) -> dict[str, Tensor]:
        """Nothing where there was no problem."""
        if not self.problems:
            return {}
        k = int(self.samples / self.problems)
        found = {f"avg@{k}": (self.reward / self.problems).squeeze()}
        for exponent in range(1, k.bit_length()):
            found[f"pass@{1 << exponent}"] = self.passed[exponent] / self.problems.squeeze()
        if self.greedy_problems:
            found["greedy"] = (self.greedy / self.greedy_problems).squeeze()
        return found
