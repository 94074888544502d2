"""The small files of a run, of which any may be missing, broken or of another hand: what is of the wrong kind is left
out with a note, so that nothing behind this module needs to ask."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from prerl_lightning.secrets import hide_in_command, hide_in_text

Line = dict[str, Any]
INFO: dict[str, Any] = {
    "name": str, "command": list, "started": str, "status": str, "error": str, "resumed_from": str, "lives": list,
    "endings": dict, "model": str, "parameters": int | float, "world_size": int, "max_steps": int, "thoughts": dict,
    "machine": dict, "versions": dict, "warnings": list, "process": dict,
}  # fmt: skip


FILES = ("metrics.csv", "run.json", "config.yaml")  # by any of which a run that is starting can be told


def last_written(folder: Path, begun: bool) -> float:
    """When metrics.csv was, seconds since 1970; of a run that has not ``begun`` to train also run.json, written at its
    start; where there is neither, config.yaml. 0: there is none of them."""

    def times(names: Sequence[str]) -> list[float]:
        return [file.stat().st_mtime for name in names if (file := folder / name).is_file()]

    return max(times(FILES[:1] if begun else FILES[:2]) or times(FILES), default=0.0)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def inside(config: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at these keys, one below the other; empty where something else is there."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def read_info(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """run.json, and notes on what in it cannot be read."""
    try:
        value = json.loads((folder / "run.json").read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return {}, ["run.json cannot be read"]
    odd = [k for k, kind in INFO.items() if value.get(k) is not None and not isinstance(value[k], kind)]
    if "lives" not in odd and not all(_is_life(life) for life in value.get("lives") or []):
        odd.append("lives")
    if "warnings" not in odd and not all(isinstance(said, str) for said in value.get("warnings") or []):
        odd.append("warnings")
    kept = {k: v for k, v in value.items() if k not in odd}
    if kept.get("command"):  # as RunRecord writes it, but not everything was written by it
        kept["command"] = hide_in_command([str(word) for word in kept["command"]])
    if kept.get("error"):
        kept["error"] = next(iter(kept["error"].strip().splitlines()), "")  # without the traceback that may follow
    return kept, [f"run.json: {', '.join(odd)} of an unknown form"] if odd else []


def _is_life(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and is_number(value[1])


def read_config(folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """config.yaml as a mapping and as text, and notes; empty where there is none, or what is there is no mapping."""
    try:
        text = hide_in_text((folder / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}, "", []
    try:
        value = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2026-99-99
        value = None
    return (value, text, []) if isinstance(value, dict) else ({}, text, ["config.yaml cannot be read"])


def read_json_lines(path: Path, fits: Callable[[Line], bool]) -> tuple[tuple[Line, ...], int]:
    """The file's lines that fit, and how many do not; a missing file is an empty one."""
    found, bad = [], 0
    if not path.is_file():
        return (), 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            value = parsed(line)
            if value is not None and fits(value):
                found.append(value)
            else:
                bad += 1
    return tuple(found), bad


def parsed(line: str) -> Line | None:
    """A line of JSON that is an object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_right(reward: float) -> bool:
    """As in `metrics.evaluation.is_right`, without torch."""
    return reward > 1 - 1e-6


def is_sample(line: Mapping[str, Any]) -> bool:
    """It has at least a step, a response and a reward."""
    return isinstance(line.get("step"), int) and isinstance(line.get("response"), str) and is_number(line.get("reward"))


def is_measured(line: Mapping[str, Any]) -> bool:
    """It has at least a step, a cosine and a reward."""
    return isinstance(line.get("step"), int) and is_number(line.get("cosine")) and is_number(line.get("reward"))


def is_part(value: Mapping[str, Any]) -> bool:
    """Of a measured response: it has a number of tokens and a cosine."""
    return is_number(value.get("tokens")) and is_number(value.get("cosine"))


def is_held_out(line: Mapping[str, Any]) -> bool:
    """It has a step, k, and as many scores and counts of right samples as rows; so have the families it counts."""
    rows, thoughts = line.get("rows"), line.get("thoughts", {})
    if not isinstance(line.get("step"), int) or not isinstance(line.get("k"), int) or not isinstance(rows, list):
        return False
    lists = [line.get("score"), line.get("right"), *(thoughts.values() if isinstance(thoughts, dict) else [None])]
    return all(isinstance(a, list) and len(a) == len(rows) > 0 and all(map(is_number, a)) for a in lists)


def spans(sample: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """(start, end, family) of a sample's thoughts that lie in its response, in order and without overlap."""
    given = sample.get("thoughts")
    able = [s for s in given if isinstance(s, list) and [type(v) for v in s] == [int, int, str]] if isinstance(
        given, list
    ) else []  # fmt: skip
    found: list[tuple[int, int, str]] = []
    for start, end, family in sorted(able):
        if 0 <= start < end <= len(sample["response"]) and (not found or start >= found[-1][1]):
            found.append((start, end, family))
    return found


def run_name(folder: Path, info: Mapping[str, Any]) -> tuple[str, str]:
    """("dsrl", "version_0") of runs/dsrl/version_0; ("mine", "") of any other folder mine."""
    folder = folder.resolve()
    numbered = re.fullmatch(r"version_\d+", folder.name)
    name = info.get("name") or (folder.parent.name if numbered else folder.name)
    return name, folder.name if numbered else ""
