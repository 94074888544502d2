"""The file of an evaluation, FOLDER/SET.jsonl: its settings, then a line a problem.

A problem's line is written as soon as its batch is verified, so that a killed evaluation goes on behind the last whole
one; since a sample's seed depends on its problem alone, it ends as if it had never stopped.

FOLDER/summary.json has the measures of all sets that are whole there.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prerl_lightning.errors import InputError, near_folder

if TYPE_CHECKING:
    from prerl_lightning.rollout.sampler import Group

log = logging.getLogger(__name__)

Record = dict[str, Any]  # a line: row, prompt, ground_truth, samples, greedy


class ResultFile:
    """Opened to be written, or gone on with.

    Attributes:
        records: of the problems that are done, by row.

    Raises:
        InputError: the file is there and was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[int, Record] = {}
        settings = json.loads(json.dumps(settings))  # as they are read: a tuple is a list there
        if lines := _whole_lines(path) if path.is_file() else []:
            found, there = _parsed(path, lines)
            changed = [k for k in settings if found.get(k) != settings[k]]
            differing = [
                "other prompts" if k == "prompts" else f"{k}: {found.get(k)} there, {settings[k]} here" for k in changed
            ]
            if differing:
                raise InputError(
                    f"{path} is of an evaluation with other settings ({'; '.join(differing)[:600]}). Give another "
                    "--out, or delete it."
                )
            self.records = {r["row"]: r for r in there}
            os.truncate(path, sum(map(len, lines)))  # a kill may have left half a line
            log.info("%s: going on behind %d problems", path.name, len(there))
        else:
            path.write_bytes(b"")  # likewise of the first line
            self._write([{"settings": settings}])

    def append(self, records: Sequence[Record]) -> None:
        self._write(records)
        self.records |= {r["row"]: r for r in records}

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("ab") as file:
            # one write, so that what a full disk or a kill leaves is a beginning of it
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def common_sets(a: str | Path, b: str | Path) -> list[str]:
    """Names of the files that two folders of evaluations both have.

    Raises:
        InputError: a folder is missing, or there is none.
    """
    for folder in (a, b):
        if not Path(folder).is_dir():
            raise InputError(f"prerl compare: {folder}: no such folder.{near_folder(folder)}")
    names = sorted({p.name for p in Path(a).glob("*.jsonl")} & {p.name for p in Path(b).glob("*.jsonl")})
    if not names:
        raise InputError(f"prerl compare: {a} and {b} have no set in common.")
    return names


def read_results(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """Settings, and a record a problem: ``row``, ``prompt``, ``ground_truth``, ``samples`` and ``greedy`` (None where
    there was none), each answer with ``text``, ``score``, ``answer``, ``failure``, ``tokens`` and ``truncated``.

    Raises:
        InputError: there is no such file, or it is another.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    return _parsed(path, _whole_lines(path))


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _parsed(path: Path, lines: Sequence[bytes]) -> tuple[dict[str, Any], list[Record]]:
    try:
        first, *records = map(json.loads, lines)
        return first["settings"], records
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is no result of prerl evaluate. A run is evaluated first: prerl evaluate --config "
            "RUN/config.yaml --model RUN/model --out FOLDER"
        ) from None


def whole_sets(
    folder: Path, settings: Mapping[str, Any], but: Collection[str] = ()
) -> Iterator[tuple[str, list[Record]]]:
    """Names and records of the sets in ``folder``, ``but`` for these, that have all their problems and these settings;
    of those that have not the log says so."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            there, found = read_results(path)
        except InputError:  # a file of another kind
            continue
        if there.get("set") in but:
            continue
        other = [key for key, value in settings.items() if there.get(key) != value]
        if other or len(found) < there["problems"]:
            why = f"made with another {other[0]}" if other else f"{len(found)} of {there['problems']} problems are done"
            log.warning("%s is left out of summary.json: %s", path.name, why)
        else:
            yield there["set"], found


def write_summary(folder: Path, measures: Mapping[str, Mapping[str, float]]) -> None:
    """Of each set, whole or not at all."""
    new = folder / "summary.json.new"
    new.write_text(json.dumps(dict(sorted(measures.items())), indent=1) + "\n")
    os.replace(new, folder / "summary.json")


def records(samples: "Sequence[Group]", greedy: "Sequence[Group]") -> list[Record]:
    """Of problems, and of their greedy responses where there are any."""
    greedy_of = {group.prompt.row: group for group in greedy}
    return [_record(group, greedy_of.get(group.prompt.row)) for group in samples]


def _record(samples: "Group", greedy: "Group | None") -> Record:
    def answers(group: "Group") -> list[dict[str, Any]]:
        return [
            {
                "text": response.text,
                "score": verdict.score,
                "answer": verdict.answer,
                "failure": verdict.failure,
                "tokens": len(response.token_ids),
                "truncated": response.truncated,
            }
            for response, verdict in zip(group.responses, group.verdicts, strict=True)
        ]

    return {
        "row": samples.prompt.row,
        "prompt": samples.prompt.text,
        "ground_truth": samples.prompt.ground_truth,
        "samples": answers(samples),
        "greedy": answers(greedy)[0] if greedy is not None else None,
    }
