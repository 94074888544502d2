"""Problem sets from files and from the Hugging Face hub. All are checked in `load`, before the engine starts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError
from prerl_lightning.types import Problem


class _Rows(ProblemSet):
    """Rows held in memory, each with a prompt, a ground truth and further columns."""

    def __init__(self, source: str, limit: int | None) -> None:
        self.source, self.limit = source, limit
        self.problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def _file(self) -> Path:
        path = Path(self.source).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file (looked for from {Path.cwd()}).")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty.")
        return path

    def _columns(self, found: Sequence[str], *needed: str) -> None:
        for column in needed:
            if column not in found:
                raise InputError(f"{self.source}: no column {column!r}; its columns are {', '.join(sorted(found))}.")

    def _fill(self, rows: Sequence[Mapping[str, Any]], prompt: str, answer: str) -> None:
        """One problem a row; chat messages or text in ``prompt``, anything but None in ``answer``."""
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


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("role", "content"))


class VerlParquet(_Rows):
    """verl's format: ``prompt`` (chat messages), ``reward_model.ground_truth``, ``data_source``.

    Args:
        path: of the parquet file.
        limit: use the first so many rows.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        super().__init__(path, limit)

    def load(self) -> None:
        import pyarrow.parquet
        from pyarrow import ArrowInvalid

        try:
            table = pyarrow.parquet.read_table(self._file())
        except ArrowInvalid as error:
            raise InputError(f"{self.source}: not a parquet file ({error}).") from None
        self._columns(table.column_names, "prompt", "reward_model")
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            model = row["reward_model"]
            if not isinstance(model, dict) or "ground_truth" not in model:
                raise InputError(f"{self.source}, row {number}: reward_model has no field 'ground_truth'.")
            row["ground_truth"] = model["ground_truth"]
        self._fill(rows, "prompt", "ground_truth")


class JSONLines(_Rows):
    """One JSON object a line.

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
        rows = []
        with self._file().open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{self.source}, line {number}: not JSON ({error}).") from None
                if not isinstance(row, dict):
                    raise InputError(f"{self.source}, line {number}: not a JSON object.")
                self._columns(list(row), self.prompt, self.answer)
                rows.append(row)
        self._fill(rows, self.prompt, self.answer)


class HubDataset(_Rows):
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
        import datasets

        try:
            table = datasets.load_dataset(self.source, self.config, split=self.split)
        except Exception as error:  # the library raises many kinds: unknown id, no network, unknown split
            raise InputError(
                f"{self.source} ({self.config or 'default'}, {self.split}): could not be loaded from the Hugging Face "
                f"hub: {error}. Without network, bring the data as a file and use JSONLines or VerlParquet."
            ) from error
        self._columns(table.column_names, self.prompt, self.answer)
        self._fill(table.to_list(), self.prompt, self.answer)
