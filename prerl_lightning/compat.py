"""All that touches what Lightning does not promise. tests/test_compat.py fails where a release changes it."""

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


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
