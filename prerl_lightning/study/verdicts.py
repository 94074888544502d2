"""Whether the runs support a claim, refute it, or leave it undecided.

Seeds are paired: seed s of one arm is compared with seed s of the other. The interval is Student's t over the seeds'
effects (of ratios, their logs), its variance widened by that of the mean effect over resampled held-out problems: the
seeds are evaluated on the same problems, and alone say nothing of others,

    effect +- t(n - 1) * sqrt(s^2 / n + variance over problems beyond what s has)

at the level 1 - 0.05 / number of claims, so that all intervals of a study hold together in 95 % of studies. Verdicts
are read from the interval, and so agree with it: supported, if all of it lies beyond the margin on the side expected;
refuted, if all of it lies on the other side; else undecided.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prerl_lightning.metrics.student import t_quantile
from prerl_lightning.report.runs import Run
from prerl_lightning.report.words import figure
from prerl_lightning.study.design import Claim, Measure
from prerl_lightning.study.measures import Array, Measured, accuracy, draws, measure, target

RESAMPLES = 1000


@dataclass(frozen=True)
class OfSeed:
    """``effect``: a ratio or a difference; None: there is none."""

    seed: int
    arm: float | None
    against: float | None
    effect: float | None


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    verdict: str
    """supported, refuted or undecided."""
    why: str
    level: float
    effect: float | None
    low: float | None
    high: float | None
    seeds: tuple[OfSeed, ...]
    missing: tuple[str, ...]
    """Runs that there is no figure of, and why."""
    censored: tuple[int, int]
    """Runs of the arm, and of the one it is compared with, that never reach the accuracy."""
    target: float | None
    """The accuracy to which steps are counted."""
    problems: int | None
    """Held-out problems that were resampled; None: the interval is over seeds alone."""
    of_problems: float
    """The part of the interval's variance that is theirs: where it is large more problems help, else more seeds."""


@dataclass(frozen=True)
class Side:
    """An arm's runs by seed; what has no run says why."""

    runs: Mapping[int, Run]
    absent: Mapping[int, str]


def judge(
    claim: Claim, level: float, seeds: Sequence[int], arm: Side, against: Side | None, resamples: int = RESAMPLES
) -> Verdict:
    """``against``: of claim.against. ``level``: of the interval, 0 to 1."""
    sides = [arm, against] if against else [arm]
    sets = {tuple(line["rows"]) for s in sides for run in s.runs.values() for line in run.held_out.values()}
    weights = draws(max(map(len, sets), default=1), resamples if sets else 1)
    goal = _goal(claim.measure, sides[-1], weights) if claim.measure.name == "steps_to_accuracy" else None
    found = [{s: measure(run, claim.measure, weights, goal) for s, run in side.runs.items()} for side in sides]
    pairs = {s: [of_side[s] for of_side in found] for s in seeds if all(s in of_side for of_side in found)}
    effects = {s: _effect(claim, pair) for s, pair in pairs.items()}
    there = {s: e for s, e in effects.items() if math.isfinite(e[0])}
    missing = [
        f"{name} seed {seed}: {why}"
        for name, side, of_side in zip((claim.arm, claim.against), sides, found, strict=False)
        for seed in seeds
        if (why := side.absent.get(seed) or (of_side[seed].missing if seed in of_side else "no run"))
    ]
    missing += [
        f"seed {s}: of {' and '.join(figure(_number(one.values[0])) for one in pair)} there is no {claim.effect}"
        for s, pair in pairs.items()
        if s not in there and not any(one.missing for one in pair)
    ]
    counts = [sum(one.censored for one in of_side.values()) for of_side in found]
    known = {one.problems for s in there for one in pairs[s]}
    resampled = len(known) == 1 and None not in known
    middle, half, of_problems = _interval(
        *(list(there.values()), [pairs[s] for s in there], level, resampled, claim.effect == "ratio")
    )
    verdict = Verdict(
        claim,
        "undecided",
        "",
        level,
        _told(claim, middle),
        _told(claim, middle - half),
        _told(claim, middle + half),
        tuple(
            OfSeed(s, _number(p[0].values[0]), _number(p[1].values[0]) if against else None, _told(claim, e[0]))
            for s, (p, e) in {s: (pairs[s], effects[s]) for s in pairs}.items()
        ),
        tuple(missing),
        (counts[0], counts[1] if against else 0),
        _number(goal[0]) if goal is not None else None,
        len(next(iter(known)) or ()) if resampled else None,
        of_problems,
    )
    if missing:
        return replace(verdict, why=f"incomplete: {'; '.join(missing)}")
    if len(there) < 2:
        return replace(verdict, why="one seed shows no spread over seeds: give two or more")
    if len(sets) > 1:
        return replace(verdict, why="the runs were evaluated on different held-out problems")
    decided, why = _decide(verdict, len(there))
    return replace(verdict, verdict=decided, why=why)


