"""Problem sets from files and from the Hugging Face hub. All are checked in `load`, before the engine starts."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prerl_lightning import hub
from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError, check_bounds, in_one_line
from prerl_lightning.types import Problem

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


class RowProblems(ProblemSet):
    """Rows held in memory, each with a prompt, a ground truth and further columns."""

    def __init__(self, source: str, limit: int | None) -> None:
        self.source, self.limit = source, limit
        check_bounds(self, type(self).__name__, {"limit": 1})
        self.problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def _fill(self, rows: Sequence[Row], prompt: str, answer: str) -> None:
        """One problem a row; chat messages or text in ``prompt``, anything but None in ``answer``."""
        self.problems = []
        if not rows:
            raise InputError(f"{self.source}: it holds no rows.")
        for number, row in enumerate(rows if self.limit is None else rows[: self.limit]):
            text, truth = row.get(prompt), row.get(answer)
            if truth is None:
                raise InputError(f"{self.source}, row {number}: {answer!r} is missing.")
            if isinstance(text, str):
                checked: str | list[dict[str, str]] = text
            elif isinstance(text, list) and text and all(_is_message(m) for m in text):
                checked = [{"role": m["role"], "content": m["content"]} for m in text]
            else:
                raise InputError(
                    f"{self.source}, row {number}: {prompt!r} is neither text nor a list of chat messages "
                    f"(role and content), but {str(text)[:80]!r}."
                )
            extra = {k: v for k, v in row.items() if k not in (prompt, answer)}
            self.problems.append(Problem(number, checked, str(truth), extra))
        empty = [str(p.row) for p in self.problems if not p.ground_truth.strip()]
        if empty:
            log.warning(
                "%s: %d rows have an empty ground truth, which an empty box equals: rows %s",
                *(self.source, len(empty), ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")),
            )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("role", "content"))


# ---------------------------------------------------------------------- rows from where they lie


def check_columns(source: str, found: Sequence[str], *needed: str) -> None:
    for column in needed:
        if column not in found:
            raise InputError(f"{source}: no column {column!r}; its columns are {', '.join(sorted(found))}.")


def file_rows(source: str) -> list[dict[str, Any]]:
    """Of a parquet file (by its first bytes), else JSON lines."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file (looked for from {Path.cwd()}).")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty.")
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    return _parquet_rows(path) if parquet else _json_rows(path)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: the parquet file cannot be read ({error}).") from None


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}), and the file is not parquet.") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not a JSON object.")
            rows.append(row)
    return rows


def is_verl(rows: Sequence[Row]) -> bool:
    return bool(rows) and "prompt" in rows[0] and "reward_model" in rows[0]


def verl_rows(source: str, rows: Sequence[Row], fold: bool = True) -> list[dict[str, Any]]:
    """With ``ground_truth`` as a column. ``fold``: where every problem stands there equally often, more than once (the
    20-fold files for avg@20), one of each."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    unfolded = []
    for number, row in enumerate(rows):
        check_columns(source, list(row), "prompt", "reward_model")
        model = row["reward_model"]
        if not isinstance(model, dict) or "ground_truth" not in model:
            raise InputError(f"{source}, row {number}: reward_model has no field 'ground_truth'.")
        unfolded.append({**row, "ground_truth": model["ground_truth"]})
        key = (repr(row["prompt"]), str(model["ground_truth"]))
        counts[key] += 1
        found.setdefault(key, unfolded[-1])
    copies = set(counts.values())
    if not fold or len(copies) != 1 or copies == {1}:
        return unfolded
    log.info("%s: %d problems, each %d times: folded", source, len(found), copies.pop())
    return list(found.values())


def hub_rows(
    name: str, config: str | None, split: str, columns: Sequence[str], revision: str | None = None
) -> list[dict[str, Any]]:
    """Through `datasets`, from the hub, its cache, or a local folder."""
    hub.look()
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds: unknown id, no network, unknown split
        raise InputError(
            f"{name} ({config or 'default'}, {split}): could not be loaded from the Hugging Face hub: "
            f"{in_one_line(error)}. Without network, bring its {split} split as a file (parquet or JSON lines with the "
            f"columns {', '.join(columns)}) and give its path."
        ) from error
    check_columns(name, table.column_names, *columns)
    return table.to_list()


# ---------------------------------------------------------------------- problem sets


class VerlParquet(RowProblems):
    """verl's format: ``prompt`` (chat messages), ``reward_model.ground_truth``, ``data_source``.

    Args:
        path: of the parquet file.
        limit: use the first so many rows.
        fold: of a file that holds every problem equally often (20 copies for avg@20), use one copy.
    """

    def __init__(self, path: str, limit: int | None = None, fold: bool = True) -> None:
        super().__init__(path, limit)
        self.fold = fold

    def load(self) -> None:
        self._fill(verl_rows(self.source, file_rows(self.source), self.fold), "prompt", "ground_truth")


class JSONLines(RowProblems):
    """One JSON object a line; or a parquet file.

    Args:
        path: of the file.
        prompt: the column with text or chat messages.
        answer: the column with the ground truth.
        limit: use the first so many rows.
    """

    def __init__(self, path: str, prompt: str = "prompt", answer: str = "answer", limit: int | None = None) -> None:
        super().__init__(path, limit)
        self.prompt, self.answer = prompt, answer

    def load(self) -> None:
        rows = file_rows(self.source)
        for number, row in enumerate(rows):
            check_columns(f"{self.source}, row {number}", list(row), self.prompt, self.answer)
        self._fill(rows, self.prompt, self.answer)


class HubDataset(RowProblems):
    """A data set of the Hugging Face hub, or anything else `datasets.load_dataset` takes.

    Args:
        name: its id, e.g. ``openai/gsm8k``.
        prompt: the column with text or chat messages.
        answer: the column with the ground truth.
        split: of the data set.
        config: its configuration's name, e.g. ``main``.
        limit: use the first so many rows.
    """

    def __init__(
        self,
        name: str,
        prompt: str,
        answer: str,
        split: str = "train",
        config: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(name, limit)
        self.prompt, self.answer, self.split, self.config = prompt, answer, split, config

    def load(self) -> None:
        columns = (self.prompt, self.answer)
        self._fill(hub_rows(self.source, self.config, self.split, columns), *columns)
