"""Checkpoints to resume from, and the trained model as a Hugging Face folder."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.policy.model import load_tokenizer

log = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with defaults for runs counted in steps; the newest is ``last.ckpt``, which
    ``--ckpt_path last`` resumes from. A checkpoint holds about 12 bytes a parameter, so few are kept.

    Args:
        every_n_train_steps: optimizer steps between checkpoints; one more is written at the end.
        dirpath: default: ``checkpoints`` in the run's folder.
        monitor: keep the best by this metric, e.g. ``val/avg@8``, rather than the newest.
        mode: whether ``monitor`` is to be large or small.
        save_top_k: so many are kept, besides ``last.ckpt``; -1: all.
        save_weights_only: no optimizer state: smaller, and not to be resumed from.
        train_time_interval: write by time instead of steps.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 20,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_weights_only: bool = False,
        train_time_interval: timedelta | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step={step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_train_steps=None if train_time_interval else every_n_train_steps,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._last_global_step_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class ExportModel(L.Callback):
    """Writes the policy as a Hugging Face folder (weights, config, tokenizer) when training ends or is interrupted.

    Args:
        enabled: False: do not.
        dtype: of the weights in the file.
    """

    def __init__(self, enabled: bool = True, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
        self.enabled, self.dtype = enabled, dtype

    def on_train_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "model"
        export(pl_module, folder, getattr(torch, self.dtype), write=trainer.is_global_zero)
        log.info("The trained model is in %s", folder)


def export(module: PolicyModule, folder: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Gather the weights one tensor at a time, on all ranks, and save them where ``write``."""
    policy = module.live_policy
    state = {}
    for name, tensor in policy.named_weights(dtype):
        if write:
            state[name] = tensor.cpu()
    if write:
        policy.model.save_pretrained(folder, state_dict=state)
        load_tokenizer(module.model_name).save_pretrained(folder)
