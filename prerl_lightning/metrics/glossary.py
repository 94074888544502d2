"""Every column of metrics.csv with its unit and meaning, from assets/metrics.yaml: `prerl help metrics`, the
documentation's glossary and the words at the report's figures are all of it.

A held-out column is also there as test/... (of `prerl test`) and, of a set of ``data.val_more``, as val/SET/...; a
measure's 95 % interval over problems ends at .../low and .../high.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import yaml

PLACES = {"{k}": r"\d+", "{family}": r"(?:seal/)?[^/]+", "{part}": r"[^/]+"}


@dataclass(frozen=True)
class Column:
    """``when``: the setting that has it measured, empty where it always is."""

    name: str
    unit: str
    text: str
    when: str
    pattern: re.Pattern[str]


@cache
def glossary() -> dict[str, tuple[str, tuple[Column, ...]]]:
    """Group -> what is said of all of it, and its columns."""
    text = (Path(__file__).parents[1] / "assets" / "metrics.yaml").read_text(encoding="utf-8")
    return {
        group: (found["about"], tuple(_column(name, **values) for name, values in found["columns"].items()))
        for group, found in yaml.safe_load(text).items()
    }


def _column(name: str, unit: str, text: str, **rest: str) -> Column:
    parts = re.split(r"(\{[^}]*\})", name)
    pattern = "".join(PLACES.get(p, f"(?:{p[1:-1]})") if p.startswith("{") else re.escape(p) for p in parts)
    return Column(name, unit, text, rest.get("with", ""), re.compile(pattern))


def names(families: Sequence[str]) -> set[str]:
    """Columns by their full names, of these families of thoughts; those with a number or a part in it are left out."""
    found: set[str] = set()
    for each in (each for _, of_group in glossary().values() for each in of_group):
        pieces = [p for p in re.split(r"(\{[^}]*\})", each.name) if p]
        if not {"{k}", "{part}"} & set(pieces):
            ways = [families if p == "{family}" else p.strip("{}").split("|") for p in pieces]
            found |= {"".join(way) for way in product(*ways)}
    return found


@cache
def column(name: str) -> Column | None:
    """What a column of metrics.csv is; None: not one of ours."""
    held_out = re.sub(r"^(?:test|val)/", "val/", name)
    of_set = re.sub(r"^val/[\w.-]+/", "val/", held_out)
    ways = [way.removesuffix(end) for way in (held_out, of_set) for end in ("", "/low", "/high")]
    columns = [each for _, of_group in glossary().values() for each in of_group]
    return next((each for way in (name, *ways) for each in columns if each.pattern.fullmatch(way)), None)
