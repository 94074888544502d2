"""The page's data as JSON, thinned evenly until it fits.

Curves of one run that have values at the same steps share a table, with its steps, samples and seconds. A stride is the
same for a column in all runs, so that means over seeds keep having all seeds at a step.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prerl_lightning.report.compare import Group
from prerl_lightning.report.figures import Figure
from prerl_lightning.report.files import is_right, spans
from prerl_lightning.report.runs import Run, objective

# bytes of JSON, about; samples have what curves leave of theirs, too
CURVES, SAMPLES, POINTS = 2_300_000, 1_000_000, 66_000
POINTS_A_CURVE = 500
BYTES_A_NUMBER = 7.5
ENOUGH = 25  # points: with fewer a curve says too little, and whole sections go, in this order
DROPPED = ("other", "time", "health", "alignment", "thoughts")
CHARACTERS = 8_000  # of a prompt or response
DENSE = 0.5  # columns with a value in so many of the rows share the table of all rows


def payload(
    groups: Sequence[Group], figures: Sequence[Figure], families: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What page.js reads, and sentences on what was left out."""
    runs = [run for group in groups for run in group.runs]
    wanted = {c: f.section for f in figures for c in f.columns}
    intervals = {f"{c}{end}": wanted[c] for c in list(wanted) if c.startswith("val/") for end in ("/low", "/high")}
    columns = wanted | intervals
    counts = {c: [len(run.column(c)) for run in runs] for c in columns}
    limit, columns, left_out = _limit(columns, counts)
    strides = {c: max(1, math.ceil(max(counts[c]) / limit)) for c in columns}
    thinned = max(strides.values(), default=1)
    if thinned > 1:
        left_out.append(f"Of the longest curves every {_nth(thinned)} point is drawn, and the last.")
    not_finite = _not_finite(runs)
    if not_finite:
        left_out.append(f"Values that are not finite are left out: {not_finite}.")
    points, more = _points(runs)
    drawn = [
        {
            "name": f"{run.name} {run.version}".strip(),
            "steps": run.steps,
            # and why the one before ended, where that was ahead of its time
            "lives": [[*life, run.endings.get(i)] for i, life in enumerate(run.lives)],
            "tables": _tables(run, columns, strides),
            "points": points[i],
        }
        for i, run in enumerate(runs)
    ]
    samples, said = _samples(runs, max(SAMPLES, CURVES + SAMPLES - len(to_json(drawn))))
    data = {
        "groups": [{"name": g.name, "runs": [runs.index(r) for r in g.runs]} for g in groups],
        "runs": drawn,
        "figures": {
            f.key: {
                "title": f.title, "series": f.series, "views": f.views, "format": f.format,
                "zero": f.zero, "rule": f.rule, "kind": f.kind,
            }
            for f in figures
        },
        "families": list(families),
        "samples": samples,
    }  # fmt: skip
    return data, [*left_out, *said, *more]


def to_json(value: Any) -> str:
    """For a script element: nothing in it ends the element or starts a comment. A lone surrogate becomes a "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def _limit(columns: dict[str, str], counts: Mapping[str, list[int]]) -> tuple[int, dict[str, str], list[str]]:
    """Points a curve, and the columns, such that the curves take `CURVES` bytes."""

    def size(chosen: Mapping[str, str], limit: int) -> float:
        return BYTES_A_NUMBER * sum(min(n, limit) for c in chosen for n in counts[c])

    left_out = []
    for section in DROPPED:
        if size(columns, ENOUGH) > CURVES and section in columns.values():
            columns = {c: s for c, s in columns.items() if s != section}
            left_out.append(section)
    if left_out:
        left_out = [f"There are so many runs that the figures of these parts are left out: {', '.join(left_out)}."]
    limit = POINTS_A_CURVE
    while size(columns, limit) > CURVES and limit > 8:
        limit = int(limit * 0.9)
    return limit, columns, left_out


def _nth(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _not_finite(runs: Sequence[Run]) -> str:
    found: dict[str, int] = {}
    for run in runs:
        for rows in (run.training, run.validation):
            for row in rows.values():
                for name, value in row.items():
                    if not math.isfinite(value):
                        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} of {name}" for name, count in sorted(found.items()))


def _tables(run: Run, columns: Mapping[str, str], strides: Mapping[str, int]) -> list[dict[str, Any]]:
    """[{step, samples, seconds, share, columns: {name: values}}], all lists of a table of one length.

    share: of the training steps, such as have a value."""
    seen = run.samples_seen
    groups: dict[tuple[int, ...], dict[str, dict[int, float]]] = {}
    for name in columns:
        values = run.column(name)
        if not values:
            continue
        rows = run.validation if name.startswith("val/") else run.training
        steps = sorted(rows if len(values) >= DENSE * len(rows) else values)
        kept = tuple(s for i, s in enumerate(steps) if i % strides[name] == 0 or i == len(steps) - 1)
        groups.setdefault(kept, {})[name] = values
    return [
        {
            "step": list(steps),
            "samples": [round(seen[s]) if s in seen else None for s in steps],
            "seconds": [number(run.seconds.get(s)) for s in steps],
            "share": number(len(next(iter(found.values()))) / max(1, len(run.training))),
            "columns": {name: [number(values.get(s)) for s in steps] for name, values in found.items()},
        }
        for steps, found in groups.items()
    ]


def number(value: Any) -> float | int | None:
    """Five digits; None for what is no finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def evenly(count: int, kept: int) -> list[int]:
    """So many indices of range(count), the first and the last among them: evenly(5, 3) is [0, 2, 4]."""
    if kept >= count:
        return list(range(count))
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)] if kept > 1 else [0][:kept]


