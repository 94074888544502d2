"""A run's folder as one frozen record."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from prerl_lightning.report import process
from prerl_lightning.report.files import inside, is_number
from prerl_lightning.report.metrics import Row

OBJECTIVES = {"NSRPreRL": "NSR-PreRL", "PSRPreRL": "PSR-PreRL", "NSRRL": "NSR-RL", "PSRRL": "PSR-RL"}
# seconds without a new row after which a run that has not ended is said to give no sign of life
SILENCE, START = 300.0, 1800.0  # at least; before the first step, when the engine starts and step 0 is evaluated


@dataclass(frozen=True)
class Run:
    """What a folder holds, whether the run is over or not; every file but metrics.csv may be missing."""

    folder: Path
    name: str
    version: str
    info: Mapping[str, Any]
    """run.json; empty where there is none."""
    config: Mapping[str, Any]
    """config.yaml; empty where there is none."""
    config_text: str
    training: dict[int, Row]
    """By step, in order."""
    validation: dict[int, Row]
    """By step, in order."""
    seconds: Mapping[int, float]
    """Since the run began, at the end of each training step."""
    samples: tuple[Mapping[str, Any], ...]
    alignment: tuple[Mapping[str, Any], ...]
    touched: float
    """When it last wrote, seconds since 1970: `files.last_written`."""
    notes: tuple[str, ...]
    """What a reader of its figures has to know."""
    held_out: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """By step, problem by problem: the lines of held_out.jsonl."""

    @property
    def steps(self) -> int:
        return next(reversed(self.training), 0)

    @property
    def max_steps(self) -> int | None:
        found = self.info.get("max_steps") or inside(self.config, "trainer").get("max_steps")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def planned(self) -> list[tuple[str, int]]:
        """(objective, first step) of each life, also of those to come."""
        return _lives(self.info, self.config, self.training)

    @property
    def lives(self) -> list[tuple[str, int]]:
        """(objective, first step) of each life that has begun."""
        return [life for life in self.planned if life[1] < self.steps or not life[1]]

    @property
    def endings(self) -> dict[int, str | None]:
        """Of a life by its number, from 1, that ended ahead of its planned step, or may: why, or None."""
        found = self.info.get("endings") or {}
        return {int(n): str(why) if why else None for n, why in found.items() if str(n).isdigit()}

    @property
    def accuracy(self) -> str | None:
        """The held-out column that stands for accuracy: avg@K of the largest K."""
        names = {name for row in self.validation.values() for name in row}
        found = [int(match[1]) for name in names if (match := re.fullmatch(r"val/avg@(\d+)", name))]
        return f"val/avg@{max(found)}" if found else None

    @property
    def seed(self) -> int | None:
        """seed_everything; without config.yaml what run.json says."""
        found = self.config.get("seed_everything", self.info.get("seed"))
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def samples_seen(self) -> dict[int, float]:
        """Responses sampled up to and including each training step; 0: 0."""
        total, found = 0.0, {0: 0.0}
        for step, row in self.training.items():
            total += finite(row, "rollout/responses")
            found[step] = total
        return found

    def column(self, name: str) -> dict[int, float]:
        """Step to value, where there is a finite one."""
        rows = self.validation if name.startswith("val/") else self.training
        return {step: row[name] for step, row in rows.items() if math.isfinite(row.get(name, math.nan))}

    @property
    def warnings(self) -> list[str]:
        """Of callbacks/health.py."""
        return self.info.get("warnings") or []

    @property
    def fall(self) -> tuple[int, int] | None:
        """The steps of the best and of the last held-out accuracy, where the last one's 95 % interval lies below the
        best one's."""
        curve, low, high = (self.column(f"{self.accuracy}{end}") for end in ("", "/low", "/high"))
        best, last = max(curve, key=curve.__getitem__, default=0), max(curve, default=0)
        return (best, last) if best in low and last in high and high[last] < low[best] else None

    def status(self, now: float | None = None) -> tuple[str, str]:
        """One of finished, stopped (early), interrupted, failed, running, killed, silent, unknown, and a sentence."""
        of = f" of {self.max_steps:,}" if self.max_steps else ""
        at = f"at step {self.steps:,}{of}"
        said = self.info.get("status")
        if said == "failed":
            return "failed", f"failed {at}: {self.info.get('error') or 'no error text'}"
        if said == "finished":
            stopped = self.info.get("stopped")
            return ("stopped", f"stopped {at}: {stopped}") if stopped else ("finished", f"finished {at}")
        if said == "interrupted":
            return "interrupted", f"interrupted {at}"
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.touched))
        if said == "running":
            alive = process.lives(self.info.get("process"))
            if alive is False:
                return "killed", f"killed {at}: its process is gone and has not said why"
            if (time.time() if now is None else now) - self.touched > patience(self.seconds):
                return "silent", f"no sign of life since {since}, {at}{', though its process is there' * bool(alive)}"
            return "running", f"running, {at}"
        if self.max_steps and self.steps >= self.max_steps:
            return "finished", f"reached its {self.max_steps:,} steps (no run.json)"
        if not self.info and not self.training and not self.validation:
            return "unknown", f"nothing but its configuration yet, written {since}"
        return "unknown", f"{at}; no run.json says how it ended; last written {since}"


