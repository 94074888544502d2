"""Runs that differ in seeds alone as one group; what differs between groups; how soon each reaches an accuracy."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prerl_lightning.report.runs import Run, chain

# what may differ between runs of one group: seeds, and where files are
SEEDS = ("seed_everything", "data.seed", "trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath")
NOWHERE = (*SEEDS, "ckpt_path", "config")


@dataclass(frozen=True)
class Group:
    """Runs whose configurations differ in seeds alone; a run without config.yaml is a group of its own."""

    name: str
    runs: tuple[Run, ...]
    settings: Mapping[str, str]
    """The flat configuration without seeds and paths; empty where there is none."""

    @property
    def longest(self) -> Run:
        """The run with the most steps: it stands for the group where one has to."""
        return max(self.runs, key=lambda run: run.steps)

    @property
    def accuracy(self) -> str | None:
        return next((run.accuracy for run in self.runs if run.accuracy), None)

    @property
    def curve(self) -> dict[int, float]:
        """Held-out accuracy by evaluated step."""
        return self.mean(self.accuracy) if self.accuracy else {}

    def mean(self, column: str) -> dict[int, float]:
        """At each step over the runs that have a value there."""
        return mean_curve([run.column(column) for run in self.runs])


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """{1: 0.2, 2: 0.4} and {1: 0.4} give {1: 0.3, 2: 0.4}."""
    steps = sorted({step for curve in curves for step in curve})
    values = {step: [curve[step] for curve in curves if step in curve] for step in steps}
    return {step: math.fsum(found) / len(found) for step, found in values.items()}


def flatten(config: Any, key: str = "") -> dict[str, str]:
    """A configuration as dotted keys and JSON values; {class_path: a.B, init_args: {c: 1}} at k is k = B, k.c = 1."""
    if isinstance(config, Mapping) and isinstance(config.get("class_path"), str):
        found = {key: _short(config["class_path"])}
        rest = {k: v for k, v in config.items() if k not in ("class_path", "init_args")}
        for part in (rest, config.get("init_args") or {}):
            found |= {k: v for k, v in flatten(part, key).items() if k != key}
        return found
    if isinstance(config, Mapping) and config:
        return {k: v for name, value in config.items() for k, v in flatten(value, _join(key, str(name))).items()}
    if isinstance(config, list) and any(isinstance(item, Mapping) for item in config):
        found, names = {}, []
        for item in config:
            name = _short(str(item["class_path"])) if isinstance(item, Mapping) and "class_path" in item else "item"
            names.append(name)
            number = f"#{names.count(name)}" if names.count(name) > 1 else ""
            inner = _join(key, name + number)
            found |= {k: v for k, v in flatten(item, inner).items() if k != inner}
        return {key: ", ".join(names)} | found
    return {key: config if isinstance(config, str) else json.dumps(config, default=str)}


def _short(path: str) -> str:
    """Of a class of ours or of torch its name alone; another's has to keep its module to be told from ours."""
    ours = path.startswith(("prerl_lightning.", "torch.", "lightning."))
    return path.rpartition(".")[2] if ours else path


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def settings(run: Run) -> dict[str, str]:
    """The flat configuration without what may differ within a group."""
    flat = flatten(run.config) if run.config else {}
    return {k: v for k, v in flat.items() if not any(k == s or k.startswith(s + ".") for s in NOWHERE)}


