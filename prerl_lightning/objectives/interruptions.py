"""Where the ranks of a run agree on ending it: behind each step, and behind each batch of a validation in between."""

import logging
import os
import subprocess

import lightning as L
import torch
import torch.distributed as dist

from prerl_lightning import ranks
from prerl_lightning.compat import requeue_path, requeue_signal, take_signals
from prerl_lightning.signals import ENDING, Interrupted, signals

log = logging.getLogger(__name__)


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
            Interrupted: any rank was sent a signal. RunCheckpoint then saves; under SLURM's requeue it is done here.
        """
        number = int(ranks.all_reduce(torch.tensor(signals.received), dist.ReduceOp.MAX))
        if not number:
            return
        signals.received = number
        if number == requeue_signal(trainer):
            path = requeue_path(trainer)
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                _requeue(path)
        raise Interrupted(number, trainer.global_step)


def _requeue(path: str) -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = asked.stderr.strip() or f"exit status {asked.returncode}" if asked.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        log.warning("SLURM did not requeue job %s (%s); %s is what it goes on from.", job, problem, path)
    else:
        log.info("SLURM requeues job %s, which goes on from %s.", job, path)
