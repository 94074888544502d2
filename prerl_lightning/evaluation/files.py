"""The file of an evaluation, FOLDER/SET.jsonl: its settings, then a line a problem.

A problem's line is written as soon as its batch is verified, so that a killed evaluation goes on behind the last whole
one; since a sample's seed depends on its problem alone, it ends as if it had never stopped.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
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
        if path.is_file() and path.stat().st_size:
            found, there, whole = _read(path)
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
            os.truncate(path, whole)  # a kill may have left half a line
            log.info("%s: going on behind %d problems", path.name, len(there))
        else:
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
    settings, records, _ = _read(Path(path))
    return settings, records


def _read(path: Path) -> tuple[dict[str, Any], list[Record], int]:
    """Settings, records, and the bytes that whole lines take."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        first, *records = map(json.loads, lines)
        return first["settings"], records, sum(map(len, lines))
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is no result of prerl evaluate. A run is evaluated first: prerl evaluate --config "
            "RUN/config.yaml --model RUN/model --out FOLDER"
        ) from None


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
