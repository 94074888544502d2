"""Runs that differ in seeds alone as one group; what differs between groups; how soon each reaches an accuracy."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from prerl_lightning.report.runs import Run, chain

# what may differ between runs of one group: seeds, and where files are
SEEDS = ("seed_everything", "data.seed", "trainer.logger", "trainer.default_root_dir", "checkpoint.dirpath")
NOWHERE = (*SEEDS, "ckpt_path", "config")
SHARES = (0.5, 0.8, 0.95)  # of the baseline's gain


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
    def counted(self) -> tuple[Run, ...]:
        """Those that totals are of: the finished ones, where there are none those with a step, and else all. What the
        others took says when they ended, not what the setting takes."""
        finished = tuple(run for run in self.runs if run.status()[0] in ("finished", "stopped"))
        return finished or tuple(run for run in self.runs if run.steps) or self.runs

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
        # a setting that all have says more than one that a version of the library brought, and a name says most
        keys = [key for key, _ in sorted(differing, key=lambda row: (row[0] != "model.name", None in row[1]))]
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
class Pair:
    """A seed's runs in both settings, or their mean curves: the step at which each has the target; None: never."""

    baseline: float | None
    group: float | None
    order: int
    """1: the setting is sooner, -1: later, 0: at the same step, or what is known does not tell."""
    seconds: float | None
    """The baseline's wall time over the setting's."""

    @property
    def ratio(self) -> float | None:
        """The baseline's steps over the setting's; 2.0 is twice as soon."""
        return self.baseline / self.group if self.baseline and self.group else None


@dataclass(frozen=True)
class Sooner:
    """How soon a setting has a share of what the baseline's mean curve gains, beside the baseline."""

    share: float
    target: float
    seeds: tuple[int, ...]
    """Of the pairs, in order; empty: no seed is in both settings, and the one pair is of their mean curves."""
    pairs: tuple[Pair, ...]

    @property
    def ratios(self) -> list[float]:
        """Of the pairs in which both get there."""
        return [pair.ratio for pair in self.pairs if pair.ratio is not None]

    @property
    def mean(self) -> float | None:
        return geometric(self.ratios)

    @property
    def order(self) -> int:
        """That of all pairs, if they agree; else 0. Curves of different seeds do not tell."""
        found = {pair.order for pair in self.pairs}
        return found.pop() if self.seeds and len(found) == 1 else 0


def geometric(ratios: Sequence[float]) -> float | None:
    """Of 2 and 0.5 the mean is 1."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None


def sooner(base: Group, other: Group) -> list[Sooner]:
    """By `SHARES`; empty where accuracies are not of one measure, or the baseline's never rises."""
    if other.accuracy != base.accuracy or not other.curve:
        return []
    mine, theirs = _by_seed(other), _by_seed(base)
    seeds = tuple(sorted(mine.keys() & theirs.keys()))
    sides = [(theirs[seed], mine[seed]) for seed in seeds] or [(base, other)]
    goals = [(share, target(base.curve, share)) for share in SHARES]
    return [Sooner(share, g, seeds, tuple(_pair(*both, g) for both in sides)) for share, g in goals if g is not None]


def last_differences(base: Group, other: Group) -> list[float]:
    """Of the last held-out accuracies, ``other``'s less the baseline's, of each seed of which both have a run that
    counts (`Group.counted`)."""
    mine, theirs = (_by_seed(replace(group, runs=group.counted)) for group in (other, base))
    ends = [[of[seed].curve for of in (mine, theirs)] for seed in sorted(mine.keys() & theirs.keys())]
    return [a[max(a)] - b[max(b)] for a, b in ends if a and b]


def _by_seed(group: Group) -> dict[int, Group]:
    """The evaluated runs of each seed; those without one are left out."""
    found: dict[int, list[Run]] = {}
    for run in group.runs:
        if run.seed is not None and run.accuracy == group.accuracy:
            found.setdefault(run.seed, []).append(run)
    return {seed: replace(group, runs=tuple(runs)) for seed, runs in found.items()}


def _pair(base: Group, other: Group, goal: float) -> Pair:
    a, b = (steps_to(group.curve, goal) for group in (base, other))
    order = 0  # a run that never has it might have had it later: it tells only if it went on for as long as the other
    if b is not None and (a > b if a is not None else max(base.curve) >= b):
        order = 1
    elif a is not None and (b > a if b is not None else max(other.curve) >= a):
        order = -1
    times = [_seconds(group, step) for group, step in ((base, a), (other, b))]
    return Pair(a, b, order, times[0] / times[1] if times[0] and times[1] else None)


def _seconds(group: Group, step: float | None) -> float | None:
    """Of wall time until a step, straight between those logged; the mean over runs."""
    if step is None:
        return None
    found = []
    for seconds in (run.seconds for run in group.runs):
        low, high = max(s for s in seconds if s <= step), min((s for s in seconds if s >= step), default=None)
        if high is not None:
            part = (step - low) / (high - low) if high > low else 0.0
            found.append(seconds[low] + part * (seconds[high] - seconds[low]))
    return math.fsum(found) / len(found) if found else None


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
