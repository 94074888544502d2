"""Checkpoints to resume from, and the trained model as a Hugging Face folder."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from prerl_lightning import checkpoints, hub
from prerl_lightning.budget import GIB, ModelShape, checkpoint_bytes
from prerl_lightning.callbacks.monitors import check_monitor
from prerl_lightning.callbacks.requeue import requeue
from prerl_lightning.callbacks.watcher import runs_folder
from prerl_lightning.checkpoints import NotWritten, WholeFileIO
from prerl_lightning.compat import all_callbacks, is_trial, requeue_signal, validation_follows
from prerl_lightning.errors import InputError, RunError, check_bounds
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.memory import copies
from prerl_lightning.policy import files
from prerl_lightning.policy.model import Policy, load_config, load_tokenizer, model_path
from prerl_lightning.report.card import card
from prerl_lightning.report.reading import read_begun
from prerl_lightning.signals import Interrupted
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with defaults for runs counted in steps; the newest is ``last.ckpt``, which
    ``--ckpt_path last`` resumes from. A checkpoint holds about 12 bytes a parameter, so few are kept, and each is
    written once: ``last.ckpt`` is another name (a hard link) of a file that is kept anyway.

    One that is due where a validation is, is written behind it: with its score, and what callbacks keep of it. An error
    in that validation has it written first (one process). A signal (Ctrl-C, SIGTERM) has the present step written, due
    or not; a kill loses the steps since the one before. Runs that share a ``dirpath`` share ``last.ckpt``.

    A resumed run goes on comparing with the best of the runs before it, which stays where it is: what is overtaken is
    deleted in this run's ``dirpath`` alone.

    Args:
        every_n_train_steps: optimizer steps between checkpoints; one more is written at the end. None: at validations.
        dirpath: default: ``checkpoints`` in the run's folder.
        monitor: keep the best by this metric, e.g. ``val/avg@8``, rather than the newest. By a held-out one validated
            steps are judged, all of them, due or not; of others ``last.ckpt`` alone is written.
        mode: whether ``monitor`` is to be large or small.
        save_top_k: so many are kept, besides ``last.ckpt``; -1: all.
        save_weights_only: no optimizer state: smaller, and not to be resumed from.
        train_time_interval: write by time instead of steps.
        when_full: what a checkpoint that cannot be written does to the run: it has it ``stop``, or ``go_on`` without.
        sharded: under fsdp2, a checkpoint is a folder, to which each rank writes its shards and from which it reads
            them, instead of a file that rank 0 writes from whole tensors. Runs under any strategy and number of ranks
            resume from either; ``prerl convert`` makes one of the other.
    """

    # what Lightning has changed by the time that a file turns out not to be written
    BOOKS = (
        *("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value"),
        *("current_score", "last_model_path", "_last_checkpoint_saved", "_last_global_step_saved", "_last_judged"),
    )

    def __init__(
        self,
        every_n_train_steps: int | None = 20,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_weights_only: bool = False,
        train_time_interval: timedelta | None = None,
        when_full: Literal["stop", "go_on"] = "stop",
        sharded: bool = False,
    ) -> None:
        given = SimpleNamespace(every_n_train_steps=every_n_train_steps, save_top_k=save_top_k)
        check_bounds(given, "checkpoint", {"every_n_train_steps": 0, "save_top_k": -1})
        if save_top_k > 1 and monitor is None:
            raise InputError(
                f"checkpoint.save_top_k: {save_top_k}: by what are they compared? Give checkpoint.monitor, e.g. "
                "val/avg@8, or -1 to keep all."
            )
        super().__init__(
            dirpath=dirpath,
            filename="step={step}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_train_steps=every_n_train_steps if train_time_interval is None else None,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=False,
        )
        self.when_full, self.sharded = when_full, sharded
        self._seen_step = 0  # by the batch before
        self._last_judged = -1  # the step of the last weights that a score was compared for
        self._resumed_at: int | None = None  # the step whose checkpoint this process began with

    @property
    def held_out(self) -> bool:
        return (self.monitor or "").startswith("val/")

    def check_run(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:
        """Before anything is started: whether there is room for a checkpoint and the next one.

        Raises:
            InputError: the folder cannot be written in; or two checkpoints are larger than what is free, and
                ``when_full`` is ``stop``.
        """
        logger = trainer.logger
        folder = str(self.dirpath or getattr(logger, "save_dir", None) or trainer.default_root_dir)
        if self.sharded and (not isinstance(trainer.strategy, FSDP2Strategy) or "://" in folder):
            raise InputError(
                "checkpoint.sharded: folders of shards are written under --trainer.strategy fsdp2, to a file system. "
                "Leave it out, or take both."
            )
        if "://" in folder or is_trial(trainer):
            return
        there = checkpoints.existing(Path(folder))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            key = "checkpoint.dirpath" if self.dirpath else "trainer.default_root_dir"
            raise InputError(f"{key}: {folder} cannot be written in: {error.strerror}.") from error
        config = load_config(pl_module.model_name)
        try:
            shape = ModelShape.of_config(config, pl_module.lora)
        except ValueError:  # no language model, which its loading says better
            return
        beside = copies(pl_module, all_callbacks(trainer), shape)[1]
        needed = 2 * checkpoint_bytes(shape, beside, self.save_weights_only)
        free = shutil.disk_usage(there).free
        if free < needed:
            said = (
                f"checkpoint: a new one is written beside the last, which takes {needed / GIB:.2f} GiB for the two, "
                f"and {free / GIB:.2f} are free in {there}. Make room, name another --trainer.default_root_dir, or "
                "write --checkpoint.when_full go_on, or --trainer.enable_checkpointing false."
            )
            if self.when_full == "stop":
                raise InputError(said)
            log.warning(said)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if "://" not in str(self.dirpath):
            self.dirpath = os.path.abspath(str(self.dirpath))  # of the best, a resume elsewhere is to know it
            if trainer.is_global_zero and stage == "fit":
                here = Path(self.dirpath)
                for folder in {here, *here.parents[1].glob(f"*/{here.name}")}:
                    checkpoints.sweep(folder)
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.sharded_checkpoints = self.sharded
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileIO()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's forgets the best where ``dirpath`` is another, and its state where the interval is."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        found = trainer.strategy.broadcast(kept_best(checkpoint, self.monitor, self.mode, str(trainer.ckpt_path)))
        if self.monitor is None:
            self.best_model_path = next(iter(found), "")
        elif found and self.save_top_k:
            best = list(found.items())[: self.save_top_k if self.save_top_k > 0 else None]
            self.best_k_models = dict(best)
            self.best_model_path, self.best_model_score = best[0]
            self.kth_best_model_path, self.kth_value = best[-1]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._resumed_at = trainer.global_step if trainer.ckpt_path else None
        self._seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        due, self._seen_step = self._due(trainer), trainer.global_step
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._defer_save_until_validation = validation_follows(trainer)
            if not self._defer_save_until_validation:
                with self._unless_full():
                    self._save(trainer, validated=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.held_out and trainer.state.fn == "fit" and not trainer.sanity_checking:
            check_monitor(self, trainer.callback_metrics)
        due, self._defer_save_until_validation = self._defer_save_until_validation, False
        # max_epochs ends a run behind its last save, and has it validated then
        saved = self._last_checkpoint_saved and self._last_global_step_saved == trainer.global_step
        if saved and self.held_out and self._last_judged != trainer.global_step and trainer.state.fn == "fit":
            self._last_global_step_saved, due = -1, True
        if self._should_skip_saving_checkpoint(trainer):
            return
        with self._unless_full():
            if due or trainer.global_step == self._resumed_at:  # what it was resumed from does not know this validation
                self._save(trainer, validated=True)
            elif self.held_out and (self.save_top_k > 0 or self._best_so_far(trainer)):
                candidates = self._monitor_candidates(trainer)
                self._judge(trainer, candidates)
                if self._last_global_step_saved == trainer.global_step:
                    self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # of several ranks one alone may have failed; what RunHealth ends is not worth a checkpoint
        alone = trainer.world_size == 1 and not isinstance(exception, (Interrupted, RunError))
        together = isinstance(exception, Interrupted)
        if (self._defer_save_until_validation and alone) or (together and self._is_news(trainer)):
            self._defer_save_until_validation = False
            with self._unless_full():
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if isinstance(exception, Interrupted):
            last = self.last_model_path or str(trainer.ckpt_path or "")
            old = f", of step {self._last_global_step_saved or self._resumed_at}" if self._is_news(trainer) else ""
            goes_on = f"The checkpoint: {last}{old}; --ckpt_path last goes on from there." if last else "No checkpoint."
            log.info("%s: stopped at step %d. %s", exception, trainer.global_step, goes_on)
            if last and exception.number == requeue_signal(trainer):
                requeue(trainer, last, runs_folder(trainer))
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_news(trainer):
            with self._unless_full():
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _is_news(self, trainer: L.Trainer) -> bool:
        """No checkpoint has the present weights."""
        written = (0, self._last_global_step_saved, self._resumed_at)
        return trainer.global_step not in written and not is_trial(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        watchdog.mark("checkpoint", trainer.global_step)
        io = trainer.strategy.checkpoint_io
        if type(io) is not WholeFileIO or self.sharded:
            return super()._save_checkpoint(trainer, filepath)
        io.raises = False
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            io.raises = True
        if problem := trainer.strategy.broadcast(io.problem):
            raise NotWritten(problem)

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        """What could not be written leaves no trace in the books, and the file before it in its place."""
        before = {name: copy(getattr(self, name)) for name in self.BOOKS}
        try:
            yield
        except NotWritten as error:
            self.__dict__.update(before)
            if self.when_full == "stop":
                raise
            log.warning("%s", error)

    def _best_so_far(self, trainer: L.Trainer) -> bool:
        score, best = trainer.callback_metrics[str(self.monitor)], self.best_model_score
        return best is None or bool(score > best if self.mode == "max" else score < best)

    def _due(self, trainer: L.Trainer) -> bool:
        if self._train_time_interval is None:
            if self._every_n_epochs >= 1:  # Lightning's reading of None
                return validation_follows(trainer)
            n, before = self._every_n_train_steps, self._seen_step  # a rollout may make several steps
            return n > 0 and trainer.global_step // n > before // n
        now = time.monotonic()
        since = now - (self._last_time_checked or 0.0)
        due = trainer.strategy.broadcast(since >= self._train_time_interval.total_seconds())
        if due:
            self._last_time_checked = now
        return due

    def _save(self, trainer: L.Trainer, validated: bool) -> None:
        candidates = self._monitor_candidates(trainer)
        if validated or not self.held_out:
            self._judge(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _judge(self, trainer: L.Trainer, candidates: dict[str, Any]) -> None:
        self._last_judged = trainer.global_step
        self._save_topk_checkpoint(trainer, candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Written only where this step has no file yet, as when it is not among the best."""
        self.last_model_path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        saved = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        there = type(trainer.strategy.checkpoint_io) is WholeFileIO  # a plugin may write later
        if not saved or "://" in saved or not there:
            self._save_checkpoint(trainer, self.last_model_path)
        elif trainer.is_global_zero and saved != self.last_model_path:
            checkpoints.link(Path(saved), Path(self.last_model_path))


def kept_best(checkpoint: dict[str, Any], monitor: str | None, mode: str, path: str) -> dict[str, Any]:
    """Files that the run of the checkpoint at ``path`` kept by ``monitor``, with their scores, the best first. What is
    gone is looked for where it would lie if runs were moved along with ``path``, and else left out, with a word."""
    found: dict[str, Any] = {}
    for state in checkpoint.get("callbacks", {}).values():
        if (state.get("monitor"), state.get("mode")) == (monitor, mode) and "best_k_models" in state:
            found |= state["best_k_models"] if monitor else {state["best_model_path"]: None}
    kept, folder = {}, Path(path).resolve().parent
    for file, score in sorted(found.items(), key=lambda item: item[1] or 0, reverse=mode == "max"):
        parts = Path(file).parts
        places = (Path(file), folder.joinpath(*parts[-1:]), folder.parent.parent.joinpath(*parts[-3:]))
        there = file if "://" in file else next((str(p) for p in places if p.exists()), None)
        if there is not None:
            kept[there] = score
        elif monitor:
            log.warning("%s, kept for its %s of %.4g, is not there any more.", file, monitor, score)
    return kept


class ExportModel(L.Callback):
    """Writes the policy as a Hugging Face folder, ``model`` (weights, config, tokenizer), when training ends, and into
    it a card, README.md: objectives, data, held-out measures with their intervals. With LoRA its adapters are folded
    in, and lie alone in ``adapter``, as peft has them.

    Args:
        enabled: False: do not.
        dtype: of the weights in the file.
        interrupted: also where a signal ends it (Ctrl-C, SIGTERM), which may not leave the time for it; without a card.
        push_to_hub: NAME or OWNER/NAME of a repository on the Hugging Face hub, made at the start, private, unless it
            is there; at the end of training, not behind a signal, the folder goes there.
    """

    def __init__(
        self,
        enabled: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        interrupted: bool = False,
        push_to_hub: str | None = None,
    ) -> None:
        self.enabled, self.dtype, self.interrupted, self.push_to_hub = enabled, dtype, interrupted, push_to_hub
        if push_to_hub is not None and not enabled:
            raise InputError("export.push_to_hub: nothing is exported with export.enabled: false. Leave one out.")
        self._written: Path | None = None  # on the first rank

    def check_run(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:
        """Raises InputError where the model could not be pushed."""
        if self.push_to_hub is not None and trainer.is_global_zero and not is_trial(trainer):
            hub.make_repository(self.push_to_hub, "export.push_to_hub")

    def on_exception(self, trainer: L.Trainer, pl_module: PolicyModule, exception: BaseException) -> None:  # type: ignore[override]
        if self.interrupted and isinstance(exception, Interrupted):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        if not self.enabled or is_trial(trainer):
            return
        if not pl_module.live_policy.is_finite():
            log.warning("The trained model is not exported: its weights are not finite.")
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "model"
        export(pl_module, folder, getattr(torch, self.dtype), write=trainer.is_global_zero)
        self._written = folder if trainer.is_global_zero else None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Behind the last validation, and when run.json says how the run ended."""
        folder, self._written = self._written, None
        if folder is not None:
            (folder / "README.md").write_text(card(read_begun(folder.parent)), encoding="utf-8")
            if self.push_to_hub is not None:
                watchdog.close()  # to which an upload is a standstill
                hub.push(folder, self.push_to_hub)


def export(module: PolicyModule, folder: Path, dtype: torch.dtype, write: bool = True) -> None:
    """The policy and its tokenizer, and what adapters it has beside them; called on all ranks."""
    export_policy(module.live_policy, folder, dtype, write)
    if (adapters := module.live_policy.adapters) is not None:
        adapters.save(folder.with_name("adapter"), model_path(module.model_name), write)
    if write:
        load_tokenizer(module.model_name).save_pretrained(folder)


def export_policy(policy: Policy, folder: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Gather the weights one layer at a time, on all ranks, and save them where ``write``, by the names that they had
    in the folder they came from."""
    weights = policy.named_weights(dtype)
    if write:
        files.write(policy.model, ((name, tensor.cpu()) for name, tensor in weights), folder, dtype)
    else:
        for _ in weights:
            pass
