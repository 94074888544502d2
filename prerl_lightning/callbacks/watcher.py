"""Base of the callbacks that look at a run and change nothing about it.

Lightning's hooks are typed for any LightningModule; those of our callbacks are only ever given a `PolicyModule`, and
say so: that is each ``type: ignore[override]`` in this room.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from prerl_lightning.compat import all_callbacks
from prerl_lightning.objectives.base import PolicyModule

Kind = TypeVar("Kind", bound=L.Callback)


class Watcher(L.Callback):
    """Calls `watch` after each training step, and records what it returns.

    The module logs time/watchers, the seconds that all of them took for the step; time/step does not hold them.
    """

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        """Metrics of the step behind ``module.rollout``, equal on all ranks, which all call this."""
        raise NotImplementedError

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        start = time.perf_counter()
        pl_module.record_of(type(self).__name__, self.watch(trainer, pl_module))
        pl_module.watched_seconds += time.perf_counter() - start


def callbacks_of(trainer: L.Trainer, kind: type[Kind]) -> list[Kind]:
    return [c for c in all_callbacks(trainer) if isinstance(c, kind)]


def runs_folder(trainer: L.Trainer) -> Path:
    """Of all runs of its name."""
    root = Path(getattr(trainer.logger, "save_dir", None) or trainer.default_root_dir).expanduser()
    return root / str(getattr(trainer.logger, "name", "") or "")


def run_folder(trainer: L.Trainer) -> Path | None:
    """Where metrics.csv is; without a CSVLogger, where the first logger's checkpoints go; None without a logger.
    Collective: all ranks have to call it."""
    found = None
    for logger in sorted(trainer.loggers, key=lambda logger: not isinstance(logger, CSVLogger)):
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            found = Path(logger.log_dir)
        elif logger.save_dir is not None:
            found = Path(logger.save_dir) / str(logger.name) / str(logger.version)
        break
    return trainer.strategy.broadcast(found)


def append_lines(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
