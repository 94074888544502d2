"""Tables that are made here, so that they are there without JavaScript: accuracy, steps to it, thoughts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group
from prerl_lightning.report.figures import columns_of, numbers
from prerl_lightning.report.files import inside, is_number, is_part
from prerl_lightning.report.html import NONE, TIMES, named, table, tag
from prerl_lightning.report.payload import evenly
from prerl_lightning.report.runs import objective

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
    """Steps to shares of the baseline's gain; empty where there is nothing to compare."""
    found = [(g, one) for g in groups if g is not base for one in compare.sooner(base, g)]
    if not found:
        return ""
    rows = []
    for other, one in found:
        paired = f"seed {', '.join(map(str, one.seeds))}" if one.seeds else "none: mean curves"
        seconds = compare.geometric([pair.seconds for pair in one.pairs if pair.seconds])
        rows.append([
            named(groups, other), f"{words.shares([one.share])}: {words.figure(one.target)}",
            _steps(p.baseline for p in one.pairs), _steps(p.group for p in one.pairs),
            tag("b", words.sooner(one)), words.times(seconds), paired, words.order([one]) if one.seeds else NONE,
        ])  # fmt: skip
    short = escape(base.name) if len(base.name) <= 16 else "baseline"
    head = ["setting", f"{short}'s gain", f"steps: {short}", "steps: this one", "ratio", "in wall time", "pairs", ""]
    shares = words.shares(compare.SHARES)
    caption = f"How much sooner each setting has {shares} of {base.name}'s gain in held-out accuracy"
    note = (
        f"Baseline: {base.name}, {compare.why_baseline(groups, base)}. Its gain is that of its mean curve, from the "
        "first value to the best. Steps are where a curve, straight between evaluations, first has the accuracy; a "
        "ratio is the baseline's steps over the setting's in runs of one seed, the geometric mean and, in brackets, "
        f"the range over seeds in both settings. Above 1{TIMES}: sooner than the baseline; it is called sooner or "
        "later where all pairs agree."
    )
    others = [g for g in groups if g.accuracy and g.accuracy != base.accuracy]
    if others:
        note += f" Not compared, since measured otherwise: {', '.join(f'{g.name} ({g.accuracy})' for g in others)}."
    source = f"metrics.csv: {base.accuracy}, val/step, time/since_start; config.yaml: seed_everything"
    return table(head, rows, caption, source) + tag("p", escape(note), class_="note") + _pairs(groups)


def _steps(found: Iterable[float | None]) -> str:
    """The mean of those that get there."""
    known = [step for step in found if step is not None]
    return f"{math.fsum(known) / len(known):.1f}" if known else "never"


def _pairs(groups: Sequence[Group]) -> str:
    able = [g for g in groups if g.curve]
    if not 3 <= len(able) <= PAIRS:
        return ""
    rows = []
    for mine in able:
        at = [compare.sooner(other, mine) for other in able]
        cells = ["·" if o is mine else words.times(s[1].mean) if s else NONE for o, s in zip(able, at, strict=True)]
        rows.append([named(groups, mine), *cells])
    share = words.shares([compare.SHARES[1]])
    caption = f"Every pair: column's steps over row's to {share} of the column's gain; {NONE}: never, or no gain"
    inner = table(["", *(escape(g.name) for g in able)], rows, caption, "metrics.csv: val/avg@K, val/step")
    return tag("details", tag("summary", "Every pair of settings") + inner)


def alignment_table(groups: Sequence[Group]) -> str:
    """Of single responses, by the life in which they were measured."""
    rows = []
    for group in groups:
        by_life: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
        for line in (line for run in group.runs for line in run.alignment):
            number, name = line.get("life"), line.get("objective")  # neither is in files of older versions
            life = (number if isinstance(number, int) else 1, objective(name) if isinstance(name, str) else "")
            by_life.setdefault(life, []).append(line)
        for (number, name), lines in sorted(by_life.items()):
            cosines = [line["cosine"] for line in lines]
            inner = [value for line in lines if is_number(value := line.get("inner_product"))]
            negative = f"{sum(value < 0 for value in inner):,} of {len(inner):,}" if inner else NONE
            mean = f"{words.figure(math.fsum(cosines) / len(cosines))}{tag('small', words.spread(cosines))}"
            rows.append([named(groups, group), escape(f"{number}, {name}" if name else str(number)), mean, negative])
    if not rows:
        return ""
    caption = "Responses by the life that they were measured in: the gradients of log p(y) and log p(y|x)"
    source = "alignment.jsonl: life, objective, cosine, inner_product"
    return table(["setting", "life", "cosine", "negative inner products"], rows, caption, source)


