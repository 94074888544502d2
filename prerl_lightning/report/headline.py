"""The page's head: what was trained, for how long, from what to what, and how each run stands."""

import math
from collections.abc import Sequence
from html import escape

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group, Ratio
from prerl_lightning.report.html import NONE, named, table, tag, times
from prerl_lightning.report.runs import chain

QUIET, LOUD = 3, 6  # so many runs are listed without being unfolded: all well, or not


def title(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        return groups[0].name
    names = [group.name for group in groups]
    bases = {group.runs[0].name for group in groups}
    if len(bases) == 1 and len(groups) > 2:
        return f"{bases.pop()}: {len(groups)} settings"
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def lead(groups: Sequence[Group], base: Group) -> str:
    """One or two sentences: what was trained, and what came of it."""
    if len(groups) == 1:
        return tag("p", _story(groups[0]), class_="lead")
    runs = sum(len(group.runs) for group in groups)
    said = [f"{len(groups)} settings, {runs} runs."]
    best = [next(iter(compare.ratios(base, other)), None) for other in groups if other is not base]
    known = sorted((ratio for ratio in best if ratio is not None), key=lambda ratio: -(ratio.steps or 0))
    said += [_sooner_sentence(ratio, groups) for ratio in known] if len(known) < 3 else [_soonest(known)]
    return tag("p", " ".join(said), class_="lead")


def _soonest(known: Sequence[Ratio]) -> str:
    """Of many: the first three."""
    there = known[0].of_baseline
    there_too = [
        f"{tag('b', escape(r.group))} after {r.of_group.step:,}" + (f" ({times(r.steps)})" if r.steps else "")
        for r in known[:3]
        if r.of_group is not None
    ]
    goal = f"{escape(known[0].baseline)}'s best held-out accuracy ({words.figure(known[0].target)})"
    if not there_too:
        return f"None reaches {goal}."
    return f"Soonest at {goal}, which it has after {there.step:,} steps: {', '.join(there_too)}."


def _sooner_sentence(ratio: Ratio, groups: Sequence[Group]) -> str:
    group, base = (tag("b", escape(name)) for name in (ratio.group, ratio.baseline))
    goal = f"{base}'s best held-out accuracy ({words.figure(ratio.target)})"
    if ratio.of_group is None:
        return f"{group} never reaches {goal}.{_other_way(ratio, groups)}"
    if not ratio.of_group.step or not ratio.of_baseline.step:
        return f"{group} reaches {goal} at step {ratio.of_group.step}, {base} at step {ratio.of_baseline.step}."
    return (
        f"{group} reaches {goal} after {ratio.of_group.step:,} steps, {base} after {ratio.of_baseline.step:,}: "
        f"a ratio of {times(ratio.steps)}."
    )


def _other_way(ratio: Ratio, groups: Sequence[Group]) -> str:
    """How much sooner the baseline is at what the setting does reach."""
    base, other = (next(g for g in groups if g.name == name) for name in (ratio.baseline, ratio.group))
    back = next(iter(compare.ratios(other, base)), None)
    if back is None or back.of_group is None or back.steps is None:
        return ""
    return (
        f" At {escape(other.name)}'s best ({words.figure(back.target)}) {tag('b', escape(base.name))} is after "
        f"{back.of_group.step:,} steps, {tag('b', escape(other.name))} after {back.of_baseline.step:,}."
    )


def _story(group: Group) -> str:
    run, known = group.runs[0], words.facts(group)
    lives = [
        f"{escape(name)} for {words.steps(until - first)}"
        for (name, first), until in zip(run.lives, [*(f for _, f in run.lives[1:]), run.steps], strict=False)
    ]
    how = " and then, reincarnated, with ".join(lives) if lives and run.steps else escape(chain(run))
    data = words.problems(run, "train")
    text = f"The model {escape(words.model(run))} was trained with {how}{f' on {escape(data)}' if data else ''}."
    where = words.machine(run)
    if run.steps:
        each = " each" if len(group.runs) > 1 else ""
        text += (
            f" {words.steps(known['steps'])} and {known['responses']:,.0f} responses{each} took "
            f"{words.duration(known['seconds'])}{f' on {escape(where)}' if where else ''}."
        )
    return text


def tiles(group: Group) -> str:
    """Of a page on one setting: its figures, large."""
    known, cells = words.facts(group), []
    measures = {"reward/mean": ("Training reward", known["reward"])}
    if group.accuracy:
        measures = {group.accuracy: (f"Held-out {group.accuracy[4:]}", known["accuracy"])} | measures
    for column, (name, found) in measures.items():
        if not found:
            continue
        (first, before), (last, after) = found
        ends = [math.fsum(v) / len(v) for v in ((before, after) if first != last else (before,))]
        detail = f"step {first:,} to {last:,}" if first != last else f"step {first:,}"
        around = [words.with_interval(group, column, s, v).partition(" ")[2] for s, v in found[: len(ends)]]
        if all(around):
            kind = (
                "95 % interval"
                if len(group.runs) == 1
                else f"means over {len(group.runs)} runs, from smallest to largest"
            )
            detail += f"; {kind} {' → '.join(around)}"
        cells.append((name, " <i>→</i> ".join(map(words.figure, ends)), detail, f"metrics.csv: {column}"))
    machine = words.machine(group.runs[0]) or ""
    responses = f"{known['responses']:,.0f}"
    cells.append(("Responses", responses, f"in {words.steps(known['steps'])}", "metrics.csv: rollout/responses"))
    cells.append(("Wall time", words.duration(known["seconds"]), machine, "metrics.csv: time/since_start"))
    inner = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", value, class_="big") + tag("dd", escape(detail)), title=source)
        for name, value, detail, source in cells
    )  # fmt: skip
    return tag("dl", inner, class_="tiles")


