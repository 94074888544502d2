"""The Trainer of a test's run in its own process: on the CPU, counted in steps, and quiet."""

from typing import Any

import lightning as L


def quiet_trainer(**options: Any) -> L.Trainer:
    """Without a logger or checkpoints unless asked for."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | options))
