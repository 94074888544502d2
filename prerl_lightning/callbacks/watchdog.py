"""Several ranks are waited for with a word, and not for ever."""

from typing import Any, cast

import lightning as L

from prerl_lightning.errors import check_bounds
from prerl_lightning.signals import Interrupted
from prerl_lightning.watchdog import watchdog


class Watchdog(L.Callback):
    """Names the rank that the others wait for, and in which phase of which step it is; then ends the run. A rank moves
    with each forward pass, each token that is decoded and each verdict, so that long rollouts are no standstill; of a
    slow disk, while a checkpoint is written, is only warned. A single process is left alone.

    Args:
        warn_after: seconds in which no rank moves; 0: never.
        end_after: seconds more; 0: never.
    """

    def __init__(self, warn_after: float = 120.0, end_after: float = 600.0) -> None:
        self.warn_after, self.end_after = warn_after, end_after
        check_bounds(self, "watchdog", {"warn_after": 0, "end_after": 0})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.num_devices > 1:
            watchdog.warn_after, watchdog.end_after = self.warn_after, self.end_after
            watchdog.share(cast(Any, trainer).strategy, trainer.num_devices)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Interrupted):
            watchdog.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        watchdog.close()