def part_table(groups: Sequence[Group]) -> str:
    """Of parts of single responses, where ``alignment.bins`` had them compared: over how many tokens a cosine is."""
    rows = []
    for group in groups:
        lines = [line for run in group.runs for line in run.alignment]
        for kind in ("position", "probability"):
            able = [parts for line in lines if (parts := inside(line, kind))]
            for name in sorted({name for parts in able for name in parts}, key=numbers):
                found = [(part["tokens"], part["cosine"]) for parts in able if is_part(part := inside(parts, name))]
                if found:
                    tokens, cosines = zip(*found, strict=True)
                    mean = f"{words.figure(math.fsum(cosines) / len(found))}{tag('small', words.spread(cosines))}"
                    of = f"{len(found):,} of {len(able):,}"
                    said = [kind, escape(name.replace("_", " ")), of, f"{math.fsum(tokens) / len(found):.1f}", mean]
                    rows.append([named(groups, group), *said])
    if not rows:
        return ""
    caption = "Parts of the responses measured: how many responses have such tokens, and how many each, in the mean"
    head = ["setting", "by", "part", "responses", "tokens a response", "cosine"]
    inner = table(head, rows, caption, "alignment.jsonl: position, probability")
    return tag("details", tag("summary", "By position and probability: of how many tokens") + inner)


def thought_table(groups: Sequence[Group], names: Sequence[str]) -> str:
    """Of families of phrases, or of SEAL's labels: ratios to step 0 at the end of each life but the last, and of the
    run, with what they are ratios of; all of one source, held-out responses where there are such ratios."""
    there = columns_of(run for group in groups for run in group.runs)
    source = "val/thoughts" if any(f"val/thoughts/{n}_ratio" in there for n in names) else "thoughts"
    shown = [name for name in names if f"{source}/{name}_ratio" in there]
    rows = []
    for group in groups:
        ends = [*(first for _, first in group.longest.lives[1:]), group.longest.steps]
        cells = [_ratios(group, f"{source}/{name}_ratio", ends) for name in shown]
        if set(cells) - {NONE}:
            rows.append([named(groups, group), *cells])
    if not rows:
        return ""
    left = [name for name in names if name not in shown]
    what, at = ("held-out", "evaluated step") if source.startswith("val/") else ("training", "step")
    counted = "Pieces by SEAL's label" if shown[0].startswith("seal/") else "Thoughts"
    caption = (
        f"{counted} a {what} response over those at step 0: at the end of each life (the last {at} in it); mean over "
        f"runs, [ ]: one run's 95 % interval over problems, ( ): smallest to largest run; {NONE}: none at step 0"
        + (f", as of {', '.join(left)}" if left else "")
    )
    said = f"metrics.csv: {', '.join(f'{source}/{name}_ratio' for name in shown)}"
    said += ", of each /low and /high" if any(f"{source}/{name}_ratio/low" in there for name in shown) else ""
    return table(["setting", *(escape(name.removeprefix("seal/")) for name in shown)], rows, caption, said)


def _ratios(group: Group, column: str, ends: Sequence[int]) -> str:
    """Ratio, and what is around it, at each end; below, numbers a response from the start on."""
    curves = [run.column(column) for run in group.runs]
    counts = [run.column(column.removesuffix("_ratio")) for run in group.runs]
    steps = [max((s for c in curves for s in c if s <= end), default=0) for end in ends]
    said: list[str] = []
    a_response: list[float] = []
    for step in (step for step in dict.fromkeys(steps) if step):
        ratios = [c[step] for c in curves if step in c]
        around = words.around(group, column, step, ratios, "{:.3g}".format)
        ratio = f"{math.fsum(ratios) / len(ratios):.3g}{TIMES}"
        said.append(tag("span", f"{ratio} {around}" if around else ratio, title=f"step {step}"))
        known = [(n[step], c[step]) for n, c in zip(counts, curves, strict=True) if step in n and c.get(step)]
        if known:  # at the start it was the number over the ratio
            a_response += [] if a_response else [math.fsum(n / ratio for n, ratio in known) / len(known)]
            a_response.append(math.fsum(n for n, _ in known) / len(known))
    below = tag("small", f"{' → '.join(f'{n:.2g}' for n in a_response)} a response") if a_response else ""
    return " → ".join(said) + below if said else NONE
