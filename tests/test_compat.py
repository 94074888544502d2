"""What this library uses of Lightning without a promise: one place, and this test for it."""

import inspect

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


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


def test_lightning_still_reads_a_checkpoint_s_hyperparameters_where_they_are_not_wanted():
    """PrerlCLI does nothing instead; tests/test_bad_input.py sees the result (garbage is refused in one line)."""
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)
