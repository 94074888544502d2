"""Rows from where they lie: files of the usual formats, folders of them, saved data sets, the Hugging Face hub.

Parquet, Arrow, saved data sets and the hub go through `datasets`, whose tables stay on disk and are shared by ranks.
JSON and CSV do not: to make typed columns of them it changes answers (of "2" beside 2 it makes 2, of "2024-01-01" a
date, of a CSV file's "033" 33, of a whole number of 30 digits a rounded one). Lines of JSON are found once and parsed
when they are asked for, so that a million of them take no more memory than the file.
"""

import csv
import glob
import io
import json
import logging
import mmap
import os
import re
import sys
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np

from prerl_lightning import hub
from prerl_lightning.errors import InputError, in_one_line

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Buffer = bytes | mmap.mmap

KINDS = {
    **{".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"},
    **{".json": "json", ".jsonl": "json", ".ndjson": "json"},
}
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


class Rows(Sequence[Any]):
    """Rows, each a mapping (or a list, in JSON)."""

    def where(self, index: int) -> str:
        """For messages."""
        return f"row {index}"

    def of(self, columns: Sequence[str]) -> Iterator[Any]:
        """All rows, with these columns at least."""
        return iter(self)

    @abstractmethod
    def __getitem__(self, index: int) -> Any: ...  # type: ignore[override]


class Listed(Rows):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self.rows[index]


class Lines(Rows):
    """A JSON value a line; lines of blanks are none."""

    def __init__(self, path: Path, buffer: Buffer) -> None:
        self.path, self.buffer = path, buffer
        ends = [np.empty(0, np.int64)]
        whole = np.frombuffer(buffer, np.uint8)
        for start in range(0, len(whole), 1 << 26):
            ends.append(np.flatnonzero(whole[start : start + (1 << 26)] == ord("\n")) + start)
        self.ends = np.concatenate([*ends, [len(whole)]])
        self.starts = np.concatenate([[0], self.ends[:-1] + 1])
        if buffer[:3] == b"\xef\xbb\xbf":
            self.starts[0] = 3
        short = np.flatnonzero(self.ends - self.starts < 80)  # a line of more blanks is an error of the file
        blank = [i for i in short.tolist() if not buffer[self.starts[i] : self.ends[i]].strip()]
        self.numbers = np.delete(np.arange(len(self.ends)), blank)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        line = self.numbers[index]
        try:
            return json.loads(str(self.buffer[self.starts[line] : self.ends[line]], "utf-8"))
        except ValueError as error:
            raise InputError(f"{self.path}, line {line + 1}: not JSON ({error}).") from None
        except RecursionError:
            raise InputError(f"{self.path}, line {line + 1}: too many lists or objects within each other.") from None


