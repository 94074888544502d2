"""Names that a callback may monitor: of what a run hands to Lightning's ``log``, and nothing else."""

from collections.abc import Collection
from typing import Any

import lightning as L
import numpy as np
import torch

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, nearest
from prerl_lightning.metrics.evaluation import summary
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.metrics.sums import Sums
from prerl_lightning.rewards.shaping import WeightedSum
from prerl_lightning.types import Prompt, Refill, Response, Rollout

# of a step, besides what its rollout and its sums tell; tests/test_resume.py compares with real runs
STEP = (
    *("life", "optim/grad_norm", "optim/lr", "optim/skipped", "optim/non_finite", "rollout/not_finite"),
    *("rollout/tokens_per_second", "train/tokens_per_second", "train/mfu"),
    *(f"time/{stage}" for stage in ("update_weights", "rollout", "reward", "statistics", "forward_backward")),
    *(f"time/{stage}" for stage in ("optimizer", "other", "step", "since_start")),
)


def held_out_names(k: int, greedy: bool, key: str = "val") -> set[str]:
    """Of a validation with k samples a problem; maj@k and no_answer are there where the verifier reads answers."""
    ones = torch.ones(1, k, dtype=torch.long)
    found = summary(ones.double(), ones, ones, ones, torch.ones(int(greedy), dtype=torch.float64))
    return {f"{key}/{name}" for name in found}


def training_names(
    group_size: int, parts: Collection[str] = (), sources: Collection[str] = (), refill: bool = False
) -> set[str]:
    """Of a training step, also those that not every step and objective has.

    Args:
        parts: rewards of a sum.
        sources: sets of a mixture.
    """
    prompts = [Prompt(i, (1,), "", "", source=source) for i, source in enumerate([*sources] or [""]) for _ in range(2)]
    n = len(prompts) * group_size
    rollout = Rollout.of(
        prompts,
        [Response(np.ones(1, np.int32), np.zeros(1, np.float32), "", False)] * n,
        group_ids=torch.arange(len(prompts)).repeat_interleave(group_size),
        rewards=(torch.arange(len(prompts), dtype=torch.float64) % 2).repeat_interleave(group_size),
        parts={name: torch.zeros(n) for name in parts},
        refill=Refill(groups=1) if refill else None,
        policy_version=0,
        temperature=1.0,
    )
    return {*rollout_statistics(rollout), *Sums.KEYS, *STEP} - {"train/flops"}


def check_monitors(trainer: L.Trainer, modules: Collection[Any], data: RolloutDataModule) -> None:
    """Before anything is started.

    Args:
        modules: of all lives. One of another package, or a callback, may log what is not known here.

    Raises:
        InputError: a callback monitors what this run will not have.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    packages = {type(x).__module__.partition(".")[0] for x in (*modules, *callbacks)}
    if not packages <= {"prerl_lightning", "lightning"}:
        return
    rewards = [data.rewards()[key] for key in data.training_sets]
    parts = dict.fromkeys(name for reward in rewards if isinstance(reward, WeightedSum) for name in reward.parts)
    sources = [key.partition("/")[2] for key in data.training_sets if "/" in key]
    names = training_names(data.sampling.group_size, parts, sources, bool(data.refill))
    if data.val is not None and trainer.limit_val_batches != 0:
        for key in data.held_out:
            names |= held_out_names(*data.samples_of(key), key)
    for callback in callbacks:
        check_monitor(callback, names)


def check_monitor(callback: Any, names: Collection[str]) -> None:
    """Raises InputError where ``callback`` has a monitor that is none of the names."""
    monitor = getattr(callback, "monitor", None)
    if monitor is None or monitor in names:
        return
    of_interest = [n for n in names if not n.startswith("time/") and not n.endswith(("/low", "/high"))]
    of_interest.sort(key=lambda name: (not name.startswith("val/"), name))
    held_out = "" if any(n.startswith("val/") for n in names) else " Without data.val nothing is measured held out."
    key = "checkpoint.monitor" if type(callback).__name__ == "RunCheckpoint" else f"{type(callback).__name__}.monitor"
    hint = nearest(monitor, names)
    raise InputError(f"{key}: this run has no metric {monitor}.{hint}{held_out} There are: {', '.join(of_interest)}.")
