"""Runs from Python: ``prerl.fit`` does what ``prerl fit`` does; a Trainer of one's own takes `trainer_defaults` and
`run_callbacks`."""

import inspect
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, getsignal, signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning as L
import yaml

import prerl_lightning.strategies  # noqa: F401  (registers fsdp2)
from prerl_lightning import refusals, resume
from prerl_lightning.arguments import check_call, check_kind, check_kinds
from prerl_lightning.callbacks.monitors import check_monitors
from prerl_lightning.callbacks.reincarnation import PolicyReincarnation
from prerl_lightning.callbacks.requeue import requeued
from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.callbacks.watcher import callbacks_of, run_folder
from prerl_lightning.compat import is_trial, observe_ranks, share_version
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, check_bounds, nearest
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.checks import check_trainer
from prerl_lightning.report import words
from prerl_lightning.report.page import report as report_command
from prerl_lightning.report.reading import read_begun, read_run
from prerl_lightning.report.runs import Run as Record
from prerl_lightning.report.runs import chain
from prerl_lightning.secrets import hide
from prerl_lightning.settings import described
from prerl_lightning.signals import Interrupted, signals
from prerl_lightning.terminal import log_to_stdout, quiet, quiet_lightning
from prerl_lightning.training import (
    TRAINER_DEFAULTS,
    WATCHERS,
    default_precision,
    no_folder_of_a_refusal,
    progress,
    run_logger,
    with_records,
)
from prerl_lightning.watchdog import watchdog

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Life = PolicyReincarnation


# ---------------------------------------------------------------------- what a run left


