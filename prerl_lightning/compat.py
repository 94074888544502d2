"""All that touches what Lightning does not promise. tests/test_compat.py fails where a release changes it."""

import csv
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, cast, get_args

import lightning as L
from jsonargparse import _typehints
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies.launchers import subprocess_script as fabric_subprocess_script
from lightning.pytorch.loggers import CSVLogger, LitLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.model_registry import _determine_model_name, _is_registry

from prerl_lightning import manual
from prerl_lightning.errors import InputError

# what Lightning's connectors set on a Trainer, of which its class says nothing


def all_callbacks(trainer: L.Trainer) -> list[Any]:
    return cast(Any, trainer).callbacks


def is_trial(trainer: L.Trainer) -> bool:
    """fast_dev_run: so many steps, with limits of its own, and no file."""
    return bool(cast(Any, trainer).fast_dev_run)


def logs_every(trainer: L.Trainer) -> int:
    """Steps."""
    return cast(Any, trainer).log_every_n_steps


def validate_now(trainer: L.Trainer) -> None:
    """Run the whole validation loop inside `fit`, before or after its steps, and log it at the present one.

    Lightning's sanity check runs before training too, but drops what it measured.
    """
    if not trainer.enable_validation:
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else one that a checkpoint was written in would go on where it was
    trainer.validating = True
    loop.run()
    trainer.training = True


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation will run right after the training batch that is ending."""
    loop = trainer.fit_loop
    if loop._data_fetcher is None:  # before the first batch, or after the last
        return False
    inner = loop.epoch_loop
    # it is "checked" without held-out problems too, and then skipped
    return not inner._skip_next_val and not inner.val_loop.skip and inner._should_check_val_fx(loop._data_fetcher)


class _Finished(_FitLoop):
    @property
    def skip(self) -> bool:
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def run_ends_of_training(trainer: L.Trainer) -> None:
    """Where a checkpoint leaves no step to train, Lightning would call neither on_train_start nor on_train_end."""
    trainer.fit_loop.__class__ = _Finished  # type: ignore[assignment]


def note_stops(trainer: L.Trainer, note: Callable[[object, str], None]) -> None:
    """``note`` is given who first sets ``trainer.should_stop``, by which callbacks end a run and which keeps no reason:
    the object (None: no method did) and the name of its function."""

    def get(self: Any) -> bool:
        return self.__dict__["should_stop"]

    def put(self: Any, stop: bool) -> None:
        if stop and not self.__dict__["should_stop"]:
            caller = sys._getframe(1)
            note(caller.f_locals.get("self"), caller.f_code.co_qualname)
        self.__dict__["should_stop"] = stop

    kind = type(trainer)
    kind = kind.__bases__[0] if "should_stop" in vars(kind) else kind  # from an earlier fit
    trainer.__class__ = type(kind.__name__, (kind,), {"should_stop": property(get, put)})


class _Signals(_SignalConnector):
    def __init__(self, trainer: L.Trainer, listen: Callable[[], None], restore: Callable[[], None]) -> None:
        super().__init__(trainer)
        self._listen, self._restore = listen, restore

    def register_signal_handlers(self) -> None:
        self._listen()

    def teardown(self) -> None:
        self._restore()


def take_signals(trainer: L.Trainer, listen: Callable[[], None], restore: Callable[[], None]) -> None:
    """``listen`` where Lightning would set its handlers, of which that of SIGTERM makes a collective call wherever the
    signal comes, and ``restore`` at the Trainer's end."""
    trainer._signal_connector = _Signals(trainer, listen, restore)


def requeue_signal(trainer: L.Trainer) -> int | None:
    """Under SLURM the signal that asks for a checkpoint and a requeue; None: nothing does."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return cast(int, environment.requeue_signal or signal.SIGUSR1)


def registry_name(ckpt_path: str) -> str | None:
    """NAME or NAME:VERSION of Lightning's ``registry:NAME[:version:VERSION]``; None: it is no such. Lightning itself
    takes any of several checkpoints in the folder that it downloads to, and goes on without litmodels."""
    if not _is_registry(ckpt_path):
        return None
    try:
        return _determine_model_name(ckpt_path, None)
    except ValueError:
        raise InputError(
            f"--ckpt_path: {ckpt_path} names no model. Write registry:ORGANISATION/TEAMSPACE/MODEL, or that and "
            ":version:VERSION."
        ) from None


def whole_numbers_first() -> None:
    """In the types of the Trainer's arguments. typing takes Optional[Union[int, float]] and Optional[Union[float, int]]
    for one, and gives whichever the process has named first: by the latter, which any package that a notebook imports
    may name, a parser reads ``limit_val_batches: 1``, one batch, as 1.0, all of them."""
    hints = L.Trainer.__init__.__annotations__
    for name, hint in hints.items():
        kinds = get_args(hint)
        if int in kinds and float in kinds:
            hints[name] = reduce(or_, [int, float, *(kind for kind in kinds if kind not in (int, float))])


def observe_ranks(observe: Callable[..., None]) -> None:
    """``observe`` is given the rank processes that the launcher of Lightning's Trainer or Fabric has started; in place
    of its own observer, which kills all processes within five seconds of the first that ends with a status, and says
    nothing."""
    for script in (subprocess_script, fabric_subprocess_script):
        cast(Any, script)._launch_process_observer = observe


@cache
def accept_short_names() -> None:
    """Of rewards, as the classes of this package go by theirs: those the parser finds by their bases, and imports both
    by this function."""
    paths, plain = manual.topics()["rewards"], _typehints.import_object
    parser = cast(Any, _typehints)
    parser.import_object = lambda name, *args, **options: plain(paths.get(name, name), *args, **options)


class _WholeWriter(ExperimentWriter):
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path, new = Path(self.metrics_file_path), Path(f"{self.metrics_file_path}.new")
        with path.open(newline="") as before, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(csv.DictReader(before))
        os.replace(new, path)


class WholeCSVLogger(CSVLogger):
    """Lightning's rewrites metrics.csv in place for a new column, where a kill or a full disk cuts it off."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _WholeWriter(log_dir=self.log_dir)
        return self._experiment


def share_version(loggers: Sequence[Logger]) -> None:
    """The files of one run in one version_N: by itself each logger counts on from the folders of those before it."""
    writers = [one for one in loggers if isinstance(one, CSVLogger | TensorBoardLogger)]
    for other in writers[1:]:
        if other._version is None and (other.save_dir, other.name) == (writers[0].save_dir, writers[0].name):
            other._version = writers[0].version


def accept_lit_logger() -> None:
    """As a value of the Trainer's ``logger`` in a configuration: it is Fabric's Logger and not Lightning's, which alone
    the command line takes."""
    Logger.register(LitLogger)
