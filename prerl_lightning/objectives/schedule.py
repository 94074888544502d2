"""Learning-rate schedules as pure functions of the step of a life: nothing to store, nothing to go wrong on resume."""

import math
from typing import Literal

from prerl_lightning.errors import InputError

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(schedule: Schedule, step: int, warmup_steps: int, total_steps: int | None) -> float:
    """What the peak learning rate is multiplied by at ``step`` (from 0) of a life of ``total_steps``.

    Linear warm-up from 1 / ``warmup_steps``, then constant, or a linear or cosine decay towards 0 at ``total_steps``.

    Raises:
        InputError: a decay without a known end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if total_steps is None:
        raise InputError(f"lr_schedule: {schedule} needs an end: set trainer.max_steps.")
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
