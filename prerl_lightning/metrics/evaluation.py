"""avg@k, pass@k, maj@k and what else one matrix of samples tells, with intervals.

The matrix has a row a problem and a column a sample. It is kept whole and sorted by row, so that one rank or several
give the same digits, the bootstrap's included.
"""

import hashlib
from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from prerl_lightning.metrics.intervals import interval

RESAMPLES = 2000


def is_right(rewards: Tensor) -> Tensor:
    """(N,) bool: a reward of 1 or more, but for rounding in a sum of weighted parts."""
    return rewards > 1 - 1e-6


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that k samples hold a right one, from ``correct`` of n (arXiv 2107.03374)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority(rewards: Sequence[float], answers: Sequence[int]) -> float:
    """Mean reward of the most frequent answer; of tied ones, their mean. 0 where there is no answer.

    Args:
        rewards: (k,)
        answers: (k,), equal numbers for equal answers, 0 for none.
    """
    votes: dict[int, list[float]] = {}
    for reward, answer in zip(rewards, answers, strict=True):
        if answer:
            votes.setdefault(answer, []).append(reward)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(v) / len(v) for v in votes.values() if len(v) == most]
    return sum(winners) / len(winners) if winners else 0.0


def per_problem(rewards: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """Each measure's value for each problem; its mean over problems is the measure.

    Args:
        rewards: (P, k) float64; 1 or more counts as right in pass@j.
        answers: (P, k) as in `majority`; all 0 where the verifier does not say what it read.

    Returns:
        avg@k, pass@j for j = 1, 2, 4, ... and k, and maj@k where there are answers: (P,) each.
    """
    k = rewards.shape[1]
    found = {f"avg@{k}": rewards.mean(1)}
    right = is_right(rewards).sum(1).tolist()
    for j in sorted({*(1 << e for e in range(k.bit_length())), k}):
        found[f"pass@{j}"] = torch.tensor([pass_at_k(k, c, j) for c in right], dtype=torch.float64)
    if answers.any():
        pairs = zip(rewards.tolist(), answers.tolist(), strict=True)
        found[f"maj@{k}"] = torch.tensor([majority(r, a) for r, a in pairs], dtype=torch.float64)
    return found


def bootstrap(values: Tensor, seed: int = 0) -> Tensor:
    """Means over problems drawn with replacement: (RESAMPLES,) from (P,) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    return values[drawn].mean(1)


def summary(rewards: Tensor, answers: Tensor, lengths: Tensor, truncated: Tensor, greedy: Tensor) -> dict[str, float]:
    """How many problems, and all measures of one matrix: (P, k) each, and (P,) or (0,) greedy rewards."""
    values = per_problem(rewards, answers)
    if len(greedy):
        values["greedy"] = greedy
    found = {"problems": float(len(rewards))}
    for key, value in values.items():
        low, high = interval(value)
        found |= {key: float(value.mean()), f"{key}/low": low, f"{key}/high": high}
    found["length"] = float(lengths.double().mean())
    found["truncated"] = float(truncated.double().mean())
    if answers.any():
        found["no_answer"] = float((answers == 0).double().mean())
    return found


def answer_number(answer: str | None) -> int:
    """0 for none, else 63 bits that equal answers share."""
    if answer is None:
        return 0
    return int.from_bytes(hashlib.blake2b(answer.encode(errors="replace"), digest_size=8).digest(), "little") >> 1 or 1
