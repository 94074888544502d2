"""Names that a callback may monitor: of what a run hands to Lightning's ``log``, and nothing else; and those that an
`Until` may end a life by: also what watchers record, but for what a clock tells."""

from collections.abc import Collection
from typing import Any, cast

import lightning as L
import numpy as np
import torch

from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.reincarnation import PolicyReincarnation
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import callbacks_of
from prerl_lightning.callbacks.weights import WeightChange
from prerl_lightning.compat import all_callbacks
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, nearest
from prerl_lightning.metrics import glossary
from prerl_lightning.metrics.evaluation import summary
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.metrics.sums import Sums
from prerl_lightning.objectives.lives import reincarnations
from prerl_lightning.objectives.ppo import PPO
from prerl_lightning.objectives.until import KEY, Until
from prerl_lightning.rewards.shaping import WeightedSum
from prerl_lightning.types import Prompt, Refill, Response, Rollout

# what no two runs have alike, besides time/...
CLOCKED = ("rollout/tokens_per_second", "train/tokens_per_second", "train/mfu")
# of a step, besides what its rollout and its sums tell; tests/test_resume.py compares with real runs
STEP = (
    *("life", "optim/grad_norm", "optim/lr", "optim/skipped", "optim/non_finite", "rollout/not_finite"),
    *CLOCKED,
    *(f"time/{stage}" for stage in ("update_weights", "rollout", "reward", "statistics", "forward_backward")),
    *(f"time/{stage}" for stage in ("optimizer", "other", "step", "since_start")),
)


def held_out_names(k: int, greedy: bool, key: str = "val") -> set[str]:
    """Of a validation with k samples a problem; maj@k and no_answer are there where the verifier reads answers."""
    ones = torch.ones(1, k, dtype=torch.long)
    found = summary(ones.double(), ones, ones, ones, torch.ones(int(greedy), dtype=torch.float64))
    return {f"{key}/{name}" for name in found}


def training_names(
    group_size: int,
    parts: Collection[str] = (),
    sources: Collection[str] = (),
    refill: bool = False,
    values: bool = False,
) -> set[str]:
    """Of a training step, also those that not every step and objective has.

    Args:
        parts: rewards of a sum.
        sources: sets of a mixture.
        values: there is a value model.
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
    of_values = {name for name in glossary.names(()) if name.startswith("value/")}
    names = {*rollout_statistics(rollout), *Sums.KEYS, *STEP} - {"train/flops"} - of_values
    return names | of_values if values else names


def check_monitors(trainer: L.Trainer, modules: Collection[Any], data: RolloutDataModule) -> None:
    """Before anything is started.

    Args:
        modules: of all lives. One of another package, or a callback, may log what is not known here.

    Raises:
        InputError: a callback monitors what this run will not have, or a life is to end by it.
    """
    callbacks = all_callbacks(trainer)
    packages = {type(x).__module__.partition(".")[0] for x in (*modules, *callbacks)}
    rewards = data.rewards()
    sums = [rewards[key] for key in data.training_sets if isinstance(rewards[key], WeightedSum)]
    parts = dict.fromkeys(name for reward in sums for name in cast(WeightedSum, reward).parts)
    sources = [key.partition("/")[2] for key in data.training_sets if "/" in key]
    values = any(isinstance(module, PPO) for module in modules)
    names = training_names(data.sampling.group_size, parts, sources, bool(data.refill), values)
    if data.val is not None and trainer.limit_val_batches != 0:
        for key in data.held_out:
            names |= held_out_names(*data.samples_of(key), key)
    ours = packages <= {"prerl_lightning", "lightning"}
    for callback in callbacks if ours else ():
        check_monitor(callback, names)
    first, life = 0, next(iter(modules))
    for switch in reincarnations(callbacks):
        if switch.until is not None:
            check_until(switch, first, life.batching.steps, trainer, names, ours)
        first, life = switch.at_step, switch.successor


def check_until(
    switch: PolicyReincarnation, first: int, rollout_steps: int, trainer: L.Trainer, names: Collection[str], ours: bool
) -> None:
    """
    Args:
        switch: has the `Until`.
        first: step that the life begins with which it may end.
        rollout_steps: of that life, optimizer steps a rollout.
        names: of what Lightning's ``log`` gets.
        ours: nothing of another package is there, which might record more.

    Raises:
        InputError: the metric is none of this run's, or not measured often enough to end that life.
    """
    until = cast(Until, switch.until)
    if until.metric.startswith("time/") or until.metric in CLOCKED:
        raise InputError(
            f"{KEY}.metric: {until.metric} goes by the clock: no run would end the life where another does. Take one "
            "of samples or weights, such as rollout/pass@8."
        )
    held_out = any(name.startswith("val/") for name in names)
    often = {start: how for start, how in _watched(trainer).items() if held_out or not start.startswith("val/")}
    families = [name for thoughts in callbacks_of(trainer, Thoughts) for name in thoughts.names]
    known = {*names, *(name for name in glossary.names(families) if name.startswith(tuple(often)))}
    column = glossary.column(until.metric)
    of_a_part = column is not None and "{part}" in column.name and until.metric.startswith(tuple(often))
    if ours and until.metric not in known and not of_a_part:
        hint = nearest(until.metric, [name for name in known if not name.startswith("time/")])
        without = "" if held_out else " Without data.val nothing is measured held out."
        raise InputError(
            f"{KEY}.metric: this run does not measure {until.metric}.{hint}{without} `prerl help metrics` has all that "
            "there are, and what has them measured."
        )
    end = switch.at_step if trainer.max_steps < 0 else min(switch.at_step, trainer.max_steps)
    most = rollouts = max(0, end - first) // rollout_steps
    setting, every = next((how for start, how in often.items() if until.metric.startswith(start)), ("", 1))
    if not until.metric.startswith("val/"):
        most = min(rollouts, max(0, end - first) // every + 1)
    elif trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, int):
        setting, every = "trainer.val_check_interval", trainer.val_check_interval
        most = rollouts // every + 1  # the life's first weights were validated, too
    if most < until.least:
        lower = f"Lower {setting} ({every}), or raise" if every > 1 else "Raise"
        raise InputError(
            f"{KEY}: from step {first} to {end} {until.metric} is measured {most} times at most, and to end a life "
            f"takes {until.least} values (window + patience). {lower} at_step and trainer.max_steps, "
            "or take fewer values."
        )


def _watched(trainer: L.Trainer) -> dict[str, tuple[str, int]]:
    """Of what watchers record, by what its names start with: every how many steps, behind the setting that says so."""
    found = {}
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, Thoughts) and callback.enabled:
            found["thoughts/"] = ("trainer.log_every_n_steps", cast(Any, trainer).log_every_n_steps)
            found["val/thoughts/"] = ("", 1)
        elif isinstance(callback, GradientAlignment):
            how = ("alignment.every_n_steps", callback.every_n_steps)
            found |= {"alignment/": how, "rollout/marginal_log_prob/": how}
        elif isinstance(callback, WeightChange):
            found["weights/"] = ("weights.every_n_steps", callback.every_n_steps)
    return {start: how for start, how in found.items() if how[1]}


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
