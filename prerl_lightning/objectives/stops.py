"""Why a run ends ahead of ``trainer.max_steps``, which Lightning does not keep."""

from datetime import timedelta
from typing import cast

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from prerl_lightning.compat import note_stops


class Stops:
    """A module's hook of the same name calls this one's."""

    def __init__(self) -> None:
        self._by: object = None  # what told the Trainer to stop
        self._where = ""  # and in which of its functions; empty: nothing did

    def on_fit_start(self, trainer: L.Trainer) -> None:
        self._by, self._where = None, ""
        note_stops(trainer, self._note)

    def _note(self, by: object, where: str) -> None:
        self._by, self._where = by, where

    def reason(self, trainer: L.Trainer) -> str | None:
        """At the end of training; None: it has made its ``max_steps``, or without them its ``max_epochs``."""
        if 0 < trainer.max_steps <= trainer.global_step:
            return None
        if isinstance(self._by, Timer):
            limit = timedelta(seconds=round(self._by.time_elapsed() + cast(float, self._by.time_remaining())))
            return f"trainer.max_time: {limit} is over"
        if isinstance(self._by, EarlyStopping):
            said = cast(str, self._by.stopping_reason_message).removesuffix(" Signaling Trainer to stop.")
            return f"EarlyStopping: {said.rstrip('.')}"
        if self._where:
            return f"trainer.should_stop was set in {self._where}"
        if trainer.max_steps > 0 and 0 < cast(int, trainer.max_epochs) <= trainer.current_epoch:
            return f"trainer.max_epochs ({trainer.max_epochs}) is reached"
        return None
