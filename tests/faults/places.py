"""A callback of the runs that driver.py starts: holds one place of a run until the driver lets go."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from prerl_lightning.watchdog import watchdog


class Hold(L.Callback):
    """Args:
    place: step (before its rollout), update (behind it), validation, or writing (half of a checkpoint is on the disk).
    step: optimizer steps behind the run then.
    folder: each rank leaves a file there, and waits while ``hold`` is in it.
    """

    def __init__(self, place: str, step: int, folder: str) -> None:
        self.place, self.step, self.folder = place, step, Path(folder)
        self.done = False

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._here("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._here("update", trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._here("validation", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.place != "writing" or trainer.global_step != self.step or self.done:
            return
        save = torch.save

        def half(state: Any, file: Any) -> None:
            torch.save = save
            save(state, file)
            file.truncate(file.tell() // 2)
            self._here("writing", trainer)
            file.seek(0)  # who is still alive writes the rest
            save(state, file)

        if trainer.is_global_zero:
            torch.save = half
        else:
            self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        self.done = True
        (self.folder / f"rank-{trainer.global_rank}").touch()

    def _here(self, place: str, trainer: L.Trainer) -> None:
        if self.done or (place, trainer.global_step) != (self.place, self.step):
            return
        self._tell(trainer)
        while (self.folder / "hold").exists():
            watchdog.move()
            time.sleep(0.02)
