"""A run's folder as one frozen record."""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from prerl_lightning.errors import InputError
from prerl_lightning.report.metrics import MetricsFile, Row

OBJECTIVES = {"NSRPreRL": "NSR-PreRL", "PSRPreRL": "PSR-PreRL", "NSRRL": "NSR-RL", "PSRRL": "PSR-RL"}
SILENCE = 300.0  # seconds without a new row after which a run that has not ended is said to give no sign of life


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
    """When metrics.csv was last written, seconds since 1970."""
    notes: tuple[str, ...]
    """What a reader of its figures has to know."""

    @property
    def steps(self) -> int:
        return next(reversed(self.training), 0)

    @property
    def max_steps(self) -> int | None:
        found = self.info.get("max_steps") or (self.config.get("trainer") or {}).get("max_steps")
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
    def accuracy(self) -> str | None:
        """The held-out column that stands for accuracy: avg@K of the largest K."""
        names = {name for row in self.validation.values() for name in row}
        found = [int(match[1]) for name in names if (match := re.fullmatch(r"val/avg@(\d+)", name))]
        return f"val/avg@{max(found)}" if found else None

    @property
    def samples_seen(self) -> dict[int, float]:
        """Responses sampled up to and including each training step; 0: 0."""
        total, found = 0.0, {0: 0.0}
        for step, row in self.training.items():
            total += row.get("rollout/responses", 0.0)
            found[step] = total
        return found

    def column(self, name: str) -> dict[int, float]:
        """Step to value, where there is a finite one."""
        rows = self.validation if name.startswith("val/") else self.training
        return {step: row[name] for step, row in rows.items() if math.isfinite(row.get(name, math.nan))}

    def status(self, now: float | None = None) -> tuple[str, str]:
        """One of finished, interrupted, failed, running, silent, unknown, and a sentence."""
        of = f" of {self.max_steps:,}" if self.max_steps else ""
        at = f"at step {self.steps:,}{of}"
        said = self.info.get("status")
        if said == "failed":
            return "failed", f"failed {at}: {self.info.get('error') or 'no error text'}"
        if said == "finished":
            return "finished", f"finished {at}"
        if said == "interrupted":
            return "interrupted", f"interrupted {at}"
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.touched))
        if said == "running":
            if (time.time() if now is None else now) - self.touched > patience(self.training):
                return "silent", f"no sign of life since {since}, {at}"
            return "running", f"running, {at}"
        if self.max_steps and self.steps >= self.max_steps:
            return "finished", f"reached its {self.max_steps:,} steps (no run.json)"
        return "unknown", f"{at}; no run.json says how it ended; last written {since}"


def patience(training: Mapping[int, Row]) -> float:
    """Seconds of silence that a run may take: five of its longest steps, at least `SILENCE`."""
    recent = list(training.values())[-200:]
    longest = max((row.get("time/step", 0.0) + row.get("time/watchers", 0.0) for row in recent), default=0.0)
    return max(SILENCE, 5 * longest)


def objective(name: str) -> str:
    """As the paper writes it: NSRPreRL is NSR-PreRL."""
    short = name.rpartition(".")[2]
    return OBJECTIVES.get(short, short)


def chain(run: Run) -> str:
    """NSR-PreRL → GRPO"""
    return " → ".join(name for name, _ in run.lives) or "unknown objective"


def _lives(info: Mapping[str, Any], config: Mapping[str, Any], training: Mapping[int, Row]) -> list[tuple[str, int]]:
    said = info.get("lives")
    if isinstance(said, list) and said:
        return [(objective(str(name)), int(first)) for name, first in said]
    model = config.get("model")
    if isinstance(model, Mapping) and model.get("class_path"):
        callbacks = (config.get("trainer") or {}).get("callbacks") or []
        arguments = [c.get("init_args") or {} for c in callbacks if "PolicyReincarnation" in str(c.get("class_path"))]
        later = [(objective(str((a.get("successor") or {}).get("class_path"))), int(a["at_step"])) for a in arguments]
        return [(objective(str(model["class_path"])), 0), *sorted(later, key=lambda life: life[1])]
    found: list[tuple[str, int]] = []
    for step, row in sorted(training.items()):
        label = f"life {row['life']:.0f}" if "life" in row else None
        if label and (not found or found[-1][0] != label):
            found.append((label, step - 1))
    return found