def overview(groups: Sequence[Group]) -> str:
    """Of a page on several settings: one row each."""
    rows = []
    for group in groups:
        run, known = group.runs[0], words.facts(group)
        cells = [named(groups, group)]
        for column, found in ((group.accuracy, known["accuracy"]), ("reward/mean", known["reward"])):
            if not found or not column:
                cells.append(NONE)
                continue
            at = found if found[0][0] != found[1][0] else found[:1]
            ends = [words.with_interval(group, column, step, values).partition(" ") for step, values in at]
            around = " → ".join(end[2] for end in ends if end[2])
            cells.append(tag("b", " → ".join(end[0] for end in ends)) + tag("small", escape(around)))
        cells += [escape(chain(run)), f"{len(group.runs)}", f"{known['steps']:,}"]
        rows.append([*cells, f"{known['responses']:,.0f}", words.duration(known["seconds"])])
    about = {
        "Model": [words.model(group.runs[0]) for group in groups],
        "Data": [words.problems(group.runs[0], "train") or NONE for group in groups],
        "Machine": [words.machine(group.runs[0]) or NONE for group in groups],
    }
    common = [f"{name}: {values[0]}" for name, values in about.items() if len(set(values)) == 1 and values[0] != NONE]
    own = {name: values for name, values in about.items() if len(set(values)) > 1}
    head = ["setting", "held-out accuracy, first → last", "reward, first → last", "objective", "runs", "steps",
            "responses", "wall time", *(name.lower() for name in own)]  # fmt: skip
    rows = [[*row, *(escape(values[i]) for values in own.values())] for i, row in enumerate(rows)]
    caption = "The settings: runs that differ in seeds alone are one. [ ]: 95 % interval; ( ): smallest to largest run"
    source = "metrics.csv: val/avg@K, reward/mean, rollout/responses, time/since_start; run.json; config.yaml"
    return table(head, rows, caption, source) + (
        tag("p", escape(". ".join(common) + "."), class_="note") if common else ""
    )


def states(groups: Sequence[Group], now: float) -> str:
    """How each run stands, and what its reader has to know."""
    items = []
    for group in groups:
        for run in group.runs:
            state, said = run.status(now)
            seed = run.info.get("seed", run.config.get("seed_everything"))
            notes = f"; {'; '.join(run.notes)}" if run.notes else ""
            text = f"{run.folder}{f', seed {seed}' if seed is not None else ''}: {said}{notes}"
            items.append(tag("li", tag("span", state, class_=f"state {state}") + " " + escape(text)))
    for group in groups:
        ends = sorted({run.steps for run in group.runs})
        if len(ends) > 1:
            text = f"The runs of {group.name} end at different steps: beyond step {ends[0]:,} its means "
            text += "are over fewer runs."
            items.append(tag("li", escape(text)))
    counts: dict[str, int] = {}
    for state in (run.status(now)[0] for group in groups for run in group.runs):
        counts[state] = counts.get(state, 0) + 1
    quiet = set(counts) == {"finished"} and not any(run.notes for group in groups for run in group.runs)
    if len(items) <= (QUIET if quiet else LOUD):
        return tag("ul", "".join(items), class_="states")
    summary = ", ".join(f"{n} {'without sign of life' if state == 'silent' else state}" for state, n in counts.items())
    return tag(
        "details",
        tag("summary", f"{sum(counts.values())} runs: {summary}") + tag("ul", "".join(items), class_="states"),
    )