def _samples(runs: Sequence[Run], room: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Of each run the same number of steps, evenly, with all their samples: thinned line by line, whole prompts or
    kinds would fall out, since a step's samples come in the same order each time."""
    at = [_by_step(run.samples) for run in runs]
    sized = [
        {s: [len(to_json(_sample(0, one)).encode()) + 1 for one in found] for s, found in steps.items()} for steps in at
    ]
    kept = most = max((len(steps) for steps in at), default=0)
    each = deepest = max((len(found) for steps in at for found in steps.values()), default=0)

    def chosen(steps: Mapping[int, Sequence[Any]]) -> list[Any]:
        numbers = sorted(steps)
        there = [steps[numbers[i]] for i in evenly(len(numbers), kept)]
        return [found[i] for found in there for i in evenly(len(found), each)]

    while kept and each and sum(sum(chosen(steps)) for steps in sized) > room:
        if kept > 2:
            kept = max(2, int(kept * 0.8))
        else:
            each = int(each * 0.8)
    shown = [_sample(i, one) for i, steps in enumerate(at) for one in chosen(steps)]
    total = sum(len(run.samples) for run in runs)
    said = []
    if len(shown) < total:
        of = f"those of {kept:,} of {most:,} steps" if each == deepest else f"at most {each:,} of a step"
        said.append(f"{len(shown):,} of {total:,} samples are shown: {of}, evenly over each run.")
    cut = any(len(str(s.get(k, ""))) > CHARACTERS for run in runs for s in run.samples for k in ("prompt", "response"))
    if cut and shown:
        said.append(f"Prompts and responses are cut at {CHARACTERS:,} characters.")
    return shown, said


def _by_step(samples: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["step"], []).append(sample)
    return found


def _sample(run: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    previous = sample.get("previous") or None
    if isinstance(previous, Mapping):
        previous = {k: _cut(previous.get(k)) for k in ("step", "response", "reward")}
    keys = ("step", "life", "kind", "row", "prompt", "response", "ground_truth", "reward", "truncated", "tokens")
    thoughts = spans(sample)
    within = [span for span in thoughts if span[1] <= CHARACTERS]
    said = sample.get("objective")
    return {k: _cut(sample.get(k)) for k in keys} | {
        "run": run,
        "objective": objective(said) if isinstance(said, str) else None,
        "previous": previous,
        "thoughts": within,
        # of the whole response, where it is cut
        "counts": Counter(family for _, _, family in thoughts) if len(within) < len(thoughts) else None,
    }


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > CHARACTERS:
        return value[:CHARACTERS] + " […]"
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, int | str) else str(value)


def _points(runs: Sequence[Run]) -> tuple[list[list[list[Any]]], list[str]]:
    """[step, cosine, right, tokens] of single responses, for each run; samples and seconds are told from the step."""
    room = int(POINTS / 22 / max(1, len(runs)))
    found, total, kept = [], 0, 0
    for run in runs:
        chosen = [run.alignment[i] for i in evenly(len(run.alignment), min(room, 1000))]
        total, kept = total + len(run.alignment), kept + len(chosen)
        found.append(
            [[a["step"], number(a["cosine"]), int(is_right(a["reward"])), number(a.get("tokens"))] for a in chosen]
        )
    return found, [f"{kept:,} of {total:,} responses of alignment.jsonl are drawn."] if kept < total else []
