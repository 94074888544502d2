"""What a step adds up and logs."""

from typing import Any

import torch

from prerl_lightning import ranks


class Sums:
    """Running sums, reduced over ranks all at once; every rank knows the same keys."""

    TOTALS = (
        "rollout/contributing",
        "rollout/contributing_tokens",
        "train/tokens",
        "train/flops",
        "optim/loss",
    )
    MEANS = (
        *("optim/clipped", "optim/dual_clipped", "optim/approx_kl", "optim/reference_kl"),
        "optim/entropy",
        *("mismatch/log_prob_difference", "mismatch/kl"),
        *("value/loss", "value/clipped"),
    )
    KEYS = TOTALS + MEANS

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(len(self.KEYS), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(self.KEYS), dtype=torch.float64)

    def add(self, key: str, total: Any, count: int = 0) -> None:
        """``count`` is what a mean is divided by."""
        i = self.KEYS.index(key)
        self.totals[i] += total
        self.counts[i] += count

    def reduced(self) -> dict[str, float]:
        """Totals and means; a mean of nothing on any rank is left out. Collective."""
        totals, counts = ranks.all_reduce(torch.stack([self.totals.cpu(), self.counts])).tolist()
        found = dict(zip(self.TOTALS, totals, strict=False))
        for key, total, count in list(zip(self.KEYS, totals, counts, strict=True))[len(self.TOTALS) :]:
            if count:
                found[key] = total / count
        return found