def run_seconds(training: Mapping[int, Row]) -> dict[int, float]:
    """Since the run began, by training step: the file's, else the sum of the steps' seconds."""
    total, found = 0.0, {0: 0.0}
    for step, row in training.items():
        total += row.get("time/step", 0.0) + row.get("time/watchers", 0.0)
        total = max(total, row.get("time/since_start", 0.0))
        found[step] = row.get("time/since_start", total)
    return found


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The file's whole lines, and how many were none; a missing file is an empty one."""
    found, bad = [], 0
    if not path.is_file():
        return [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                bad += 1
                continue
            if isinstance(value, dict):
                found.append(value)
    return found, bad


def is_sample(line: Mapping[str, Any]) -> bool:
    """It has at least a step, a response and a reward."""
    kinds = {"step": int, "response": str, "reward": int | float}
    return all(isinstance(line.get(key), kind) for key, kind in kinds.items())


def read_info(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.yaml as a mapping and as text; both empty where there is none or it is no YAML."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        value = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}, ""
    return (value, text) if isinstance(value, dict) else ({}, text)


def run_name(folder: Path, info: Mapping[str, Any]) -> tuple[str, str]:
    """("dsrl", "version_0") of runs/dsrl/version_0; ("mine", "") of any other folder mine."""
    folder = folder.resolve()
    numbered = re.fullmatch(r"version_\d+", folder.name)
    name = str(info.get("name") or (folder.parent.name if numbered else folder.name))
    return name, folder.name if numbered else ""


def read_run(folder: Path, others: Iterable[Path] = ()) -> Run:
    """One folder; a run that was resumed gets its predecessor's rows, unless that is one of ``others``.

    Raises:
        InputError: no metrics.csv.
    """
    metrics = MetricsFile(folder / "metrics.csv")
    if not metrics.path.is_file():
        raise InputError(f"{folder}: no metrics.csv in it. Give the folder of a run, e.g. runs/dsrl/version_0.")
    metrics.read()
    rows = metrics.rows
    info = read_info(folder)
    config, text = read_config(folder)
    lines, bad_samples = read_json_lines(folder / "samples.jsonl")
    samples = [line for line in lines if is_sample(line)]
    bad_samples += len(lines) - len(samples)
    alignment, _ = read_json_lines(folder / "alignment.jsonl")
    name, version = run_name(folder, info)
    notes = []
    if not rows.numbered and (rows.training or rows.validation):
        notes.append("made by an older version without optim/step: steps are told from Lightning's column")
    if rows.training and not any("time/since_start" in row for row in rows.training.values()):
        notes.append("no time/since_start: wall time is the sum of time/step, without validation")
    if rows.cut_off:
        notes.append("metrics.csv ends within a line, which is left out")
    if rows.unreadable:
        notes.append(f"{rows.unreadable} lines of metrics.csv do not fit its header and are left out")
    if bad_samples:
        notes.append(f"{bad_samples} lines of samples.jsonl are cut off or no samples, and left out")
    missing = [file for file in ("config.yaml", "run.json", "samples.jsonl") if not (folder / file).is_file()]
    if missing:
        notes.append(f"no {', '.join(missing)}")
    training, validation = (dict(sorted(r.items())) for r in (rows.training, rows.validation))
    touched = metrics.path.stat().st_mtime
    run = Run(
        folder, name, version, info, config, text, training, validation, run_seconds(training),
        tuple(samples), tuple(alignment), touched, tuple(notes),
    )  # fmt: skip
    return _with_predecessor(run, {path.resolve() for path in others})


def _with_predecessor(run: Run, others: set[Path]) -> Run:
    source = run.info.get("resumed_from")
    if not source:
        return run
    before = _predecessor_folder(run.folder, str(source))
    first = min(run.training, default=None)
    if before is None:
        return replace(run, notes=(*run.notes, f"resumed from {source}, which is not there: earlier steps are missing"))
    if before in others:
        return replace(run, notes=(*run.notes, f"resumed from {source}, which is shown as a run of its own"))
    if first is None:
        return replace(run, notes=(*run.notes, f"resumed from {source}, and no step since"))
    earlier = read_run(before, others | {run.folder.resolve()})
    offset = earlier.seconds.get(first - 1, max(earlier.seconds.values(), default=0.0))
    validated = min(run.validation, default=first)
    note = f"steps 1 to {first - 1:,} are of {earlier.folder}, from which it was resumed"
    return replace(
        run,
        training={s: r for s, r in earlier.training.items() if s < first} | dict(run.training),
        validation={s: r for s, r in earlier.validation.items() if s < validated} | dict(run.validation),
        seconds={s: t for s, t in earlier.seconds.items() if s < first}
        | {s: t + offset for s, t in run.seconds.items() if s >= first},
        samples=(*(s for s in earlier.samples if s.get("step", 0) < first), *run.samples),
        alignment=(*(s for s in earlier.alignment if s.get("step", 0) < first), *run.alignment),
        notes=(*run.notes, note),
    )


def _predecessor_folder(folder: Path, checkpoint: str) -> Path | None:
    """Of .../version_0/checkpoints/last.ckpt; a relative path is tried from here and from above the run's folder."""
    path = Path(checkpoint)
    for base in (Path(), *folder.resolve().parents):
        found = (base / path).parent.parent
        if found.name and (found / "metrics.csv").is_file() and found.resolve() != folder.resolve():
            return found.resolve()
        if path.is_absolute():
            break
    return None