def patience(seconds: Mapping[int, float]) -> float:
    """Of silence: five times the longest gap between two rows so far, be it a step or an evaluation."""
    gaps = [b - a for a, b in pairwise(seconds.values())]
    return max(SILENCE, 5 * max(gaps)) if gaps else START


def finite(row: Row, name: str) -> float:
    """0 for no value, and for one that cannot be summed."""
    value = row.get(name, 0.0)
    return value if math.isfinite(value) else 0.0


def objective(name: str) -> str:
    """As the paper writes it: NSRPreRL is NSR-PreRL."""
    return OBJECTIVES.get(name, name)


def chain(run: Run) -> str:
    """NSR-PreRL → GRPO"""
    return " → ".join(name for name, _ in run.lives) or "unknown objective"


def _lives(info: Mapping[str, Any], config: Mapping[str, Any], training: Mapping[int, Row]) -> list[tuple[str, int]]:
    if info.get("lives"):
        return [(objective(name), int(first)) for name, first in info["lives"]]
    first_life = _configured(inside(config, "model"))
    if first_life:
        callbacks = inside(config, "trainer").get("callbacks")
        found = [
            (_configured(inside(one, "init_args", "successor")), inside(one, "init_args").get("at_step"))
            for one in (callbacks if isinstance(callbacks, list) else [callbacks])
            if "PolicyReincarnation" in str(inside({"": one}, "").get("class_path"))
        ]
        later = [(name or "?", int(at)) for name, at in found if is_number(at)]
        return [(first_life, 0), *sorted(later, key=lambda life: life[1])]
    lives: list[tuple[str, int]] = []
    for step, row in training.items():
        label = f"life {row['life']:.0f}" if math.isfinite(row.get("life", math.nan)) else None
        if label and (not lives or lives[-1][0] != label):
            lives.append((label, step - 1))
    return lives


def _configured(part: Mapping[str, Any]) -> str | None:
    """An objective of config.yaml by its class, and an `Objective` by its name, where it has one."""
    kind = str(part.get("class_path") or "").rpartition(".")[2]
    name = inside(part, "init_args").get("name") if kind == "Objective" else None
    return objective(str(name or kind)) if kind else None


def run_seconds(training: Mapping[int, Row]) -> dict[int, float]:
    """Since the run began, by training step: the file's, else the sum of the steps' seconds."""
    total, found = 0.0, {0: 0.0}
    for step, row in training.items():
        total += finite(row, "time/step") + finite(row, "time/watchers")
        since_start = finite(row, "time/since_start")
        total = max(total, since_start)
        found[step] = since_start or total
    return found
