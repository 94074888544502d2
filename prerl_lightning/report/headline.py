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
    if len(known) > 2:
        said.append(f"Baseline: {escape(base.name)}, {compare.why_baseline(groups, base)}.")
    return tag("p", " ".join(said), class_="lead")


def _soonest(known: Sequence[Ratio]) -> str:
    """Of many: the first three, and how many are as soon as the third."""
    goal = f"{escape(known[0].baseline)}'s best held-out accuracy ({words.figure(known[0].target)})"
    able = [(r, r.of_group.step) for r in known if r.of_group is not None]
    if not able:
        return f"None reaches {goal}."
    said = [f"{tag('b', escape(r.group))} after {s:,}" + (f" ({times(r.steps)})" if r.steps else "") for r, s in able]
    tied = sum(1 for _, step in able[3:] if step == able[2][1])
    more = f" and {tied} more after {able[2][1]:,}" if tied else ""
    there = known[0].of_baseline
    return f"Soonest at {goal}, which it has after {words.steps(there.step)}: {', '.join(said[:3])}{more}."


def _sooner_sentence(ratio: Ratio, groups: Sequence[Group]) -> str:
    group, base = (tag("b", escape(name)) for name in (ratio.group, ratio.baseline))
    goal = f"{base}'s best held-out accuracy ({words.figure(ratio.target)})"
    if ratio.of_group is None:
        there = words.steps(ratio.of_baseline.step)
        return f"{group} never reaches {goal}, which {base} has after {there}.{_other_way(ratio, groups)}"
    if not ratio.of_group.step or not ratio.of_baseline.step:
        return f"{group} reaches {goal} at step {ratio.of_group.step}, {base} at step {ratio.of_baseline.step}."
    return (
        f"{group} reaches {goal} after {words.steps(ratio.of_group.step)}, {base} has it after "
        f"{words.steps(ratio.of_baseline.step)}: a ratio of {times(ratio.steps)}."
    )


def _other_way(ratio: Ratio, groups: Sequence[Group]) -> str:
    """How much sooner the baseline is at what the setting does reach."""
    base, other = (next(g for g in groups if g.name == name) for name in (ratio.baseline, ratio.group))
    own = next(iter(compare.comparable(base, other)))
    if own.kind != "own best" or own.of_group is None:
        return ""
    return (
        f" {tag('b', escape(other.name))}'s own best ({words.figure(own.target)}) it has after "
        f"{words.steps(own.of_group.step)}, {tag('b', escape(base.name))} after {words.steps(own.of_baseline.step)}."
    )


def _story(group: Group) -> str:
    run, (steps, responses, seconds) = group.longest, words.totals(group)
    lives = [
        f"{escape(name)} for {words.steps(until - first)}"
        for (name, first), until in zip(run.lives, [*(f for _, f in run.lives[1:]), run.steps], strict=False)
    ]
    how = " and then, reincarnated, with ".join(lives) if lives and run.steps else escape(chain(run))
    data = words.problems(run, "train")
    text = f"The model {escape(words.model(run))} was trained with {how}{f' on {escape(data)}' if data else ''}."
    where = words.machine(run)
    if run.steps:
        mean = ", in the mean of the runs," if len({r.steps for r in group.runs}) > 1 else ""
        each = " each" if len(group.runs) > 1 and not mean else ""
        text += (
            f" {words.steps(steps)} and{mean} {responses:,.0f} responses{each} took "
            f"{words.duration(seconds)}{f' on {escape(where)}' if where else ''}."
        )
    return text


def tiles(group: Group) -> str:
    """Of a page on one setting: its figures, large."""
    cells = []
    measures = [(group.accuracy, f"Held-out {group.accuracy[4:]}")] if group.accuracy else []
    for column, name in [*measures, ("reward/mean", "Training reward")]:
        found = words.ends(group, column)
        if not found:
            continue
        detail = f"step {' to '.join(f'{step:,}' for step, _ in found)}"
        around = [said for step, values in found if (said := words.around(group, column, step, values))]
        if around:
            one = len(group.runs) == 1
            kind = "95 % interval" if one else f"means over {len(group.runs)} runs, from smallest to largest"
            detail += f"; {kind} {' → '.join(around)}"
        cells.append((name, " <i>→</i> ".join(_mean(values) for _, values in found), detail, f"metrics.csv: {column}"))
    steps, responses, seconds = words.totals(group)
    cells.append(("Responses", f"{responses:,.0f}", f"in {words.steps(steps)}", "metrics.csv: rollout/responses"))
    machine = words.machine(group.longest) or ""
    cells.append(("Wall time", words.duration(seconds), machine, "metrics.csv: time/since_start"))
    inner = "".join(
        tag("div", tag("dt", escape(name)) + tag("dd", value, class_="big") + tag("dd", escape(detail)), title=source)
        for name, value, detail, source in cells
    )  # fmt: skip
    return tag("dl", inner, class_="tiles")


def _mean(values: Sequence[float]) -> str:
    return words.figure(math.fsum(values) / len(values))


def overview(groups: Sequence[Group]) -> str:
    """Of a page on several settings: one row each."""
    rows = []
    for group in groups:
        cells = [named(groups, group)]
        for column in (group.accuracy, "reward/mean"):
            found = words.ends(group, column) if column else []
            if not found or not column:
                cells.append(NONE)
                continue
            around = [said for step, values in found if (said := words.around(group, column, step, values))]
            means = tag("b", " → ".join(_mean(values) for _, values in found))
            cells.append(means + tag("small", escape(" → ".join(around))))
        steps, responses, seconds = words.totals(group)
        cells += [escape(chain(group.longest)), f"{len(group.runs)}", f"{steps:,}"]
        rows.append([*cells, f"{responses:,.0f}", words.duration(seconds)])
    about = {
        "Model": [words.model(group.longest) for group in groups],
        "Data": [words.problems(group.longest, "train") or NONE for group in groups],
        "Machine": [words.machine(group.longest) or NONE for group in groups],
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
