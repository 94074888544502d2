"""A SLURM job that runs out of time goes on in another."""

import logging
import os
import subprocess
from pathlib import Path

import lightning as L

from prerl_lightning.compat import requeue_path

log = logging.getLogger(__name__)


def requeue(trainer: L.Trainer, checkpoint: str) -> None:
    """Have the job requeued, and ``checkpoint``, of a run's folder, found where Lightning then looks for one. By a
    symbolic link: so that the next run knows which one it goes on from. Called on all ranks."""
    path = requeue_path(trainer)
    if "://" in checkpoint:
        trainer.save_checkpoint(path)
    elif trainer.is_global_zero:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(Path(checkpoint).resolve())
    if not trainer.is_global_zero:
        return
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
