"""Where the time went, on what, and with which settings."""

import math
import shlex
from collections.abc import Sequence
from html import escape

from prerl_lightning.report import compare, words
from prerl_lightning.report.compare import Group
from prerl_lightning.report.figures import TIMES as PARTS
from prerl_lightning.report.files import inside
from prerl_lightning.report.html import NONE, named, table, tag
from prerl_lightning.report.runs import Run, finite

DIFFERENT = 8  # values of one key that are listed
CONFIG_BYTES = 400_000  # of all whole configurations together


def time_table(groups: Sequence[Group]) -> str:
    """Mean seconds of each part of a step."""
    rows = []
    parts = [p for p in PARTS if any(g.mean(f"time/{p}") for g in groups)]
    aligned = any(g.mean("time/alignment") for g in groups)
    beside = {group.name: _outside(group) for group in groups}
    for group in groups:
        means = {p: _mean_per_step(group, f"time/{p}") for p in parts}
        total = math.fsum(means.values())
        if not total:
            continue
        bar = "".join(
            f'<span class="part p{PARTS.index(p)}" style="width:{100 * v / total:.2f}%" title="{escape(p)}"></span>'
            for p, v in means.items()
        )
        cells = [f"{v:.3g}<small>{v / total:.1%}</small>" for v in means.values()]
        if aligned:
            cells.append(f"{_mean_per_step(group, 'time/alignment'):.3g}")
        if any(beside.values()):
            seconds = beside[group.name]
            share = f"<small>{seconds / (total + seconds):.1%} of the wall time</small>"
            cells.append(f"{seconds:.3g}{share}" if seconds else NONE)
        share = f'<span class="bar" aria-hidden="true">{bar}</span>'
        rows.append([named(groups, group), share, f"{total:.3g}", *cells])
    if not rows:
        return ""
    keys = [f'<span class="key p{PARTS.index(p)}"></span>{p.replace("_", " ")}' for p in parts]
    head = ["setting", "share", "sum", *keys, *(["of which alignment"] if aligned else [])]
    head += ["outside steps (start, evaluation, saving)"] if any(beside.values()) else []
    caption = "Seconds a step, mean over all steps, and shares; watchers come on top of time/step"
    caption += "; outside steps: time/since_start less both" if any(beside.values()) else ""
    return table(head, rows, caption, "metrics.csv: time/*")


def _mean_per_step(group: Group, column: str) -> float:
    """Over all steps: one in which a part did not run counts as 0."""
    values = [v for run in group.runs for v in run.column(column).values()]
    return math.fsum(values) / max(1, sum(len(run.training) for run in group.runs))


def _outside(group: Group) -> float:
    """Wall time that no step's parts hold, divided by the steps; 0: not known."""
    rows = [row for run in group.runs for row in run.training.values()]
    if not any("time/since_start" in row for row in rows):
        return 0.0
    inside_steps = math.fsum(finite(row, f"time/{part}") for row in rows for part in ("step", "watchers"))
    wall = math.fsum(max(run.seconds.values()) for run in group.runs)
    return max(0.0, wall - inside_steps) / len(rows)


def machines(groups: Sequence[Group]) -> str:
    """Command, hardware and versions; what several runs have in common once."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in (run for group in groups for run in group.runs):
        for key, value in _about(run).items():
            found.setdefault(key, {}).setdefault(value, []).append(f"{run.name} {run.version}".strip())
    rows = ""
    for key, values in found.items():
        for i, (value, names) in enumerate(list(values.items())[:DIFFERENT]):
            who = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            of = tag("small", f" {escape(who)}") if len(values) > 1 else ""
            rows += tag("dt", escape(key) if not i else "") + tag("dd", escape(value) + of)
        if len(values) > DIFFERENT:
            rows += tag("dt", "") + tag("dd", f"and {len(values) - DIFFERENT} more", class_="muted")
    return tag("dl", rows, class_="about") + tag("p", "run.json", class_="source") if found else ""


def _about(run: Run) -> dict[str, str]:
    info = run.info
    said = {
        "command": shlex.join(map(str, info["command"])) if info.get("command") else None,
        "started": info.get("started"),
        "machine": words.machine(run),
        "processes": f"{info['world_size']}, {info.get('strategy')}" if info.get("world_size") else None,
        "precision": info.get("precision"),
        "versions": ", ".join(f"{k} {v}" for k, v in inside(info, "versions").items()),
    }
    return {k: str(v) for k, v in said.items() if v}


def configuration(groups: Sequence[Group]) -> str:
    """What differs, side by side, and every configuration whole, folded."""
    able = [g for g in groups if g.settings]
    sides = [g.settings for g in able]
    differing = compare.diff(sides) if len(able) > 1 else []
    inherited = [row for row in differing if compare.inherited(row[0], sides)]
    own = [row for row in differing if row not in inherited]
    parts = [_differences("Settings that differ", groups, able, own)] if own else []
    if inherited:
        caption = f"{len(inherited)} further settings, of successors, that are as in the first life"
        inner = _differences("As in the first life", groups, able, inherited)
        parts.append(tag("details", tag("summary", caption) + inner))
    room = CONFIG_BYTES
    for group in groups:
        text = group.runs[0].config_text
        if not text:
            parts.append(tag("p", f"{escape(group.name)}: no config.yaml", class_="note"))
            continue
        room -= len(text)
        body = (
            tag("pre", escape(text), tabindex="0")
            if room > 0
            else tag("p", "left out: the page would become too large")
        )
        source = tag("span", escape(str(group.runs[0].folder / "config.yaml")), class_="source")
        parts.append(tag("details", tag("summary", f"The whole configuration: {escape(group.name)} {source}") + body))
    return "".join(parts)


def _differences(
    caption: str, groups: Sequence[Group], able: Sequence[Group], differing: Sequence[tuple[str, list[str | None]]]
) -> str:
    """A column for each of a few groups; a row for each of many."""
    cells = [[_value(v) for v in values] for _, values in differing]
    keys = [tag("code", escape(key)) for key, _ in differing]
    if len(able) <= 4:
        rows = [[key, *values] for key, values in zip(keys, cells, strict=True)]
        return table(["key", *(named(groups, g) for g in able)], rows, caption, "config.yaml")
    rows = [[named(groups, g), *(values[i] for values in cells)] for i, g in enumerate(able)]
    return table(["setting", *keys], rows, caption, "config.yaml")


def _value(value: str | None) -> str:
    return tag("span", "unset", class_="muted") if value is None else tag("code", escape(value))
