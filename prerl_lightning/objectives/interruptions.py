"""Where the ranks of a run agree on ending it: behind each step, and behind each batch of a validation in between."""

import lightning as L
import torch
import torch.distributed as dist

from prerl_lightning import ranks
from prerl_lightning.compat import requeue_signal, take_signals
from prerl_lightning.signals import ENDING, Interrupted, signals


class Interruptions:
    """A module's hooks of the same names call these."""

    def on_fit_start(self, trainer: L.Trainer) -> None:
        """In place of Lightning's handlers, which would meet the other ranks wherever the signal comes."""
        requeue = requeue_signal(trainer)
        take_signals(trainer, lambda: signals.listen({*ENDING, *([requeue] if requeue else [])}), signals.restore)

    def on_train_start(self) -> None:
        signals.note_only()

    def agree(self, trainer: L.Trainer) -> None:
        """Collective.

        Raises:
            Interrupted: any rank was sent a signal. RunCheckpoint then saves.
        """
        number = int(ranks.all_reduce(torch.tensor(signals.received), dist.ReduceOp.MAX))
        if number:
            signals.received = number
            raise Interrupted(number)