def group(runs: Iterable[Run]) -> list[Group]:
    """Groups in the order of their first runs, under names that tell them apart."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        flat = settings(run)
        found.setdefault(tuple(sorted(flat.items())) if flat else object(), []).append(run)
    groups = [(members, settings(members[0])) for members in found.values()]
    names = _names(groups)
    return [Group(name, tuple(members), flat) for name, (members, flat) in zip(names, groups, strict=True)]


def _names(groups: Sequence[tuple[list[Run], dict[str, str]]]) -> list[str]:
    """The run's name; where several groups have it, with up to three settings in which they differ, else a version."""
    bases = [members[0].name for members, _ in groups]
    names = []
    for (members, flat), base in zip(groups, bases, strict=True):
        alike = [other for (_, other), b in zip(groups, bases, strict=True) if b == base]
        differing = diff(alike) if len(alike) > 1 and all(alike) else []
        # a setting that all have says more than one that a version of the library brought
        keys = [key for key, _ in sorted(differing, key=lambda row: None in row[1])]
        said = ", ".join(f"{key.rpartition('.')[2]} {_brief(flat[key])}" for key in keys[:3] if key in flat)
        version = f" {members[0].version}" if members[0].version else ""
        names.append(f"{base} ({said})" if said else base + version if len(alike) > 1 else base)
    return [f"{n} · {i + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _brief(value: str) -> str:
    """3.0000000000000004e-05 is 3e-05."""
    try:
        return value if value.isdigit() else f"{float(value):.6g}"
    except ValueError:
        return value if len(value) <= 24 else f"{value[:23]}…"


def diff(sides: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str | None]]]:
    """Keys whose values are not the same on all sides, and the values; None: the side has no such key."""
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = [(key, [side.get(key) for side in sides]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def inherited(key: str, sides: Sequence[Mapping[str, str]]) -> bool:
    """A successor's setting that some sides lack, and that says the same as the first life's, or null, where it is."""
    _, found, name = key.partition(".successor.")
    given = [side for side in sides if key in side]
    return bool(found) and len(given) < len(sides) and all(s[key] in (s.get(f"model.{name}"), "null") for s in given)


def target(curve: Mapping[int, float], share: float) -> float | None:
    """The accuracy at ``share`` of what a curve gains from its first to its best value; None where it gains nothing."""
    if not curve:
        return None
    first, best = curve[min(curve)], max(curve.values())
    return first + share * (best - first) if best > first else None


def steps_to(curve: Mapping[int, float], target: float) -> float | None:
    """Where the curve, straight between evaluated steps, first has the target; None: never."""
    points = sorted(curve.items())
    if points and points[0][1] >= target:
        return float(points[0][0])
    for (a, low), (b, high) in pairwise(points):
        if low < target <= high:
            return a + (b - a) * (target - low) / (high - low)
    return None


@dataclass(frozen=True)
class Reached:
    """The first evaluated step with at least so much accuracy. The true one lies behind `before`, the step evaluated
    before it."""

    step: int
    before: int
    samples: float | None
    seconds: float | None


def first_reaching(curve: Mapping[int, float], target: float) -> tuple[int, int] | None:
    """(first step with at least the target, the evaluated step before it); None: never."""
    before = None
    for step, value in sorted(curve.items()):
        if value >= target - 1e-9:
            return step, step if before is None else before
        before = step
    return None


def reached(runs: Sequence[Run], column: str, target: float) -> Reached | None:
    """By the runs' mean curve; samples and seconds at that step are means over the runs."""
    found = first_reaching(mean_curve([run.column(column) for run in runs]), target)
    if found is None:
        return None
    step, before = found
    at = [(run.samples_seen.get(step), run.seconds.get(step)) for run in runs]
    return Reached(step, before, _mean(a[0] for a in at), _mean(a[1] for a in at))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


@dataclass(frozen=True)
class Ratio:
    """How much sooner a group reaches the baseline's accuracy: baseline's steps / its steps; 2.0 is twice as soon."""

    group: str
    baseline: str
    kind: str
    """best or last: which of the baseline's accuracies is the target; own best: the group's, of `comparable`."""
    target: float
    of_baseline: Reached
    of_group: Reached | None
    seeds: tuple[float | None, ...]
    """The ratio of each of the group's runs by itself; None: it never gets there."""

    @property
    def steps(self) -> float | None:
        return _over(self.of_baseline.step, self.of_group.step if self.of_group else None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What the ratio of steps may be, since both are known to within one interval of evaluation."""
        if self.of_group is None or not self.of_group.step:
            return None
        high = self.of_baseline.step / self.of_group.before if self.of_group.before else math.inf
        return self.of_baseline.before / self.of_group.step, high

    @property
    def samples(self) -> float | None:
        return _over(self.of_baseline.samples, self.of_group.samples if self.of_group else None)

    @property
    def seconds(self) -> float | None:
        return _over(self.of_baseline.seconds, self.of_group.seconds if self.of_group else None)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def baseline(groups: Sequence[Group]) -> Group:
    """The first group that is GRPO from beginning to end, else the first."""
    evaluated = [g for g in groups if g.curve] or groups
    return next((g for g in evaluated if chain(g.longest) == "GRPO"), evaluated[0])


def why_baseline(groups: Sequence[Group], base: Group) -> str:
    """By which of the rules of `baseline` it is the one."""
    if chain(base.longest) != "GRPO":
        return "the first given"
    others = any(chain(g.longest) == "GRPO" for g in groups if g is not base)
    return "the first given that is GRPO throughout" if others else "GRPO throughout"


def ratios(base: Group, other: Group) -> list[Ratio]:
    """For the baseline's best and last held-out accuracy; empty where either has none, one where both are the same."""
    curve, column, own = base.curve, base.accuracy, other.accuracy
    if not curve or column is None or own is None or own != column:
        return []
    targets = {"best": max(curve.values()), "last": curve[max(curve)]}
    found = []
    for kind, target in targets.items():
        there = reached(base.runs, column, target)
        assert there is not None
        seeds = []
        for run in other.runs:
            if run.column(own):
                own_step = reached([run], own, target)
                seeds.append(_over(there.step, own_step.step) if own_step else None)
        of_other = reached(other.runs, own, target)
        found.append(Ratio(other.name, base.name, kind, target, there, of_other, tuple(seeds)))
    return found[:1] if targets["best"] == targets["last"] else found


def comparable(base: Group, other: Group) -> list[Ratio]:
    """`ratios`; in the place of those that the other group never reaches one for its own best accuracy, which the
    baseline does reach."""
    found = ratios(base, other)
    back = next(iter(ratios(other, base)), None)
    if back is None or back.of_group is None or all(ratio.of_group for ratio in found):
        return found
    own = Ratio(other.name, base.name, "own best", back.target, back.of_group, back.of_baseline, ())
    return [own, *(ratio for ratio in found if ratio.of_group)]
