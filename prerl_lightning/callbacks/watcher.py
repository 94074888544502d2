"""Base of the callbacks that look at a run and change nothing about it."""

import time
from typing import Any

import lightning as L

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


def due(step: int, every_n_steps: int) -> bool:
    """After the first step, and every n; 0: never."""
    return every_n_steps > 0 and (step == 1 or step % every_n_steps == 0)
