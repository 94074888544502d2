"""Numbers and runs in words, for the page and the terminal."""

import math
from collections.abc import Callable, Iterable, Sequence

from prerl_lightning.report.compare import Group, Sooner
from prerl_lightning.report.figures import families
from prerl_lightning.report.files import inside, is_number
from prerl_lightning.report.runs import Run

RARE = 0.01  # a response: below it a family of thoughts is not worth a word


def duration(seconds: float | None) -> str:
    """65 is 1 min 5 s."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def steps(number: int) -> str:
    return f"{number:,} step{'s' if number != 1 else ''}"


def count(value: float | None) -> str:
    """857344 is 0.86 M."""
    if value is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size * 0.1 and value >= 1e5:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def figure(value: float | None, digits: int = 3) -> str:
    """0.36328 is 0.363; large and small ones keep three digits."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits - 1}e}" if abs(value) < 1e-3 else f"{value:,.0f}"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"


def spread(values: Iterable[float], digits: int = 3) -> str:
    """0.1 to 0.3"""
    known = list(values)
    return f"{figure(min(known), digits)} to {figure(max(known), digits)}"


def times(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.2f}\u00d7"


def shares(values: Sequence[float]) -> str:
    """50, 80 and 95 %"""
    *most, last = (f"{100 * value:.0f}" for value in values)
    return f"{', '.join(most)} and {last} %" if most else f"{last} %"


def some(number: int, of: str) -> str:
    """1 seed, 2 seeds"""
    return f"{number:,} {of}{'s' * (number != 1)}"


def sooner(found: Sooner) -> str:
    """0.77× (0.73 to 0.80; never in 1 of 3); never"""

    def missed(who: str, steps: Sequence[float | None]) -> list[str]:
        return [f"{who}never in {n} of {len(steps)}"] if (n := steps.count(None)) else []

    ratios, mine = found.ratios, [pair.group for pair in found.pairs]
    baseline = missed("baseline ", [pair.baseline for pair in found.pairs])
    if mine.count(None) == len(mine):
        head, said = "never", baseline
    else:
        around = [f"{min(ratios):.2f} to {max(ratios):.2f}"] if len(ratios) > 1 else []
        head, said = times(found.mean), [*around, *missed("", mine), *baseline]
    return head + (f" ({'; '.join(said)})" if said else "")


def order(found: Sequence[Sooner]) -> str:
    """sooner, where it is at all shares, else: sooner at 50 %, undecided at 80 and 95 %"""
    names = {1: "sooner", -1: "later", 0: "undecided"}
    at = {name: [s.share for s in found if names[s.order] == name] for name in names.values()}
    there = {name: of for name, of in at.items() if of}
    return next(iter(there)) if len(there) == 1 else ", ".join(f"{n} at {shares(of)}" for n, of in there.items())


def model(run: Run) -> str:
    said = run.info.get("model") or inside(run.config, "model", "init_args").get("model")
    parameters = run.info.get("parameters")
    return f"{said or 'unknown model'}{f' ({count(parameters)} parameters)' if parameters else ''}"


def ended(run: Run, lives: Sequence[tuple[str, int]]) -> list[str]:
    """Why those of its ``lives`` that another follows ended ahead of their time."""
    return [f"{lives[n - 1][0]} ended: {why}" for n, why in run.endings.items() if why and n < len(lives)]


def problems(run: Run, which: str) -> str | None:
    """data.train or data.val in a few words: ArithmeticProblems (train, 4,096)."""
    part = inside(run.config, "data", which)
    if not part.get("class_path"):
        return None
    given = inside(part, "init_args")
    if "problems" in given:  # a Source
        part, given = given["problems"], inside(given, "problems", "init_args")
    named = [*inside(given, "sets")]  # of a Mixture
    named += [str(given[k]) for k in ("name", "path", "config", "split", "task") if given.get(k)]
    size = next((f"{given[k]:,}" for k in ("size", "limit") if isinstance(given.get(k), int)), None)
    inner = ", ".join([*named, size] if size else named)
    return str(part["class_path"]).rpartition(".")[2] + (f" ({inner})" if inner else "")


