"""Numbers and runs in words, for the page and the terminal."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prerl_lightning.report.compare import Group
from prerl_lightning.report.runs import Run


def duration(seconds: float | None) -> str:
    """65 is 1 min 5 s."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def steps(number: int) -> str:
    return f"{number:,} step{'s' if number != 1 else ''}"


def count(value: float | None) -> str:
    """857344 is 0.86 M."""
    if value is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size * 0.1 and value >= 1e5:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def figure(value: float | None, digits: int = 3) -> str:
    """0.36328 is 0.363; large and small ones keep three digits."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits - 1}e}" if abs(value) < 1e-3 else f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"


def spread(values: Iterable[float], digits: int = 3) -> str:
    """0.1 to 0.3"""
    known = list(values)
    return f"{figure(min(known), digits)} to {figure(max(known), digits)}"


def model(run: Run) -> str:
    said = run.info.get("model") or ((run.config.get("model") or {}).get("init_args") or {}).get("model")
    parameters = run.info.get("parameters")
    known = f" ({count(parameters)} parameters)" if isinstance(parameters, int | float) else ""
    return f"{said or 'unknown model'}{known}"


def problems(run: Run, which: str) -> str | None:
    """data.train or data.val in a few words: ArithmeticProblems (train, 4,096)."""
    part = (run.config.get("data") or {}).get(which)
    if not isinstance(part, Mapping) or not part.get("class_path"):
        return None
    given = part.get("init_args") or {}
    named = [str(given[k]) for k in ("name", "path", "config", "split", "task") if given.get(k)]
    size = next((f"{given[k]:,}" for k in ("size", "limit") if isinstance(given.get(k), int)), None)
    inside = ", ".join([*named, size] if size else named)
    return str(part["class_path"]).rpartition(".")[2] + (f" ({inside})" if inside else "")


def machine(run: Run) -> str | None:
    said = run.info.get("machine")
    if not isinstance(said, Mapping):
        return None
    gpus = [str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in said.get("gpus") or []]
    parts = [", ".join(f"{gpus.count(g)} \u00d7 {g}" for g in dict.fromkeys(gpus))] if gpus else []
    parts += [str(said["cpu"])] if said.get("cpu") else []
    parts += [f"{said['cores']} cores"] if said.get("cores") else []
    parts += [f"{said['memory_gib']:.3g} GiB"] if isinstance(said.get("memory_gib"), int | float) else []
    return ", ".join(parts) or None


def first_last(runs: Iterable[Run], column: str) -> tuple[tuple[int, list[float]], tuple[int, list[float]]] | None:
    """(first step, the runs' values there), (last step, values): each run's own first and last."""
    curves = [curve for run in runs if (curve := run.column(column))]
    if not curves:
        return None
    first, last = min(min(c) for c in curves), max(max(c) for c in curves)
    return (first, [c[min(c)] for c in curves]), (last, [c[max(c)] for c in curves])


def with_interval(group: Group, column: str, step: int, values: list[float]) -> str:
    """One run: its value and 95 % interval; several: the mean and the range over runs."""
    mean = math.fsum(values) / len(values)
    if len(values) > 1:
        return f"{figure(mean)} ({spread(values)})"
    run = next(r for r in group.runs if step in r.column(column))
    low, high = (run.column(f"{column}/{end}").get(step) for end in ("low", "high"))
    return figure(mean) if low is None or high is None else f"{figure(mean)} [{figure(low)}, {figure(high)}]"


def facts(group: Group) -> dict[str, Any]:
    """What the headline says of a group: totals are means over its runs."""
    runs = group.runs

    def mean(values: list[float]) -> float | None:
        return math.fsum(values) / len(values) if values else None

    return {
        "steps": max(run.steps for run in runs),
        "responses": mean([max(run.samples_seen.values()) for run in runs]),
        "seconds": mean([max(run.seconds.values()) for run in runs]),
        "accuracy": first_last(runs, group.accuracy) if group.accuracy else None,
        "reward": first_last(runs, "reward/mean"),
    }
