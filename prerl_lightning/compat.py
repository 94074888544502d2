"""All that touches what Lightning does not promise. tests/test_compat.py fails where a release changes it."""

import lightning as L


def validate_now(trainer: L.Trainer) -> None:
    """Run the whole validation loop inside `fit`, before the first step, and log it at step 0.

    Lightning's sanity check runs before training too, but drops what it measured.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.run()
    trainer.training = True


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation will run right after the training batch that is ending."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    inner = loop.epoch_loop
    # it is "checked" without held-out problems too, and then skipped
    return not inner._skip_next_val and not inner.val_loop.skip and inner._should_check_val_fx(loop._data_fetcher)