def machine(run: Run) -> str | None:
    said = inside(run.info, "machine")
    listed = said.get("gpus")
    gpus = [str(inside(g).get("name", g)) for g in listed] if isinstance(listed, list) else []
    parts = [", ".join(f"{gpus.count(g)} \u00d7 {g}" for g in dict.fromkeys(gpus))] if gpus else []
    parts += [str(said["cpu"])] if said.get("cpu") else []
    parts += [some(said["cores"], "core")] if is_number(said.get("cores")) else []
    parts += [f"{said['memory_gib']:.3g} GiB"] if is_number(said.get("memory_gib")) else []
    return ", ".join(parts) or None


def ends(group: Group, column: str) -> list[tuple[int, list[float]]]:
    """The first and the last step at which a run has a value, with the values there of the runs that have one."""
    curves = [run.column(column) for run in group.runs]
    steps = {step for curve in curves for step in curve}
    return [(s, [c[s] for c in curves if s in c]) for s in sorted({min(steps), max(steps)})] if steps else []


def part_of(group: Group, number: int) -> str:
    """1 of 2 runs; nothing where all are meant."""
    return f"{number} of {len(group.runs)} runs" if number < len(group.runs) else ""


def around(
    group: Group, column: str, step: int, values: Sequence[float], shown: Callable[[float], str] = figure
) -> str:
    """How far values lie apart: one run's 95 % interval, several runs' range; and how many of the runs they are of."""
    some = part_of(group, len(values))
    if len(values) > 1:
        return f"({shown(min(values))} to {shown(max(values))}{f'; {some}' if some else ''})"
    run = next(r for r in group.runs if step in r.column(column))
    low, high = (run.column(f"{column}/{end}").get(step) for end in ("low", "high"))
    # an interval without an upper end has no /high in the file
    known = f"[{shown(low)}, {'∞' if high is None else shown(high)}]" if low is not None else ""
    return " ".join(part for part in (known, f"({some})" if some else "") if part)


def fell(run: Run) -> str:
    """Held-out avg@8 fell from 0.270 [0.220, 0.320] at step 10 to 0.030 [0.010, 0.050] at step 20; or nothing."""
    if run.fall is None or run.accuracy is None:
        return ""
    curve, low, high = (run.column(f"{run.accuracy}{end}") for end in ("", "/low", "/high"))
    at = [(s, curve[s], low.get(s), high.get(s)) for s in run.fall]
    ends = [f"{figure(value)} [{figure(a)}, {figure(b)}] at step {step:,}" for step, value, a, b in at]
    return f"held-out {run.accuracy[4:]} fell from {' to '.join(ends)}"


def moved(run: Run) -> list[tuple[str, str]]:
    """From first to last of what is held out. ``held out``: avg@8 0.22 -> 0.64; ``thoughts``: wait 0.43 -> 2.9 a
    response (x 6.7), of the two families that moved most of those that occur."""
    accuracy = run.column(run.accuracy) if run.accuracy else {}
    if len(accuracy) < 2:
        return []
    said = [("held out", f"{str(run.accuracy)[4:]} {accuracy[min(accuracy)]:.2f} -> {accuracy[max(accuracy)]:.2f}")]
    found = []
    for family in families([run]):
        curve = run.column(f"val/thoughts/{family}")
        first, last = (curve[end(curve)] for end in (min, max)) if curve else (0.0, 0.0)
        if max(first, last) >= RARE:
            ratio = f" (x {last / first:.2g})" if first else ""
            text = f"{family} {first:.2g} -> {last:.2g} a response{ratio}"
            found.append((-abs(math.log((last + RARE) / (first + RARE))), text))
    most = ", ".join(text for _, text in sorted(found)[:2])
    return [*said, ("thoughts", most)] if most else said


def totals(group: Group) -> tuple[int, float, float]:
    """Of the runs that count (`Group.counted`): steps, the most; responses and seconds, means."""
    runs = group.counted
    responses = math.fsum(max(run.samples_seen.values()) for run in runs)
    seconds = math.fsum(max(run.seconds.values()) for run in runs)
    return max(run.steps for run in runs), responses / len(runs), seconds / len(runs)