@dataclass(frozen=True, repr=False)
class Run:
    """A run's folder: what it left, whether it is over or not.

    Attributes:
        record: all that its files hold, as the report reads it, with the steps of the runs it was resumed from.
    """

    record: Record

    def __repr__(self) -> str:
        held_out = "" if self.accuracy is None else f", held out {str(self.record.accuracy)[4:]} {self.accuracy:.3f}"
        return f"<{self.folder}: {self.status}, {words.steps(self.record.steps)} of {chain(self.record)}{held_out}>"

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def status(self) -> str:
        """finished, stopped (early), interrupted, failed, running, killed, silent or unknown."""
        return self.record.status()[0]

    @property
    def accuracies(self) -> dict[int, float]:
        """avg@k of the held-out problems, 0 to 1, by optimizer step; empty without ``data.val``."""
        return self.record.column(self.record.accuracy) if self.record.accuracy else {}

    @property
    def accuracy(self) -> float | None:
        """The last of `accuracies`."""
        return next(reversed(self.accuracies.values()), None)

    @property
    def metrics(self) -> "pd.DataFrame":
        """A row a step with all that metrics.csv has of it, training and validation; the columns are those names."""
        import pandas as pd

        steps = sorted(self.record.training.keys() | self.record.validation.keys())
        rows = [{**self.record.training.get(s, {}), **self.record.validation.get(s, {})} for s in steps]
        return pd.DataFrame(rows, index=pd.Index(steps, name="step"))

    @property
    def samples(self) -> "pd.DataFrame":
        """A row a sample that was kept: step, prompt, response, reward ..."""
        import pandas as pd

        return pd.DataFrame(self.record.samples)

    def plot(self, *columns: str) -> "Plot":
        """Curves of columns of `metrics` over the steps, which a notebook shows."""
        known = self.metrics.columns
        for column in columns:
            if column not in known:
                raise InputError(f"plot: this run has no {column}.{nearest(column, known)}")
        return Plot({column: self.record.column(column) for column in columns})

    @property
    def model(self) -> Path | None:
        """The trained model, a Hugging Face folder; None: none was exported."""
        folder = self.folder / "model"
        return folder if folder.is_dir() else None

    @property
    def checkpoint(self) -> Path | None:
        """The newest, to go on from: ``fit(..., ckpt_path=run.checkpoint)``."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.exists() else None

    def report(self, path: str | os.PathLike = "report.html") -> Path:
        """Write the page that ``prerl report`` makes of it."""
        report_command([str(self.folder), "-o", str(path)])
        return Path(path)


@dataclass(frozen=True)
class Plot:
    """A picture in SVG, of value by step of each curve."""

    curves: Mapping[str, Mapping[int, float]]

    def _repr_svg_(self) -> str:  # what Jupyter asks for
        import vl_convert

        points = [
            {"step": step, "value": value, "curve": name}
            for name, curve in self.curves.items()
            for step, value in curve.items()
        ]
        return vl_convert.vegalite_to_svg(
            {
                "width": 420,
                "height": 220,
                "data": {"values": points},
                "mark": {"type": "line", "point": len(points) < 40 * len(self.curves)},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative", "axis": {"tickMinStep": 1}},
                    "y": {"field": "value", "type": "quantitative", "title": None},
                    "color": {"field": "curve", "type": "nominal", "title": None},
                },
            }
        )


def load_run(folder: str | os.PathLike) -> Run:
    """A run by its folder, such as runs/dsrl/version_0. Raises InputError where there is none."""
    return Run(read_run(Path(folder)))


# ---------------------------------------------------------------------- what a Trainer is given


def trainer_defaults(**given: Any) -> dict[str, Any]:
    """Arguments of Lightning's Trainer as ``prerl fit`` has them; ``given`` wins. Sets up this library's log lines.

    Args:
        name: of the run: runs/NAME/version_N; default: runs/python/version_N. ``default_root_dir`` is in place of runs,
            and ``logger`` of all.
    """
    if not os.environ.get("PRERL_DEBUG"):
        quiet()
        quiet_lightning()
    log_to_stdout()
    name = given.pop("name", None) or "python"
    known = inspect.signature(L.Trainer.__init__).parameters
    for key in given:
        if key not in known:
            mend = refusals.here(key) or nearest(key, known)
            raise InputError(f"{key}: Lightning's Trainer has no such argument.{mend}")
    logger = given.get("logger")
    for key in {"logger", "callbacks"} & given.keys():
        check_kind(given[key], inspect.signature(L.Trainer.__init__).parameters[key].annotation, f"trainer.{key}")
    made = TRAINER_DEFAULTS | given
    if logger is None or logger is True:
        made["logger"] = run_logger(given.get("default_root_dir"), name)
    _, made["enable_progress_bar"] = progress(given.get("enable_progress_bar"), given.get("callbacks"))
    return made


def run_callbacks(*own: L.Callback) -> list[L.Callback]:
    """What watches and keeps a run: checkpoints, thoughts, alignment, samples, health, export, run.json, a line a step.

    Args:
        own: stand in for those of their kind, such as ``Thoughts(families={"wait": ["wait"]})``, or are added.
    """
    return _with_own(list(own), True, True)


def _with_own(own: list[L.Callback], bar: bool, checkpoints: bool) -> list[L.Callback]:
    kinds = {type(callback) for callback in own}
    watchers = [kind() for kind in WATCHERS.values() if kind not in kinds]
    return with_records([*watchers, *own], progress(bar, own)[0], checkpoints)


class _KeepSettings(L.Callback):
    """config.yaml, and the same in each checkpoint, which a resume is compared with."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = hide(configuration)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and folder is not None and not is_trial(trainer):
            folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(self.configuration, sort_keys=False, allow_unicode=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["configuration"] = self.configuration


# ---------------------------------------------------------------------- training


def fit(
    objective: PolicyModule,
    data: RolloutDataModule,
    lives: Sequence[PolicyReincarnation] = (),
    max_steps: int = -1,
    *,
    name: str | None = None,
    seed: int = 0,
    ckpt_path: str | os.PathLike | None = None,
    allow_changes: bool = False,
    callbacks: Iterable[L.Callback] = (),
    **trainer: Any,
) -> Run:
    """Train, as ``prerl fit`` does: its checks, watchers, log lines, folders and files.

    The engine is freed at the end; the same ``data`` may be given again, and starts it anew. Several ranks
    (``devices``) start the script once each, as Lightning's launcher does; in a notebook there is one.

    Args:
        objective: of the first life, with the model.
        data: prompts, engine and reward; not changed but for its engine.
        lives: the further ones, ``Life(10, GRPO(lr=3e-4), optimizer="reset")``.
        max_steps: optimizer steps; -1: until something else ends it, such as ``max_time``.
        name: of the run: runs/NAME/version_N; default: the lives' objectives.
        seed: ``seed_everything``.
        ckpt_path: to resume from: a path; of the runs of this name ``last``, ``auto`` (that, or none) or ``best``.
        allow_changes: resume also where a step or the order of the data is another than in the checkpoint's run.
        callbacks: in place of ours of their kind, or added; see `run_callbacks`.
        trainer: further arguments of Lightning's Trainer.

    Raises:
        InputError: something of it cannot be; said before the engine starts.
        KeyboardInterrupt: Ctrl-C, behind the step that it came in, with a checkpoint.
    """
    check_call(fit, locals(), "fit")
    lives = sorted(lives, key=lambda life: life.at_step)
    own = list(callbacks)
    for part in (objective, *lives, *own):
        check_kinds(part, type(part).__name__)
    check_kinds(data, "data")
    chain = [objective, *(life.successor for life in lives)]
    name = name or "-".join(getattr(o, "title", type(o).__name__) for o in chain).replace(" ", "-")
    made = trainer_defaults(name=name, max_steps=max_steps, **trainer)
    if made["logger"] is False:
        raise InputError("fit: a run without a logger leaves no folder to give back. Leave logger=False out.")
    if trainer.get("fast_dev_run"):
        raise InputError(
            "fit: fast_dev_run leaves no folder to give back. A Trainer of one's own does it: L.Trainer(**prerl."
            "trainer_defaults(fast_dev_run=True), callbacks=prerl.run_callbacks()).fit(objective, datamodule=data); so "
            "does prerl fit --trainer.fast_dev_run true."
        )
    if _in_a_notebook():
        made["devices"] = _one_device(made)
    defaults = {k: p.default for k, p in inspect.signature(L.Trainer.__init__).parameters.items() if k != "self"}
    configured = SimpleNamespace(**(defaults | made))
    check_trainer(configured, trains=True)
    if configured.precision is None:
        made["precision"] = default_precision(
            configured.accelerator, objective._model, getattr(data.engine, "options", {}).get("dtype")
        )
    check_bounds(SimpleNamespace(seed=seed), "fit", {"seed": 0}, most={"seed": 2**32 - 1})
    L.seed_everything(seed, workers=True, verbose=False)
    observe_ranks(watchdog.observe)
    shown = {k: v for k, v in made.items() if k not in ("logger", "callbacks", "default_root_dir")}
    configuration = {"seed_everything": seed, "model": described(objective), "data": described(data)["init_args"]}
    configuration["trainer"] = described(shown | {"callbacks": [*lives, *own]})
    ours = _with_own(
        own, trainer.get("enable_progress_bar") is not False, made.get("enable_checkpointing") is not False
    )
    try:
        runs = L.Trainer(**made, callbacks=[*lives, _KeepSettings(configuration), *ours])
    except Exception as error:  # Lightning raises many kinds
        raise refusals.of_lightning(error, vars(configured)) from error
    check_monitors(runs, chain, data)
    data.check(objective, runs, "fit")
    keeps = next(iter(callbacks_of(runs, RunCheckpoint)), RunCheckpoint())
    told = None if ckpt_path is None else str(ckpt_path)
    folders = resume.folders_of(runs, keeps.dirpath)
    found = resume.chosen(told or requeued(folders[0]), folders, objective, keeps.monitor, keeps.mode, True)
    if found is not None and resume.is_file(found):
        resume.compare(found, configuration, allow_changes)
    folder: Path | None = None
    on_ctrl_c = getsignal(SIGINT)
    share_version(runs.loggers)  # as late as can be: another run may start beside this one
    try:
        with no_folder_of_a_refusal(runs):
            runs.fit(objective, datamodule=data, ckpt_path=found, weights_only=True)
        folder = run_folder(runs)
        if signals.received == SIGINT:  # behind the last step, where nothing has asked for it
            raise KeyboardInterrupt
    except SystemExit as ending:
        number = ending.number if isinstance(ending, Interrupted) else signals.received
        if number == SIGINT or isinstance(ending.__context__, KeyboardInterrupt):  # Lightning makes an exit of one
            raise KeyboardInterrupt from None
        raise
    finally:
        data.teardown("fit")
        data.engine.stop()
        if folder is None:  # else all ranks go on with the script
            watchdog.finish(60.0)
        signals.restore()
        with suppress(ValueError, TypeError):  # a thread may not, nor for a handler that is not of Python
            signal(SIGINT, on_ctrl_c)  # Lightning has it ignored from the first one on, as if the process ended
    assert folder is not None  # there is a logger
    return Run(read_begun(folder))  # one that was resumed at its end has no rows of its own


def _in_a_notebook() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def _one_device(trainer: Mapping[str, Any]) -> Any:
    """``devices`` where the process cannot be started once a rank. Raises InputError where several are asked for."""
    devices = trainer.get("devices", "auto")
    alone = trainer.get("strategy", "auto") == "auto" and trainer.get("num_nodes", 1) == 1
    if not alone or devices not in ("auto", 1, "1", [0]):
        raise InputError(
            "trainer.devices: a notebook trains on one device, since the other ranks would have to start it anew. "
            "Leave devices and strategy out here, or put the call into a script: python train.py"
        )
    return 1 if devices == "auto" else devices
