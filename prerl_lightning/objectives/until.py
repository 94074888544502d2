"""What may end a life ahead of its time: a metric that stops getting better, or gets worse."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prerl_lightning.errors import InputError, check_bounds

KEY = "PolicyReincarnation.until"


@dataclass(frozen=True)
class Until:
    """A metric has been better in this life. Its last ``window`` values are averaged, and that is compared with the
    best such mean since the life began: the life ends when ``patience`` means in a row do not beat it and are worse by
    ``worse_by``.

    - It has stopped rising: ``{metric: val/avg@8}``.
    - It has fallen by a fifth: ``{metric: rollout/pass@8, worse_by: 0.2, window: 5}``.
    - It has risen by a fifth: ``{metric: rollout/entropy, mode: min, worse_by: 0.2, window: 5}``.

    Args:
        metric: a column of metrics.csv that is the same on all ranks, of a step (whether or not it is logged) or of a
            validation.
        mode: ``max``: more is better; ``min``: less.
        worse_by: share of the best's size; 0: not to be better is enough.
        patience: means in a row, at least 1.
        window: values, of as many steps or validations; none are compared before there are so many.
        not_before: optimizer steps of the run. What is measured before counts; the life ends then at the earliest.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    worse_by: float = 0.0
    patience: int = 2
    window: int = 1
    not_before: int = 0

    def __post_init__(self) -> None:
        check_bounds(self, KEY, {"worse_by": 0, "patience": 1, "window": 1, "not_before": 0})
        if self.mode not in ("max", "min"):
            raise InputError(f"{KEY}.mode: {self.mode!r}. Write max where more is better, or min.")

    @property
    def least(self) -> int:
        """Values without which it cannot end a life."""
        return self.window + self.patience


class Ending:
    """What an `Until` has seen of its life. All of it is in `state_dict`, so that a resume ends it at the same step."""

    def __init__(self, until: Until) -> None:
        self.until = until
        self.recent: list[float] = []
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0  # means in a row
        self.has_fired = False

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"until": asdict(self.until)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What another `Until` has seen, before ``--allow_changes true``, is left out."""
        if state["until"] == asdict(self.until):
            vars(self).update(state, until=self.until)

    def observe(self, metrics: Mapping[str, float], step: int) -> str | None:
        """What a step or a validation has measured, behind so many optimizer steps; why the life ends, once."""
        until, value = self.until, float(metrics.get(self.until.metric, math.nan))
        if not math.isfinite(value) or self.has_fired:
            return None
        self.recent = [*self.recent, value][-until.window :]
        if len(self.recent) < until.window:
            return None
        mean = math.fsum(self.recent) / until.window
        sign = 1 if until.mode == "max" else -1
        if self.best is None or sign * (mean - self.best) > 0:
            self.best, self.best_step, self.worse = mean, step, 0
        elif sign * (self.best - mean) >= until.worse_by * abs(self.best):
            self.worse += 1
        else:
            self.worse = 0
        if self.worse < until.patience or step < until.not_before:
            return None
        self.has_fired = True
        averaged = f" (mean of {until.window})" if until.window > 1 else ""
        return f"{until.metric}{averaged} is {mean:.3g}, after {self.best:.3g} at step {self.best_step}"
