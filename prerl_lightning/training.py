"""What a run has besides its objectives and its data, from the command line and from Python alike: the Trainer's
defaults, what watches and keeps it, its folder, its precision."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger

from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.blocks import Blocks
from prerl_lightning.callbacks.health import RunHealth
from prerl_lightning.callbacks.held_out import HeldOut
from prerl_lightning.callbacks.progress import StepBar, StepLines
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.samples import Samples
from prerl_lightning.callbacks.saving import ExportModel, RunCheckpoint
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watchdog import Watchdog
from prerl_lightning.callbacks.weights import WeightChange
from prerl_lightning.compat import WholeCSVLogger
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import load_config
from prerl_lightning.signals import first_rank, signals

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,  # a whole validation runs before the first step instead
    "enable_model_summary": False,
    "min_epochs": 0,  # with min_steps Lightning's own is a whole epoch
}

# by their keys in a configuration
WATCHERS: dict[str, type[L.Callback]] = {
    "checkpoint": RunCheckpoint,
    "thoughts": Thoughts,
    "alignment": GradientAlignment,
    "weights": WeightChange,
    "samples": Samples,
    "health": RunHealth,
    "watchdog": Watchdog,
    "export": ExportModel,
}


def progress(enabled: Any, given: Any) -> tuple[list[L.Callback], bool]:
    """Our bar or lines, unless ``given`` callbacks bring a bar; and Lightning's ``enable_progress_bar``."""
    if enabled is False:
        return [], False
    if any(isinstance(c, ProgressBar) for c in (given if isinstance(given, list) else [given])):
        return [], True
    return ([StepBar()], True) if sys.stdout.isatty() else ([StepLines()], False)


def with_records(watchers: Iterable[L.Callback], lines: list[L.Callback], checkpoints: bool = True) -> list[L.Callback]:
    """What every run has: progress in front, so that what watches is said behind it, and its records behind."""
    kept = [w for w in watchers if checkpoints or not isinstance(w, RunCheckpoint)]
    return [*lines, *kept, HeldOut(), RunRecord(), Blocks()]


def run_logger(folder: str | None, name: str) -> CSVLogger:
    """runs/NAME/version_N/metrics.csv, of which a kill loses no row."""
    if os.path.isabs(name) or ".." in name.split("/"):
        raise InputError(f"name: {name} leads out of the folder of runs, which trainer.default_root_dir moves.")
    return WholeCSVLogger(os.path.expanduser(folder or "runs"), name=name, flush_logs_every_n_steps=1)


# what loggers and we write before the first step
AT_THE_START = ("config.yaml", "hparams.yaml", "events.out.tfevents.*")


@contextmanager
def no_folder_of_a_refusal(trainer: L.Trainer) -> Iterator[None]:
    """Lightning makes the run's folder before it asks anybody. One that was made in here is removed where the start is
    refused, and where it is empty after whatever else ended it."""
    folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers] if first_rank() else []
    made = [folder for folder in folders if isinstance(folder, str) and not os.path.exists(folder)]

    def remove(written: Iterable[str] = ()) -> None:
        for folder in made:
            with suppress(OSError):  # what more is in it is kept
                names = os.listdir(folder)
                if all(any(fnmatch(name, pattern) for pattern in written) for name in names):
                    for name in names:
                        os.unlink(os.path.join(folder, name))
                os.rmdir(folder)
                os.rmdir(os.path.dirname(folder))

    signals.at_once.append(remove)
    try:
        yield
    except BaseException as error:
        remove(AT_THE_START if isinstance(error, InputError) else ())
        raise


def default_precision(accelerator: str, model: str | None, engine_dtype: str | None = None) -> str:
    """``bf16-mixed`` (fp32 master weights) where that is faster, else ``32-true``.

    On a GPU with bf16 always. On a CPU with AMX from a hidden size of 512 on: the train step of SmolLM2-135M (576) is
    1.4 times faster in it, that of the embedded model (128) 1.4 times slower; and there only beside an engine in 16
    bits, which by itself is in float32 (`agreement.rounding`).
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = accelerator in ("auto", "cpu") and torch.cpu.get_capabilities().get("amx_bf16")
    fast = fast and engine_dtype in ("bfloat16", "float16")
    return "bf16-mixed" if fast and model and load_config(model).hidden_size >= 512 else "32-true"
