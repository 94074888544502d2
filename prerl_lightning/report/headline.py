"""The page's head: what was trained, for how long, from what to what, and how each run stands."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group, Sooner
from prerl_lightning.report.html import NONE, named, table, tag
from prerl_lightning.report.runs import Run, chain

FEW = 5  # pairs that all agree by chance once in 16 times
FALLS = 3  # settings whose fall the head tells of
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
    """What was trained, and what came of it, in a few sentences."""
    if len(groups) == 1:
        return tag("p", " ".join([_story(groups[0]), *_falls(groups)]), class_="lead")
    said = [f"{len(groups)} settings, {words.some(sum(len(group.runs) for group in groups), 'run')}."]
    known = {group.name: found for group in groups if group is not base and (found := compare.sooner(base, group))}
    if known:
        gain = f"{words.figure(base.curve[min(base.curve)])} to {words.figure(max(base.curve.values()))}"
        goal = f"{words.shares(compare.SHARES)} of {tag('b', escape(base.name))}'s gain in held-out accuracy ({gain})"
        few = [group for group in groups if group.name in known]
        each = (_beside(base, group.name, known[group.name]) + _at_end(base, group) for group in few)
        came = "; ".join(each) if len(known) < 3 else _soonest(known)
        said.append(f"To {goal} {came}.")
    if len(known) > 2:
        said.append(f"Baseline: {escape(base.name)}, {compare.why_baseline(groups, base)}.")
    return tag("p", " ".join([*said, *_falls(groups)]), class_="lead")


def _falls(groups: Sequence[Group]) -> list[str]:
    """A sentence on each setting, of a few, whose runs ended well below their best."""
    said = []
    for group in groups:
        runs = sorted((run for run in group.runs if run.fall), key=_left)
        if runs:
            of = f", in {len(runs)} of {len(group.runs)} runs, here the worst" if len(group.runs) > 1 else ""
            said.append(f"{tag('b', escape(group.name))}: {escape(words.fell(runs[0]))}{of}.")
    more = len(said) - FALLS
    return said[:FALLS] + ([f"So it did in {words.some(more, 'other setting')}."] if more > 0 else [])


def _left(run: Run) -> float:
    """Share of its best accuracy at the end of a run that fell."""
    best, last = (run.column(str(run.accuracy))[step] for step in run.fall or ())
    return last / best


def _beside(base: Group, name: str, found: Sequence[Sooner]) -> str:
    """Steps of the baseline over the setting's, at each share."""
    group, ratios, pairs = tag("b", escape(name)), ", ".join(map(words.sooner, found)), len(found[0].seeds)
    if pairs:
        little = ", which tells little" if pairs < FEW else ""
        return f"{group} is {words.order(found)}: {ratios}, over {words.some(pairs, 'pair')} of seeds{little}"
    return f"{group} has no seed in common with {tag('b', escape(base.name))} and is called neither sooner nor later"


def _at_end(base: Group, group: Group) -> str:
    """How its last accuracy is to the baseline's."""
    found = compare.last_differences(base, group)
    if not found:
        return ""
    mean = math.fsum(found) / len(found)
    around = f" ({min(found):+.2f} to {max(found):+.2f})" if len(found) > 1 else ""
    return f". It ends {abs(mean):.2f} {'above' if mean > 0 else 'below'} {tag('b', escape(base.name))}{around}"


def _soonest(known: Mapping[str, Sequence[Sooner]]) -> str:
    """Of many: how many are what, and those that are sooner by most, by the middle one of the shares."""
    orders = [words.order(found) for found in known.values()]
    middle = {name: found[len(found) // 2] for name, found in known.items() if words.order(found) == "sooner"}
    first = sorted(middle, key=lambda name: -(middle[name].mean or 0))[:3]
    said = [f"{tag('b', escape(name))} ({words.times(middle[name].mean)})" for name in first]
    counts = f"{len(middle)} of {len(known)} settings are sooner, {orders.count('later')} later"
    return f"{counts}; soonest {', '.join(said)}" if said else counts


def _story(group: Group) -> str:
    run, (steps, responses, seconds) = group.longest, words.totals(group)
    lives = [f"{escape(name)} for {_lasted(group, i)}" for i, (name, _) in enumerate(run.lives)]
    how = " and then, reincarnated, with ".join(lives) if lives and run.steps else escape(chain(run))
    data = words.problems(run, "train")
    text = f"The model {escape(words.model(run))} was trained with {how}{f' on {escape(data)}' if data else ''}."
    where = words.machine(run)
    if run.steps:
        runs = group.counted
        mean = ", in the mean of the runs," if len({r.steps for r in runs}) > 1 else ""
        each = " each" if len(runs) > 1 and not mean else ""
        some = words.part_of(group, len(runs))
        text += (
            f" {words.steps(steps)} and{mean} {responses:,.0f} responses{each} took "
            f"{words.duration(seconds)}{f' on {escape(where)}' if where else ''}{f' ({some})' if some else ''}."
        )
    return text


def _lasted(group: Group, life: int) -> str:
    """Steps of a life, from 0, in the runs that came as far as the longest; of one run also why it ended so soon."""
    longest = group.longest
    alike = [run for run in group.runs if (len(run.lives), run.steps) == (len(longest.lives), longest.steps)]
    ends = [[*(first for _, first in run.lives[1:]), run.steps] for run in alike]
    lengths = [end[life] - run.lives[life][1] for run, end in zip(alike, ends, strict=True)]
    few, many = min(lengths), max(lengths)
    why = longest.endings.get(life + 1) if len(group.runs) == 1 else None
    return (f"{few:,} to " if few < many else "") + words.steps(many) + (f", to where {escape(why)}," if why else "")


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
    some = words.part_of(group, len(group.counted))
    taken = "; ".join(filter(None, [f"in {words.steps(steps)}", some]))
    cells.append(("Responses", f"{responses:,.0f}", taken, "metrics.csv: rollout/responses"))
    machine = "; ".join(filter(None, [words.machine(group.longest), some]))
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
        some = words.part_of(group, len(group.counted))
        small = tag("small", some) if some else ""
        rows.append([*cells, f"{responses:,.0f}{small}", f"{words.duration(seconds)}{small}"])
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
    if any(len(group.counted) < len(group.runs) for group in groups):
        common.append(
            "Steps, responses and wall time are of the runs that finished; where none did, of those with a step"
        )
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
            told = [*words.ended(run, run.lives), *run.notes, *(f"warned: {said}" for said in run.warnings)]
            notes = f"; {'; '.join(told)}" if told else ""
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
    quiet = set(counts) == {"finished"} and not any(run.notes or run.warnings for group in groups for run in group.runs)
    if len(items) <= (QUIET if quiet else LOUD):
        return tag("ul", "".join(items), class_="states")
    summary = ", ".join(f"{n} {'without sign of life' if state == 'silent' else state}" for state, n in counts.items())
    warned = sum(bool(run.warnings) for group in groups for run in group.runs)
    summary += f"; {warned} with warnings" if warned else ""
    return tag(
        "details",
        tag("summary", f"{sum(counts.values())} runs: {summary}") + tag("ul", "".join(items), class_="states"),
    )
