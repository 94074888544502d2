"""Effects with their intervals as an SVG that needs no script: one row each, around the value to compare with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prerl_lightning.report.html import tag
from prerl_lightning.report.words import figure

LABEL, PLOT, SAID, ROW = 270, 400, 300, 30  # pixels


@dataclass(frozen=True)
class Bar:
    """``line``: the value at the middle; ``log``: drawn in logs; ``flip``: small values are on the right;
    ``mark``: where a tick shows no effect; ``state``: of the style, as of a run."""

    label: str
    effect: float | None
    low: float | None
    high: float | None
    line: float
    log: bool = False
    flip: bool = False
    mark: float | None = None
    state: str = "undecided"


COLOURS = {"supported": "var(--right)", "refuted": "var(--wrong)", "undecided": "var(--soft)"}


def forest(bars: Sequence[Bar], title: str, ends: tuple[str, str], source: str, shared: bool = False) -> str:
    """``ends``: what lies left and right of the line. ``shared``: one scale for all rows, which have one line; else
    each has its own, and its figures beside it."""
    scaled = [_Scaled(bar) for bar in bars]
    widest = max((one.reach for one in scaled), default=1.0)
    height = ROW * len(bars) + 34
    middle = LABEL + PLOT / 2
    parts = [
        _line(middle, 6, middle, height - 24, "var(--ink)", 1.2),
        _text(LABEL, height - 6, f"← {ends[0]}", "start", "var(--soft)"),
        _text(LABEL + PLOT, height - 6, f"{ends[1]} →", "end", "var(--soft)"),
    ]
    for i, one in enumerate(scaled):
        y, bar = ROW * i + 22, one.bar
        size = PLOT / 2 / ((widest if shared else one.reach) * 1.1 or 1)
        colour = COLOURS[bar.state]
        parts.append(_text(0, y + 4, bar.label, "start", "var(--ink)"))
        if bar.mark is not None and one.at(bar.mark) != 0:
            x = middle + one.at(bar.mark) * size
            parts.append(_line(x, y - 6, x, y + 6, "var(--line)", 3))
        if bar.low is not None and bar.high is not None:
            left, right = sorted(middle + one.at(v) * size for v in (bar.low, bar.high))
            parts.append(_line(left, y, right, y, colour, 2.4))
        said = "no figure"
        if bar.effect is not None:
            x = middle + one.at(bar.effect) * size
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
            between = f" [{figure(bar.low)}, {figure(bar.high)}]" if bar.low is not None else ""
            said = f"{figure(bar.effect)}{between}" + ("" if shared else f", margin {figure(bar.line)}")
        parts.append(_text(LABEL + PLOT + 12, y + 4, said, "start", "var(--soft)"))
    width = LABEL + PLOT + SAID
    svg = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'style="width:100%;min-width:44rem;max-width:{width}px;font-size:13px">{"".join(parts)}</svg>'
    )
    head = tag("figcaption", tag("span", escape(title), class_="title"))
    inner = head + tag("div", svg, class_="scroll") + tag("p", escape(source), class_="source")
    return tag("figure", inner, class_="wide")


class _Scaled:
    """Positions relative to a bar's line; an infinite or missing one is left out."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        known = [v for v in (bar.effect, bar.low, bar.high, bar.mark) if v is not None]
        self.reach = max((abs(self.at(v)) for v in known), default=0.0)

    def at(self, value: float) -> float:
        bar = self.bar
        found = math.log(value / bar.line) if bar.log else value - bar.line
        return -found if bar.flip else found


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    style = f"stroke:{colour};stroke-width:{width};stroke-linecap:round"
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _text(x: float, y: float, said: str, anchor: str, colour: str) -> str:
    short = said if len(said) <= 44 else f"{said[:43]}…"
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" style="fill:{colour}">{escape(short)}</text>'