class Table(Rows):
    """A `datasets.Dataset`."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return self.table[int(index)]

    def __iter__(self) -> Iterator[Any]:
        return self.of(self.table.column_names)

    def of(self, columns: Sequence[str]) -> Iterator[Any]:
        names = self.table.column_names
        # one column that is not there: whoever reads the row says which there are
        wanted = columns if columns and set(columns) <= set(names) else names
        for batch in self.table.select_columns(list(wanted)).iter(1000):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


class Joined(Rows):
    """Several files, one behind the other."""

    def __init__(self, parts: Sequence[Rows], names: Sequence[str]) -> None:
        self.parts, self.names = parts, names
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return f"{self.names[part]}, {self.parts[part].where(row)}"

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        part, row = self._place(index)
        return self.parts[part][row]

    def of(self, columns: Sequence[str]) -> Iterator[Any]:
        for part in self.parts:
            yield from part.of(columns)


# ---------------------------------------------------------------------- files


def as_text(paths: Paths) -> str | list[str]:
    return os.fspath(paths) if isinstance(paths, str | os.PathLike) else [os.fspath(path) for path in paths]


def open_files(paths: str | Sequence[str], split: str | None = None) -> Rows:
    """Of a file, a pattern (``data/*.jsonl``), a folder, a folder of ``save_to_disk``, or a list of these.

    Args:
        split: of a folder that holds several: files are told apart by ``train``, ``test`` and so on in their names.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    parts: list[tuple[str, Rows]] = []
    for given in [paths] if isinstance(paths, str) else paths:
        path = Path(given).expanduser()
        if path.is_dir():
            saved = _saved(path, split)
            parts += [(given, saved)] if saved is not None else _opened(_below(path, split))
        elif path.is_file():
            parts += _opened([path])
        else:
            found = sorted(f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file())
            if not found:
                what = "no file matches" if glob.has_magic(given) else "no such file"
                raise InputError(f"{given}: {what} (looked for from {Path.cwd()}).")
            parts += _opened(found)
    if not parts:
        raise InputError(f"{paths}: an empty list of files.")
    return parts[0][1] if len(parts) == 1 else Joined([rows for _, rows in parts], [name for name, _ in parts])


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _opened(paths: Sequence[Path]) -> list[tuple[str, Rows]]:
    if len(paths) > 1 and all(_kind(p) == "parquet" for p in paths):
        return [(str(paths[0].parent), _parquet(paths))]  # as one table
    return [(str(path), _one(path)) for path in paths]


def _one(path: Path) -> Rows:
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty.")
    with path.open("rb") as file:
        kind = "parquet" if file.read(4) == b"PAR1" else _kind(path) or "json"
    if kind == "parquet":
        return _parquet([path])
    if kind == "arrow":
        return Table(_datasets(path, "Dataset.from_file", str(path)))
    buffer = _buffer(path)
    return _csv(path, buffer) if kind == "csv" else _json(path, buffer)


def _buffer(path: Path) -> Buffer:
    if path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            return cast(bytes, stream.read())
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"{path}: it cannot be decompressed ({in_one_line(error)}).") from None


def _json(path: Path, buffer: Buffer) -> Rows:
    lines = Lines(path, buffer)
    if not len(lines):
        return lines
    try:
        first = lines[0]
        if len(lines) > 1 or not isinstance(first, list):
            return lines
    except InputError as not_lines:  # an array that is printed over several lines
        try:
            first = json.loads(str(buffer[lines.starts[0] :], "utf-8"))
        except (ValueError, RecursionError):
            raise not_lines from None
    if not isinstance(first, list):
        raise InputError(f"{path}: one JSON object over several lines; give an array of rows, or a row a line.")
    return Listed(first)


def _csv(path: Path, buffer: Buffer) -> Rows:
    csv.field_size_limit(sys.maxsize)  # of the field with a long solution
    separator = "\t" if ".tsv" in path.suffixes else ","
    try:
        text = str(buffer[:], "utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = reader.fieldnames or ()
        rows = list(reader)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: the CSV file cannot be read ({error}).") from None
    if len(names) == 1 and (other := re.search(r"[;\t|]", names[0])):
        raise InputError(
            f"{path}: its only column is {names[0]!r}. A CSV's separator is a comma here, not {other[0]!r}."
        )
    if twice := [name for name, times in Counter(names).items() if name and times > 1]:
        raise InputError(f"{path}: it has the column {twice[0]!r} more than once. Rename or remove one.")
    return Listed(rows)


def _parquet(paths: Sequence[Path]) -> Rows:
    return Table(_datasets(paths[0], "load_dataset", "parquet", data_files=[str(p) for p in paths], split="train"))


def _datasets(path: Path, name: str, *args: Any, **options: Any) -> Any:
    import datasets

    function: Any = datasets
    for part in name.split("."):
        function = getattr(function, part)
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs what it raises, too
    try:
        return function(*args, **options)
    except Exception as error:  # the library raises many kinds, with what is wrong as the cause
        raise InputError(f"{path}: it cannot be read ({in_one_line(error.__cause__ or error)}).") from None
    finally:
        log.setLevel(level)


def _saved(folder: Path, split: str | None) -> Rows | None:
    """Of ``save_to_disk``; None where it is another folder."""
    several = (folder / "dataset_dict.json").is_file()
    if not several and not (folder / "state.json").is_file():
        return None
    found = _datasets(folder, "load_from_disk", str(folder))
    if not several:
        return Table(found)
    if split is None and len(found) > 1:
        raise InputError(f"{folder}: it holds the splits {', '.join(found)}: say which in split.")
    return Table(_of_split(folder, found, split or next(iter(found))))


def _of_split(folder: Path, found: Any, split: str) -> Any:
    if split not in found:
        raise InputError(f"{folder}: it has no split {split!r}; there are {', '.join(sorted(found)) or 'none'}.")
    return found[split]


def _below(folder: Path, split: str | None) -> list[Path]:
    """Files of known formats, of one split."""
    files, splits = [], {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if _kind(path) and path.is_file() and not any(p.startswith((".", "dataset_info")) for p in inside.parts):
            files.append(path)
            # the part nearest to the file says it: test/train_like.jsonl is of neither's making
            for word in re.findall("[a-z]+", str(inside).lower()):
                if word in SPLITS or word == split:
                    splits[path] = word
    if not files:
        raise InputError(f"{folder}: no file with one of {', '.join(KINDS)} in it.")
    there: dict[str, list[Path]] = {}
    for path, word in splits.items():
        there.setdefault(word, []).append(path)
    if split is not None:
        return cast(list[Path], _of_split(folder, there, split))
    if len(there) > 1:
        raise InputError(f"{folder}: it holds the splits {', '.join(sorted(there))}: say which in split.")
    return files


# ---------------------------------------------------------------------- the hub


def open_hub(name: str, config: str | None, split: str, columns: Sequence[str], revision: str | None = None) -> Rows:
    """Through `datasets`, from the hub or its cache."""
    hub.look()
    import datasets

    try:
        return Table(datasets.load_dataset(name, config, split=split, revision=revision))
    except Exception as error:  # the library raises many kinds: unknown id, no network, unknown split
        raise InputError(
            f"{name} ({config or 'default'}, {split}): could not be loaded from the Hugging Face hub: "
            f"{in_one_line(error)}. Without "
            f"network, bring its {split} split as a file (parquet, JSON lines, CSV ... with the columns "
            f"{', '.join(columns)}) and give its path."
        ) from error
