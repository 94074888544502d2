"""Tables that are made here, so that they are there without JavaScript: accuracy, steps to it, thoughts."""

import math
from collections.abc import Sequence
from html import escape

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group, Ratio
from prerl_lightning.report.html import NONE, TIMES, named, table, tag, times
from prerl_lightning.report.payload import evenly

PAIRS = 8  # groups of which every pair is compared


def accuracy_table(groups: Sequence[Group]) -> str:
    """By evaluated step; at most twelve steps, evenly."""
    steps = sorted({step for group in groups for step in group.curve})
    if not steps:
        return ""
    shown = [steps[i] for i in evenly(len(steps), 12)]
    rows = [[named(groups, g), *(words.figure(g.curve.get(s)) for s in shown)] for g in groups if g.curve]
    some = f" ({len(shown)} of {len(steps)} evaluations)" if len(shown) < len(steps) else ""
    columns = ", ".join(dict.fromkeys(f"{g.accuracy}" for g in groups if g.accuracy))
    inner = table(["step", *(f"{s:,}" for s in shown)], rows, f"Held-out accuracy by step, mean over runs{some}",
                  f"metrics.csv: {columns}")  # fmt: skip
    return tag("details", tag("summary", "As a table") + inner)


def ratio_table(groups: Sequence[Group], base: Group) -> str:
    """Steps to the baseline's accuracy; empty where there is nothing to compare."""
    rows = []
    for other in groups:
        for ratio in compare.ratios(base, other) if other is not base else []:
            at, there = ratio.of_group, ratio.of_baseline
            known = [s for s in ratio.seeds if s is not None]
            seeds = f"{min(known):.2f} to {max(known):.2f}{TIMES}" if len(known) > 1 else NONE
            never = len(ratio.seeds) - len(known)
            if len(ratio.seeds) > 1 and never:
                seeds = f"{seeds}; {never} of {len(ratio.seeds)} never" if known else "all never"
            rows.append([
                named(groups, other), f"{ratio.kind}, {words.figure(ratio.target)}", f"{there.step:,}",
                f"{at.step:,}" if at else "never reached", tag("b", times(ratio.steps)), _bounds(ratio),
                times(ratio.samples), times(ratio.seconds), seeds,
            ])  # fmt: skip
    if not rows:
        return ""
    short = escape(base.name) if len(base.name) <= 16 else "baseline"
    head = ["setting", f"{short}'s accuracy", f"steps: {short}", "steps: this one", "ratio",
            "between", "in samples", "in wall time", "single runs"]  # fmt: skip
    caption = f"How much sooner each setting reaches the held-out accuracy of {base.name}: its steps over the setting's"
    evaluated = {b - a for g in groups for a, b in zip(sorted(g.curve), sorted(g.curve)[1:], strict=False)}
    every = words.spread(evaluated, 0) if len(evaluated) > 1 else f"{next(iter(evaluated), 0):,}"
    note = (
        "The target is the best, and the last, accuracy of the baseline's curve, a mean over its runs where there are "
        "several. Counted is the first evaluated step at which a setting's own mean curve is at or above it, without "
        f"interpolation. There are {every} steps between evaluations, so either count may be too high by up to that "
        "much: 'between' is what the ratio can be. 'single runs': each run's own curve against the same target. "
        f"Above 1{TIMES}: sooner than the baseline."
    )
    others = [g for g in groups if g.accuracy and g.accuracy != base.accuracy]
    if others:
        note += f" Not compared, since measured otherwise: {', '.join(f'{g.name} ({g.accuracy})' for g in others)}."
    source = f"metrics.csv: {base.accuracy}, val/step, rollout/responses, time/since_start"
    return table(head, rows, caption, source) + tag("p", escape(note), class_="note") + _pairs(groups)


def _bounds(ratio: Ratio) -> str:
    if ratio.bounds is None:
        return NONE
    low, high = ratio.bounds
    return f"{low:.2f} to {high:.2f}" if math.isfinite(high) else f"above {low:.2f}"


def _pairs(groups: Sequence[Group]) -> str:
    able = [g for g in groups if g.curve]
    if not 2 <= len(able) <= PAIRS:
        return ""
    rows = []
    for mine in able:
        cells = [
            next((r.steps for r in compare.ratios(other, mine)), None) if other is not mine else None for other in able
        ]
        rows.append([named(groups, mine), *("·" if o is mine else times(c) for o, c in zip(able, cells, strict=True))])
    head = ["row reaches column's best accuracy", *(escape(g.name) for g in able)]
    caption = f"Every pair: column's steps over row's; {NONE}: never, or at step 0"
    inner = table(head, rows, caption, "metrics.csv: val/avg@K, val/step")
    return tag("details", tag("summary", "Every pair of settings") + inner)


def thought_table(groups: Sequence[Group], names: Sequence[str]) -> str:
    """Ratios to step 0 at the end of each life but the last, and of the run."""
    rows, columns = [], set()
    for group in groups:
        run = group.runs[0]
        ends = [first for _, first in run.lives[1:]]
        cells, said = [], False
        for name in names:
            column = f"val/thoughts/{name}_ratio"
            curve = group.mean(column) or group.mean(column := column.removeprefix("val/"))
            columns |= {column} if curve else set()
            steps = [max((s for s in curve if s <= end), default=None) for end in [*ends, run.steps]]
            known = list(dict.fromkeys(s for s in steps if s))
            said = said or bool(known)
            cells.append(" → ".join(f'<span title="step {s}">{curve[s]:.3g}{TIMES}</span>' for s in known) or NONE)
        if said:
            rows.append([named(groups, group), *cells])
    if not rows:
        return ""
    source = f"metrics.csv: {', '.join(sorted(columns)[:2])}, …"
    caption = (
        "Thoughts a response over those at step 0: at the end of each life (the last evaluated step in it); "
        f"mean over runs; {NONE}: none at step 0"
    )
    return table(["setting", *map(escape, names)], rows, caption, source)