def _decide(found: Verdict, n: int) -> tuple[str, str]:
    """The verdict, and why."""
    claim, censored = found.claim, found.censored
    assert found.low is not None
    assert found.high is not None
    above, below = found.low > claim.margin, found.high < claim.margin
    if claim.measure.name == "steps_to_accuracy":
        # a step that stands for a later one makes the effect look larger (its own arm's) or smaller (the other's)
        mine, other = (count > n - count for count in censored)
        hides_above, hides_below = (mine, other) if claim.against else (False, mine)
        if (above and hides_above) or (below and hides_below):
            return "undecided", "most runs of an arm never reach the accuracy: their last step is a bound"
    if not above and not below:
        return "undecided", f"the interval holds the margin, {figure(claim.margin)}"
    side = f"all of the interval is {'above' if above else 'below'} the margin, {figure(claim.margin)}"
    return ("supported" if above == claim.more else "refuted"), side


def _goal(what: Measure, baseline: Side, weights: Array) -> Array:
    """(D,): the accuracy to which steps are counted."""
    if "accuracy" in what.options:
        return np.full(len(weights), float(what.options["accuracy"]))
    curves = [c for run in baseline.runs.values() if len((c := accuracy(run, weights)).steps)]
    return target(curves, what.options["share"]) if curves else np.full(len(weights), np.nan)


def _effect(claim: Claim, pair: Sequence[Measured]) -> Array:
    """(D,) of one seed; of a ratio its log. Steps count the other way round: more is sooner."""
    values = [one.values for one in pair]
    if claim.measure.name == "steps_to_accuracy" and claim.against:
        values.reverse()
    if claim.effect == "ratio":
        least = 1.0 if claim.measure.name == "steps_to_accuracy" else 0.0  # reached at once is reached at step 1
        with np.errstate(divide="ignore", invalid="ignore"):
            values = [np.log(np.maximum(v, least)) for v in values]
            values = [np.where(np.isfinite(v), v, np.nan) for v in values]
    return values[0] - values[1] if len(values) > 1 else values[0]


def _interval(
    effects: Sequence[Array], pairs: Sequence[Sequence[Measured]], level: float, resampled: bool, ratio: bool
) -> tuple[float, float, float]:
    """The mean of the effects as they are (ratios: logs), half the interval, and the problems' part of its variance;
    nan without two seeds."""
    n = len(effects)
    if not n:
        return math.nan, math.nan, 0.0
    by_draw = np.mean(effects, axis=0)
    mean = float(by_draw[0])
    if n < 2:
        return mean, math.nan, 0.0
    over_seeds = float(np.var([e[0] for e in effects], ddof=1)) / n
    over_seeds = max(over_seeds, sum(_of_share(side, ratio) for side in zip(*pairs, strict=True)))
    of_mean, over_problems = _over_problems(np.array(effects)[:, 1:]) if resampled else (0.0, 0.0)
    # two seeds may agree by chance, and would have no spread at all
    variance = max(over_seeds + over_problems, of_mean)
    part = 1 - over_seeds / variance if variance else 0.0
    return mean, t_quantile(level, n - 1) * math.sqrt(variance), part


def _over_problems(effects: Array) -> tuple[float, float]:
    """The variance of the mean effect over resampled problems, and the part of it that the spread over seeds lacks, of
    (n, D - 1) effects.

    Resampling problems moves the mean by what they differ in, and by each run's own luck on each of them. That luck is
    in the spread over seeds already; it moves single seeds by n times the variance of their mean, which tells its part.
    """
    known = effects[:, np.isfinite(effects).all(axis=0)]
    n, resamples = known.shape
    if resamples < 2:
        return 0.0, 0.0
    of_mean = float(np.var(known.mean(axis=0), ddof=1))
    of_seeds = float(np.var(known, axis=1, ddof=1).mean())
    return of_mean, max(0.0, of_mean - (of_seeds - of_mean) / (n - 1))


def _of_share(side: Sequence[Measured], ratio: bool) -> float:
    """The variance of a share over the responses of all seeds, or of its log: none of twenty in each is not never (the
    estimate is Agresti and Coull's)."""
    counted = [one.counted for one in side if one.counted]
    total = sum(n for _, n in counted)
    share = (sum(x for x, _ in counted) + 2) / (total + 4)
    return (1 - share) * (1 / share if ratio else share) / total if total else 0.0


def _told(claim: Claim, value: float) -> float | None:
    return _number(math.exp(value) if claim.effect == "ratio" else value)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
