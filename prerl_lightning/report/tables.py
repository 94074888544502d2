"""Tables that are made here, so that they are there without JavaScript: accuracy, steps to it, thoughts."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group, Ratio
from prerl_lightning.report.figures import columns_of
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
    found = [(g, ratio) for g in groups if g is not base for ratio in compare.comparable(base, g)]
    if not found:
        return ""
    rows = []
    for other, ratio in found:
        at, there = ratio.of_group, ratio.of_baseline
        target = f"{ratio.kind}, {words.figure(ratio.target)}"
        if ratio.kind == "own best":
            missed = [words.figure(r.target) for r in compare.ratios(base, other) if not r.of_group]
            target = f"this one's own best, {words.figure(ratio.target)}"
            target += tag("small", f"never at {escape(base.name)}'s {' or '.join(missed)}")
        rows.append([
            named(groups, other), target, f"{there.step:,}", f"{at.step:,}" if at else "never reached",
            tag("b", times(ratio.steps)), _bounds(ratio), times(ratio.samples), times(ratio.seconds), _seeds(ratio),
        ])  # fmt: skip
    short = escape(base.name) if len(base.name) <= 16 else "baseline"
    head = ["setting", f"{short}'s accuracy", f"steps: {short}", "steps: this one", "ratio",
            "between", "in samples", "in wall time", "single runs"]  # fmt: skip
    caption = f"How much sooner each setting reaches the held-out accuracy of {base.name}: its steps over the setting's"
    evaluated = {b - a for g in groups for a, b in pairwise(sorted(g.curve))}
    every = words.spread(evaluated, 0) if len(evaluated) > 1 else f"{next(iter(evaluated), 0):,}"
    note = (
        f"Baseline: {base.name}, {compare.why_baseline(groups, base)}. "
        "The target is the best, and the last, accuracy of its curve, a mean over its runs where there are "
        "several. Counted is the first evaluated step at which a setting's own mean curve is at or above it, without "
        f"interpolation. There are {every} steps between evaluations, so either count may be too high by up to that "
        "much: 'between' is what the ratio can be. 'single runs': each run's own curve against the same target. "
        f"Above 1{TIMES}: sooner than the baseline."
    )
    if any(ratio.kind == "own best" for _, ratio in found):
        note += " A setting that never gets there is compared at the best accuracy of its own, which the baseline has."
    others = [g for g in groups if g.accuracy and g.accuracy != base.accuracy]
    if others:
        note += f" Not compared, since measured otherwise: {', '.join(f'{g.name} ({g.accuracy})' for g in others)}."
    source = f"metrics.csv: {base.accuracy}, val/step, rollout/responses, time/since_start"
    return table(head, rows, caption, source) + tag("p", escape(note), class_="note") + _pairs(groups)


def _seeds(ratio: Ratio) -> str:
    """The ratios of single runs, and how many never get there."""
    known = [s for s in ratio.seeds if s is not None]
    never = len(ratio.seeds) - len(known)
    if len(ratio.seeds) < 2:
        return NONE
    if not known:
        return "all never"
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return (low if low == high else f"{low} to {high}") + TIMES + (
        f"; {never} of {len(ratio.seeds)} never" if never else ""
    )  # fmt: skip


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
    """Of families of phrases, or of SEAL's labels: ratios to step 0 at the end of each life but the last, and of the
    run, with what they are ratios of; all of one source, held-out responses where there are such ratios."""
    there = columns_of(run for group in groups for run in group.runs)
    source = "val/thoughts" if any(f"val/thoughts/{n}_ratio" in there for n in names) else "thoughts"
    shown = [name for name in names if f"{source}/{name}_ratio" in there]
    rows = []
    for group in groups:
        ends = [*(first for _, first in group.longest.lives[1:]), group.longest.steps]
        cells = [_ratios(group, f"{source}/{name}", ends) for name in shown]
        if set(cells) - {NONE}:
            rows.append([named(groups, group), *cells])
    if not rows:
        return ""
    left = [name for name in names if name not in shown]
    counted = "Pieces by SEAL's label" if names[0].startswith("seal/") else "Thoughts"
    caption = (
        f"{counted} a {'held-out' if source.startswith('val/') else 'training'} response over those at step 0: at the "
        f"end of each life (the last {'evaluated step' if source.startswith('val/') else 'step'} in it); mean over "
        f"runs; beside it a single run's 95 % interval over problems, and the count at step 0; {NONE}: none at step 0"
        + (f", as of {', '.join(left)}" if left else "")
    )
    said = f"metrics.csv: {', '.join(f'{source}/{name}_ratio' for name in shown)}"
    return table(["setting", *(escape(name.removeprefix("seal/")) for name in shown)], rows, caption, said)


def _ratios(group: Group, column: str, ends: Sequence[int]) -> str:
    curves = [run.column(f"{column}_ratio") for run in group.runs]
    steps = [max((s for c in curves for s in c if s <= end), default=0) for end in ends]
    found = {step: [c[step] for c in curves if step in c] for step in steps if step}
    said = [f'<span title="step {s}">{math.fsum(v) / len(v):.3g}{TIMES}</span>' for s, v in found.items()]
    if not said:
        return NONE
    counts = [str(len(values)) for values in found.values()]
    some = f"{' → '.join(counts if len(set(counts)) > 1 else counts[:1])} of {len(curves)} runs"
    small = [_interval(group, column, max(found)), some if set(counts) - {str(len(curves))} else ""]
    return " → ".join(said) + (tag("small", "; ".join(filter(None, small))) if any(small) else "")


def _interval(group: Group, column: str, step: int) -> str:
    """Of one run's last ratio the interval; and the count at step 0, count over ratio, as a large one of little is."""
    low, high = (group.runs[0].column(f"{column}_ratio/{end}").get(step) for end in ("low", "high"))
    between = (
        f"[{low:.3g}, {'∞' if high is None else f'{high:.3g}'}] " if low is not None and len(group.runs) < 2 else ""
    )
    pairs = [(r.column(column), r.column(f"{column}_ratio")) for r in group.runs]
    start = [c[min(c)] / ratio[min(c)] for c, ratio in pairs if c and ratio.get(min(c))]
    return between + (f"of {math.fsum(start) / len(start):.2g}" if start else "")
