"""Numbers of an evaluation's records, by metrics/evaluation.py."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.evaluation.files import Record
from prerl_lightning.metrics.evaluation import answer_number, is_right, summary


def measures(records: Sequence[Record]) -> dict[str, float]:
    """As `metrics.evaluation.summary`; ``partial``, the share of samples whose reward is neither 0 nor right; and how
    many verifications failed: ``timeouts`` and ``errors``."""
    records = sorted(records, key=lambda r: r["row"])
    rewards, answers, greedy = scores(records)
    lengths = _matrix(records, lambda s: s["tokens"], torch.long)
    truncated = _matrix(records, lambda s: s["truncated"], torch.long)
    found = summary(rewards, answers, lengths, truncated, greedy)
    found["partial"] = float(((rewards != 0) & ~is_right(rewards)).double().mean())
    for failure in ("timeout", "error"):
        found[f"{failure}s"] = float(sum(s["failure"] == failure for r in records for s in r["samples"]))
    return found


def scores(records: Sequence[Record]) -> tuple[Tensor, Tensor, Tensor]:
    """(P, k) rewards and answers, and (P,) or (0,) greedy rewards."""
    greedy = [r["greedy"]["score"] for r in records if r["greedy"] is not None]
    return (
        _matrix(records, lambda s: s["score"], torch.float64),
        _matrix(records, lambda s: answer_number(s["answer"]), torch.long),
        torch.tensor(greedy, dtype=torch.float64),
    )


def _matrix(records: Sequence[Record], value: Callable[[dict[str, Any]], Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor([[value(s) for s in r["samples"]] for r in records], dtype=dtype)
