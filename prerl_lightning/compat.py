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
