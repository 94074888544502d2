"""Base of the callbacks that look at a run and change nothing about it."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from prerl_lightning.objectives.base import PolicyModule


class Watcher(L.Callback):
    """Calls `watch` after each training step, and records what it returns.

    time/watchers is the seconds that all watchers took for the step; time/step does not hold them.
    """

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        """Metrics of the step behind ``module.rollout``, equal on all ranks, which all call this."""
        raise NotImplementedError

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        start = time.perf_counter()
        pl_module.record(self.watch(trainer, pl_module))
        pl_module.watched_seconds += time.perf_counter() - start
        pl_module.record({"time/watchers": pl_module.watched_seconds})


def run_folder(trainer: L.Trainer) -> Path | None:
    """Where metrics.csv is, or what the first logger calls its folder; None without a logger. Collective: all ranks
    have to call it."""
    of_csv = [logger.log_dir for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    found = trainer.strategy.broadcast(of_csv[0]) if of_csv else trainer.log_dir
    return Path(found) if found and trainer.loggers else None


def append_lines(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def due(trainer: L.Trainer, module: PolicyModule, every_n_steps: int) -> bool:
    """After a run's first step, every n steps, and at each life's end; 0: never."""
    assert module.rollout is not None
    step, before = trainer.global_step, module.rollout.policy_version  # a batch may make several steps
    ends = [*(first for _, first in module.lives[1:]), trainer.max_steps]
    if every_n_steps <= 0:
        return False
    passed = before == 0 or step // every_n_steps > before // every_n_steps
    return passed or any(before < end <= step for end in ends)
