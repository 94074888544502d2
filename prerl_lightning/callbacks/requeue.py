"""A SLURM job that runs out of time goes on in another."""

import logging
import os
import subprocess
from pathlib import Path

import lightning as L

log = logging.getLogger(__name__)


def requeued(runs: Path) -> str | None:
    """The checkpoint that this SLURM job was requeued with, of the runs of one name; None: it was not.

    Not where Lightning looks for one, which would have any later job of the same folder go on from it.
    """
    found = _file(runs)
    return found.read_text(encoding="utf-8") if found is not None and found.is_file() else None


def _file(runs: Path) -> Path | None:
    job = os.environ.get("SLURM_JOB_ID")  # which a requeued job keeps
    return None if job is None else runs / f"requeue-{job}"


def requeue(trainer: L.Trainer, checkpoint: str, runs: Path) -> None:
    """Have the job requeued, and `requeued` find ``checkpoint`` then."""
    file = _file(runs)
    if not trainer.is_global_zero or file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(checkpoint if "://" in checkpoint else str(Path(checkpoint).resolve()), encoding="utf-8")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = asked.stderr.strip() or f"exit status {asked.returncode}" if asked.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        log.warning("SLURM did not requeue job %s (%s); %s is what it goes on from.", job, problem, checkpoint)
    else:
        log.info("SLURM requeues job %s, which goes on from %s.", job, checkpoint)
