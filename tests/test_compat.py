"""What this library uses of Lightning without a promise: one place, and this test for it."""

import inspect

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
