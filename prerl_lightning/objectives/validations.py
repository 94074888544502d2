"""Which validations a run owes: of its first and last weights, and of a checkpoint written before its own."""

import logging
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Timer

from prerl_lightning.compat import run_ends_of_training, validate_now, validation_follows

log = logging.getLogger(__name__)


class Validations:
    """A module's hooks of the same names call these; decisions are the same on all ranks.

    Attributes:
        step: optimizer steps behind the last weights validated; None: none were.
        due: the weights that training starts from are to be validated first.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.due = False

    def on_save_checkpoint(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        due = self.step != trainer.global_step and validation_follows(trainer)
        checkpoint["validation"] = {"step": self.step, "due": due}

    def on_load_checkpoint(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        for timer in cast(Any, trainer).callbacks:
            if isinstance(timer, Timer):  # a limit is one of this process, which has used none of it yet
                checkpoint.get("callbacks", {}).pop(timer.state_key, None)
        found = checkpoint.get("validation", {"step": None, "due": False})
        self.step, self.due = found["step"], found["due"]
        step = checkpoint["global_step"]
        if 0 < trainer.max_steps <= step:
            self.due = self.step != step
            run_ends_of_training(trainer)
            validates = self.due and trainer.enable_validation and cast(Any, trainer).datamodule.val is not None
            todo = " Its weights were not validated yet, and are now." if validates else ""
            log.warning(
                "The checkpoint is at step %d and trainer.max_steps is %d: nothing is left to train.%s",
                *(step, trainer.max_steps, todo),
            )

    def on_train_start(self, trainer: L.Trainer) -> None:
        if trainer.global_step == 0 or self.due:
            self.due = False
            validate_now(trainer)

    def after_step(self, trainer: L.Trainer) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning then validates, whatever the interval

    def on_train_epoch_end(self, trainer: L.Trainer) -> None:
        """Also where training ends by what Lightning sees behind its validation: max_epochs, a Timer of epochs."""
        step, last_step = trainer.global_step, 0 < trainer.max_steps <= trainer.global_step
        last_epoch = 0 < cast(int, trainer.max_epochs) <= trainer.current_epoch + 1
        if (last_step or last_epoch or trainer.should_stop) and self.step != step:
            validate_now(trainer)
