"""What this library uses of Lightning without a promise: one place, and this test for it."""

import csv
import inspect
import math
import signal
from typing import Union

import lightning as L
import pytest
from jsonargparse import ArgumentParser, _typehints
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies.launchers import subprocess_script as fabric_subprocess_script
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, LitLogger, Logger, TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from trainers import quiet_trainer

from prerl_lightning.compat import (
    WholeCSVLogger,
    accept_lit_logger,
    accept_short_names,
    note_stops,
    observe_ranks,
    requeue_signal,
    share_version,
    whole_numbers_first,
)
from prerl_lightning.rewards import gsm8k_reward


def test_numbers_are_read_whole_first_whatever_a_process_has_named(monkeypatch):
    """`Optional[Union[float, int]]`, once anywhere, is what Lightning's own `Optional[Union[int, float]]` then is."""
    hints = Trainer.__init__.__annotations__
    for key in ("limit_val_batches", "limit_train_batches"):
        monkeypatch.setitem(hints, key, Union[float, int, None])  # noqa: UP007  (as Lightning has it)
    whole_numbers_first()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    given = ["--trainer.limit_val_batches=1", "--trainer.limit_train_batches=0.5", "--trainer.val_check_interval=3"]
    found = parser.parse_args(given).trainer
    values = (found.limit_val_batches, found.limit_train_batches, found.val_check_interval)
    assert repr(values) == "(1, 0.5, 3)"  # and not 1.0, all batches


def test_lightning_still_runs_validation_the_way_validate_now_does():
    """tests/test_run.py sees the result (a validation logged at step 0); this names the place if it breaks."""
    source = inspect.getsource(_TrainingEpochLoop.on_advance_end)
    assert "self.trainer.validating = True" in source
    assert "self.val_loop.run()" in source
    assert "epoch_loop" in inspect.getsource(_FitLoop.__init__)


def test_lightning_still_asks_whether_to_validate_as_validation_follows_does():
    """tests/test_saving.py sees the result (a checkpoint behind the validation of its step)."""
    source = inspect.getsource(_TrainingEpochLoop.on_advance_end)
    assert "self._should_check_val_fx(data_fetcher)" in source
    assert "self._skip_next_val" in source
    assert "self._data_fetcher" in inspect.getsource(_FitLoop.advance)


def test_lightning_still_begins_and_ends_training_as_run_ends_of_training_has_it():
    """tests/test_resume.py sees the result (a model exported, a step validated, where nothing is left to train)."""
    source = inspect.getsource(_FitLoop.run)
    assert "if self.skip:" in source
    places = [source.index(part) for part in ("self.on_run_start()", "while not self.done:", "self.on_run_end()")]
    assert places == sorted(places)
    assert "self.done or self.trainer.limit_train_batches == 0" in inspect.getsource(_FitLoop.skip.fget)
    assert "self.max_batches == 0" in inspect.getsource(_FitLoop.done.fget)


def test_lightning_still_validates_where_a_run_is_told_to_stop():
    """tests/test_resume.py sees the result (the last step is validated); after_step sets should_stop for it."""
    assert "self.trainer.should_stop and self.trainer.fit_loop._can_stop_early" in inspect.getsource(
        _TrainingEpochLoop._should_check_val_fx
    )


def test_lightning_still_keeps_a_timer_s_time_in_checkpoints():
    """Where it no longer does, Validations need not leave it out."""
    assert "time_elapsed" in Timer(duration="00:00:00:01").state_dict()


def test_lightning_still_asks_its_connector_for_signal_handlers():
    """tests/faults sees the result (no rank meets the others in a handler)."""
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(Trainer._run)
    assert "self._signal_connector.teardown()" in inspect.getsource(Trainer._teardown)
    # where it no longer does, Lightning's own may be used
    assert "dist.broadcast(" in inspect.getsource(_SignalConnector._sigterm_notifier_fn)


def test_rewards_go_by_their_names():
    accept_short_names()
    assert _typehints.import_object("gsm8k_reward") is gsm8k_reward
    assert _typehints.import_object("math.sqrt") is math.sqrt


def test_a_new_column_rewrites_no_file_in_place(tmp_path, monkeypatch):
    """A full disk in the rewrite leaves the rows as they were."""
    logger = WholeCSVLogger(tmp_path, name="", version="")
    for step in range(3):
        logger.log_metrics({"a": step}, step)
        logger.save()
    logger.log_metrics({"a": 3, "b": 1.0}, 3)
    logger.save()
    before = (tmp_path / "metrics.csv").read_text()
    assert list(csv.DictReader(before.splitlines()))[-1] == {"a": "3", "b": "1.0", "step": "3"}

    def full(self, rows):
        raise OSError("No space left on device")

    logger.log_metrics({"c": 1.0}, 4)
    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(OSError, match="No space"):
        logger.save()
    assert (tmp_path / "metrics.csv").read_text() == before


