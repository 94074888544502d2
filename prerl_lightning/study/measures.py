"""A measure of one run, over the held-out problems as they are and over resampled ones.

D draws: the first weighs each problem once and gives the run's figure, the others are resamples, the same for all runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prerl_lightning.report.runs import Run
from prerl_lightning.study.design import Measure

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    values: Array
    """(D,); nan where a draw has none."""
    problems: tuple[int, ...] | None = None
    """The held-out problems that were resampled; None: the measure has none, or held_out.jsonl lacks a step."""
    censored: bool = False
    """The run never reaches the accuracy: its last step stands for a later one."""
    counted: tuple[int, int] | None = None
    """Of a share: how many of how many responses."""
    missing: str = ""
    """Why there is no figure."""


@dataclass(frozen=True)
class Curve:
    """``values``: (S, D), by evaluated step."""

    steps: Array
    values: Array
    problems: tuple[int, ...] | None


def draws(problems: int, resamples: int, seed: int = 0) -> Array:
    """(1 + resamples, problems): how often each problem is in a draw."""
    found = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    return np.concatenate([np.ones((1, problems)), found.astype(np.float64)])


def measure(run: Run, what: Measure, weights: Array, target: Array | None = None) -> Measured:
    """``weights``: of `draws`. ``target``: (D,), the accuracy of steps_to_accuracy."""
    if what.name in ("negative_share", "cosine"):
        return _of_alignment(run, what, len(weights))
    curve = _curve(run, what, weights)
    if not len(curve.steps):
        return _none(len(weights), f"metrics.csv has no {' or '.join(columns(run, what))}")
    if what.name == "steps_to_accuracy":
        assert target is not None
        reached = steps_to(curve.steps, curve.values, target)
        never = np.isnan(reached) & ~np.isnan(target)
        return Measured(np.where(never, curve.steps[-1], reached), curve.problems, bool(never[0]))
    at = what.options.get("at", curve.steps[-1])
    found = np.flatnonzero(curve.steps == at)
    if not len(found):
        return _none(len(weights), f"step {at} was not evaluated")
    values = curve.values[found[0]]
    if np.isnan(values[0]):
        return _none(len(weights), f"there is no {what.options.get('family')} at step 0 to compare with")
    return Measured(values, curve.problems)


def columns(run: Run | None, what: Measure) -> list[str]:
    """Of metrics.csv, in which the figure is to be found."""
    accuracy = (run.accuracy if run else None) or "val/avg@K"
    if what.name == "pass_at_k":
        return [f"val/pass@{what.options.get('k') or accuracy.rpartition('@')[2]}"]
    if what.name == "thoughts":
        return [f"val/thoughts/{what.options['family']}{'' if what.options.get('of') == 'count' else '_ratio'}"]
    return [accuracy]


def source(run: Run | None, what: Measure) -> str:
    """The files and columns of a measure, for whoever wants to see where a number is from."""
    if what.name == "negative_share":
        return "alignment.jsonl: inner_product"
    if what.name == "cosine":
        own = what.options.get("of") == "policy_gradient"
        return "metrics.csv: alignment/policy_gradient/cosine" if own else "alignment.jsonl: cosine"
    field = {"pass_at_k": "right", "thoughts": f"thoughts.{what.options.get('family')}"}.get(what.name, "score")
    return f"metrics.csv: {', '.join(columns(run, what))}, val/step; held_out.jsonl: {field}"


def accuracy(run: Run, weights: Array) -> Curve:
    return _curve(run, Measure("accuracy", {}), weights)


def target(curves: Sequence[Curve], share: float) -> Array:
    """(D,): the accuracy at ``share`` of what the mean curve gains from its first to its best value, as
    `report.compare.target`; nan where it gains nothing."""
    steps = [s for s in curves[0].steps if all(s in curve.steps for curve in curves)]
    mean = np.mean([curve.values[np.isin(curve.steps, steps)] for curve in curves], axis=0)
    first, best = mean[0], mean.max(axis=0)
    return np.where(best > first, first + share * (best - first), np.nan)


def steps_to(steps: Array, values: Array, target: Array) -> Array:
    """(D,) of (S,), (S, D) and (D,), as `report.compare.steps_to`; nan: never."""
    found = np.full(values.shape[1], np.nan)
    for i in reversed(range(1, len(steps))):
        low, high = values[i - 1], values[i]
        crosses = (low < target) & (target <= high)
        share = (target - low)[crosses] / (high - low)[crosses]
        found[crosses] = steps[i - 1] + (steps[i] - steps[i - 1]) * share
    return np.where(values[0] >= target, steps[0], found)


def _curve(run: Run, what: Measure, weights: Array) -> Curve:
    """From held_out.jsonl where it has every evaluated step of these problems, else without resamples."""
    column = columns(run, what)[0]
    known = run.column(column) if run.accuracy else {}
    # a family without any thought at step 0 has no ratio, and yet its counts
    steps = sorted(known or (run.column(run.accuracy) if run.accuracy else {}))
    lines = [run.held_out.get(step) for step in steps]
    rows = tuple(lines[0]["rows"]) if lines and lines[0] else ()
    of_problem = _of_problem(what)
    if rows and len(rows) == weights.shape[1] and all(line and tuple(line["rows"]) == rows for line in lines):
        try:
            by_problem = np.array([of_problem(line) for line in lines if line], dtype=np.float64)
        except (KeyError, ValueError):  # thoughts that were not counted, more samples than there are
            return Curve(np.array([]), np.empty((0, len(weights))), None)
        values = by_problem @ weights.T / weights.sum(axis=1)
        problems: tuple[int, ...] | None = rows
    else:
        steps = sorted(known)
        values = np.repeat(np.array([[known[step]] for step in steps]), len(weights), axis=1)
        problems = None
    if problems and what.name == "thoughts" and what.options.get("of", "ratio") == "ratio":
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(values[0] > 0, values / values[0], np.nan)
        if steps[0] != 0:
            return Curve(np.array([]), np.empty((0, len(weights))), None)
    return Curve(np.array(steps, dtype=np.float64), values, problems)


def _of_problem(what: Measure) -> Callable[[Mapping[str, Any]], Array]:
    """From a line of held_out.jsonl to each problem's value, of which the measure is the mean."""
    if what.name == "thoughts":
        return lambda line: np.array(line["thoughts"][what.options["family"]]) / line["k"]
    if what.name == "pass_at_k":

        def passes(line: Mapping[str, Any]) -> Array:
            n = line["k"]
            k = what.options.get("k") or n
            if k > n:
                raise ValueError(k)
            return np.array([1 - comb(n - c, k) / comb(n, k) for c in range(n + 1)])[line["right"]]

        return passes
    return lambda line: np.array(line["score"]) / line["k"]


def _of_alignment(run: Run, what: Measure, n_draws: int) -> Measured:
    """Of single responses, of all steps or of one: alignment.jsonl knows no problems."""
    at = what.options.get("at")
    where = "" if at is None else f" of step {at}"
    if what.options.get("of") == "policy_gradient":
        curve = run.column("alignment/policy_gradient/cosine")
        found = [value for step, value in curve.items() if at in (None, step)]
        name = "metrics.csv has no alignment/policy_gradient/cosine"
    else:
        rows = [row for row in run.alignment if at in (None, row["step"])]
        key = "cosine" if what.name == "cosine" else "inner_product"
        found = [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]
        name = f"alignment.jsonl has no {key}"
    if not found:
        return _none(n_draws, name + where)
    values, counted = np.array(found), None
    if what.name == "negative_share":
        values = (values < 0).astype(np.float64)
        counted = int(values.sum()), len(values)
    return Measured(np.full(n_draws, values.mean()), counted=counted)


def _none(n_draws: int, why: str) -> Measured:
    return Measured(np.full(n_draws, np.nan), missing=why)
