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
