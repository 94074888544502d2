"""One picture of a run for the terminal: progress, curves as sparklines, where the time goes, the newest samples."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from prerl_lightning.report import words
from prerl_lightning.report.figures import TIMES, families
from prerl_lightning.report.files import is_right, spans
from prerl_lightning.report.runs import Run, chain, finite
from prerl_lightning.terminal import last_part, printable

BLOCKS = "▁▂▃▄▅▆▇█"
LIVES = ("magenta", "cyan", "green", "yellow")  # a life's colour, in turn
PARTS = ("blue", "bright_blue", "red", "yellow", "green", "white", "bright_black", "magenta")
MARKS = ("black on cyan", "black on yellow", "black on green", "black on magenta", "white on blue", "black on white")
STATES = {"failed": "bold red", "silent": "bold red", "finished": "bold green", "running": "bold cyan"}
RECENT = 20  # steps over which times are averaged
SHOWN = 240  # characters of a sample
INTERVALS, RANGES = 80, 110  # columns from which on these are shown beside a curve


def frame(run: Run, width: int = 100, height: int = 48, now: float | None = None) -> RenderableType:
    """The picture, for a terminal of so many columns and lines."""
    now = time.time() if now is None else now
    run = replace(run, name=printable(run.name), info=_printable(run.info), config=_printable(run.config))
    alarms = [*run.warnings, *filter(None, [words.fell(run)])]
    parts: list[RenderableType] = [_head(run, now), *(_alarm(said, width) for said in alarms), _progress(run, width)]
    if not run.training and not run.validation:
        return Group(*parts, Text("no step yet", style="dim"))
    curves = _curves(run, width)
    parts += [Text(), curves]
    used = 7 + len(alarms) + len(words.ended(run, run.planned)) + curves.row_count
    if run.training:
        parts += [Text(), _times(run, width)]
        used += 3
    room = max(1, (height - used - 2) // 4)
    return Group(*parts, *_samples(run, min(3, room), width))


def _head(run: Run, now: float) -> Text:
    state, said = run.status(now)
    text = Text()
    text.append(f"{run.name} {run.version}".strip(), style="bold")
    text.append(f"   {chain(run)}   ")
    text.append(said, style=STATES.get(state, "yellow"))
    model = f"\n{words.model(run)}" if run.info.get("model") or run.config else ""
    where = words.machine(run)
    text.append(model + (f"   {where}" if where and model else ""), style="dim")
    resumed = run.info.get("resumed_from")
    if resumed and run.training:  # read alone: the figures are of the steps since
        before = Path(resumed).parent.parent.name
        text.append(f"\nresumed: figures since step {min(run.training):,}; earlier steps in {before}", style="yellow")
    return text


def _alarm(said: str, width: int) -> Text:
    text = Text(f"! {said}", style="bold yellow")
    text.truncate(width, overflow="ellipsis")
    return text


def _progress(run: Run, width: int) -> Text:
    """A bar in the colours of the lives, a line at each reincarnation; time gone by and left."""
    end = max(run.max_steps or run.steps, 1)
    size = max(10, min(width - 2, 100))
    borders = {round(first / end * size): name for name, first in run.planned[1:] if first < end}
    bar = Text()
    for i in range(size):
        step = (i + 0.5) / size * end
        style = colour(run, step) if step <= run.steps else "bright_black"
        bar.append("┃" if i in borders else "━" if step <= run.steps else "─", style="bold" if i in borders else style)
    bar.append("\n")
    for i, (name, first) in enumerate(run.planned):
        bar.append(("   reincarnation: " if i else "") + name, style=LIVES[i % len(LIVES)])
        by = "by" if first > run.steps and i in run.endings and not run.endings[i] else "from"
        bar.append(f" {by} step {first:,}" if i else "", style="dim")
    gone, left = max(run.seconds.values(), default=0.0), remaining(run)
    bar.append(f"   {words.duration(gone)}", style="dim")
    if left is not None and run.status()[0] == "running":
        bar.append(f", about {words.duration(left)} left", style="dim")
    for line in words.ended(run, run.planned):
        bar.append(f"\n{line}", style="dim")
    return bar


def colour(run: Run, step: float) -> str:
    """Of the life that a step is in; the step at which a life begins is the last of the one before."""
    begun = sum(1 for _, first in run.lives if first < step)
    return LIVES[(max(begun, 1) - 1) % len(LIVES)]


def remaining(run: Run) -> float | None:
    """Seconds to the end, at the pace of the last 50 steps, evaluations included; None: not known."""
    steps = list(run.training)[-50:]
    if not run.max_steps or len(steps) < 2:
        return None
    pace = (run.seconds[steps[-1]] - run.seconds[steps[0]]) / (steps[-1] - steps[0])
    return max(0.0, pace * (run.max_steps - run.steps))


def _curves(run: Run, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    named = max(14, min(24, width // 4))
    valued = 15 + (17 if width >= INTERVALS else 0) + (20 if width >= RANGES else 0)
    spark = max(8, min(60, width - named - valued - 6))
    for size in (named, spark, valued):
        table.add_column(width=size, no_wrap=True, overflow="ellipsis")
    for name, column, digits in _rows(run):
        curve = run.column(column)
        if not curve:
            continue
        first, last = curve[min(curve)], curve[max(curve)]
        value = Text(f"{words.figure(first, digits)} → ")
        value.append(words.figure(last, digits), style="bold")
        low, high = (run.column(f"{column}/{end}").get(max(curve)) for end in ("low", "high"))
        if low is not None and high is not None and width >= INTERVALS:
            value.append(f" [{words.figure(low, digits)}, {words.figure(high, digits)}]", style="dim")
        if len(curve) > 1 and width >= RANGES:
            value.append(f"  {words.spread(curve.values(), digits)}", style="dim")
        table.add_row(Text(printable(name)), sparkline(run, curve, spark), value)
    return table


def _families(run: Run) -> list[str]:
    """Told from the newest rows: all of a long run would take as long as the rest of the picture."""
    newest = [dict(list(rows.items())[-RECENT:]) for rows in (run.training, run.validation)]
    return families([replace(run, training=newest[0], validation=newest[1])])


def _rows(run: Run) -> list[tuple[str, str, int]]:
    """(name, column, digits) of what is shown, where the run has it."""
    rows = [("reward", "reward/mean", 3)]
    if run.accuracy:
        rows.append((f"held-out {run.accuracy.removeprefix('val/')}", run.accuracy, 3))
    lengths = [(f"length, {w}", f"rollout/response_length/{w}", 1) for w in ("right", "wrong")]
    rows += lengths if run.column(lengths[0][1]) else [("length", "rollout/response_length", 1)]
    rows += [("truncated", "rollout/truncated", 3), ("entropy", "rollout/entropy", 3)]
    for family in _families(run):
        options = [
            (f"{family} / step 0", f"val/thoughts/{family}_ratio"),
            (f"{family} / step 0", f"thoughts/{family}_ratio"),
        ]
        options.append((f"{family} a response", f"thoughts/{family}"))
        named = next(((n, c) for n, c in options if len(run.column(c)) > 1), None)
        if named and any(run.column(named[1]).values()):
            rows.append((named[0], named[1], 2))
    return [*rows, ("alignment, cosine", "alignment/cosine", 3), ("gradient norm", "optim/grad_norm", 3)]


def sparkline(run: Run, curve: Mapping[int, float], width: int) -> Text:
    """Means of the values in equal stretches of steps, up to the planned end, from the smallest to the largest."""
    end = max(run.max_steps or 0, run.steps, 1)
    bins: dict[int, list[float]] = {}
    for step, value in curve.items():
        bins.setdefault(min(width - 1, int(step / end * width)), []).append(value)
    means = {i: math.fsum(v) / len(v) for i, v in bins.items()}
    low, high = min(means.values()), max(means.values())
    text, level = Text(), ""
    for i in range(max(means) + 1):
        if i in means:  # between two evaluations the line stays
            share = (means[i] - low) / (high - low) if high > low else 0.5
            level = BLOCKS[min(7, int(share * 8))]
        style = colour(run, (i + 0.5) / width * end)
        text.append(level or " ", style=style if i in means else f"dim {style}")
    return text


def _times(run: Run, width: int) -> Text:
    rows = list(run.training.values())[-RECENT:]
    means = {part: math.fsum(finite(row, f"time/{part}") for row in rows) / len(rows) for part in TIMES}
    total = math.fsum(means.values())
    text = Text("time")
    if not total:
        return text.append(" not known")
    text.append(f"  {words.figure(total, 2)} s a step, of the last {len(rows)}\n", style="dim")
    size = max(10, min(width - 2, 100))
    ends, done, behind = [], 0, 0.0
    for part, style in zip(TIMES, PARTS, strict=True):
        behind += means[part]
        cells = round(behind / total * size) - done
        text.append("█" * cells, style=style)
        done += cells
        if means[part] >= 0.01 * total:
            ends.append((part.replace("_", " "), means[part] / total, style))
    text.append("\n")
    for name, share, style in ends:
        text.append("■ ", style=style)
        text.append(f"{name} {share:.0%}   ")
    return text


def _samples(run: Run, number: int, width: int) -> list[RenderableType]:
    """The newest, right and wrong where there are both."""
    shown: list[RenderableType] = []
    names = _families(run)
    newest = [s for s in reversed(run.samples) if s.get("step") == run.samples[-1].get("step")][: number * 4]
    mixed = sorted(range(len(newest)), key=lambda i: (_nth_of_kind(newest, i), i))
    for i in mixed[:number]:
        sample = newest[i]
        right = is_right(sample["reward"])
        head = Text().append("✓ " if right else "✗ ", style="bold green" if right else "bold red")
        kind = printable(str(sample.get("kind") or "")).replace("_", " ")
        asked = printable(str(sample.get("prompt", ""))).strip("↵ ")
        truth = printable(str(sample.get("ground_truth", "")))[:60]
        head.append(f"step {sample.get('step')} {kind}  ", style="dim")
        head.append(asked if len(asked) <= 60 else f"…{last_part(asked, 60)}")
        head.append(f"  truth {truth}", style="dim")
        shown += [head, Padding(_response(sample, names), (0, 0, 0, 2), expand=False)]
    return [Text(), Rule("newest samples", align="left", style="bright_black"), *shown] if shown else []


def _nth_of_kind(samples: Sequence[Mapping[str, Any]], i: int) -> int:
    """How many before it are as right or wrong as it is."""
    rights = [is_right(s["reward"]) for s in samples[: i + 1]]
    return rights[:-1].count(rights[-1])


def _response(sample: Mapping[str, Any], names: Sequence[str]) -> Text:
    text = Text(printable(str(sample.get("response", ""))), overflow="ellipsis")
    used: list[str] = []
    for start, end, family in spans(sample):
        if family in names and end <= SHOWN:
            text.stylize(MARKS[names.index(family) % len(MARKS)], start, end)
            used += [family] if family not in used else []
    text.truncate(SHOWN, overflow="ellipsis")
    for name in used:
        text.append(" ")
        text.append(f" {printable(name)} ", style=MARKS[names.index(name) % len(MARKS)])
    return text


def _printable(value: Any) -> Any:
    """The same of all text in a file's value."""
    if isinstance(value, Mapping):
        return {_printable(k): _printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_printable(v) for v in value]
    return printable(value) if isinstance(value, str) else value