def test_slurm_s_requeue_is_still_asked_for_by_a_signal():
    trainer = quiet_trainer()
    trainer.strategy  # noqa: B018
    assert requeue_signal(trainer) is None
    trainer._accelerator_connector.cluster_environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    assert requeue_signal(trainer) == signal.SIGUSR2
    trainer._accelerator_connector.cluster_environment = SLURMEnvironment()
    assert requeue_signal(trainer) == signal.SIGUSR1
    trainer._accelerator_connector.cluster_environment = SLURMEnvironment(auto_requeue=False)
    assert requeue_signal(trainer) is None


def test_lightning_s_launcher_still_asks_for_an_observer_by_its_name():
    """Of the Trainer and of Fabric; tests/faults and tests/test_evaluate.py see the result (who died is named)."""
    for script in (subprocess_script, fabric_subprocess_script):
        assert "_launch_process_observer(self.procs)" in inspect.getsource(script._SubprocessScriptLauncher.launch)
    seen = [script._launch_process_observer for script in (subprocess_script, fabric_subprocess_script)]
    observe_ranks(print)
    assert subprocess_script._launch_process_observer is fabric_subprocess_script._launch_process_observer is print
    subprocess_script._launch_process_observer, fabric_subprocess_script._launch_process_observer = seen


def test_fabric_still_knows_its_rank_before_it_launches():
    """tests/test_evaluate.py sees the result (a file that others would not begin is refused before they start)."""
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    assert (fabric.global_rank, fabric.world_size, fabric.local_rank, fabric.device.type) == (0, 2, 0, "cpu")


def test_lightning_still_reads_a_checkpoint_as_it_is_told():
    """tests/test_security.py sees the result: `weights_only` of all that is loaded, and no hyperparameters before."""
    for method in (L.Trainer.fit, L.Trainer.validate, L.Trainer.test):
        assert inspect.signature(method).parameters["weights_only"].default is None
    assert "torch.load" in inspect.getsource(LightningCLI._parse_ckpt_path)


def test_lightning_still_reads_a_checkpoint_s_hyperparameters_where_they_are_not_wanted():
    """PrerlCLI does nothing instead; tests/test_bad_input.py sees the result (garbage is refused in one line)."""
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


def test_who_sets_should_stop_is_noted_once_a_fit():
    """Lightning's callbacks and its fit set the Trainer's attribute, and its loops read it."""

    class Stopper(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.should_stop = trainer.should_stop or True

    trainer, stopper = quiet_trainer(), Stopper()
    for _ in range(2):
        seen = []
        trainer.should_stop = False
        note_stops(trainer, lambda *who: seen.append(who))  # noqa: B023
        trainer.should_stop = False
        assert not trainer.should_stop
        for _ in range(2):
            stopper.on_train_start(trainer, None)
        assert trainer.should_stop
        assert isinstance(trainer, L.Trainer)
        ((by, where),) = seen
        assert by is stopper
        assert where.endswith("Stopper.on_train_start")
    for kind in (Timer, EarlyStopping):
        assert "trainer.should_stop = trainer.should_stop or should_stop" in inspect.getsource(kind)
    assert "self.should_stop = False" in inspect.getsource(Trainer.fit)


def test_loggers_of_one_folder_share_its_number(tmp_path):
    """As the Trainer does, which makes their folders one after the other."""

    def folders(share):
        loggers = [CSVLogger(tmp_path, "a"), TensorBoardLogger(tmp_path, "a"), CSVLogger(tmp_path, "a", version=7)]
        if share:
            share_version(loggers)
        for logger in loggers[:2]:
            _ = logger.experiment
        return [logger.version for logger in loggers]

    assert folders(share=True) == [0, 0, 7]
    assert folders(share=False) == [1, 2, 7]  # or `share_version` is not needed any more
    share_version([])


def test_lit_logger_is_still_no_logger_to_the_command_line():
    """tests/test_cli.py parses it, and what it says of the registry's names tests/test_hub.py has."""
    assert Logger not in LitLogger.__mro__
    accept_lit_logger()
    assert issubclass(LitLogger, Logger)
