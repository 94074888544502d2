"""Which folders a command line means: all versions for a report, the newest one to watch."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from prerl_lightning.errors import InputError, near_folder
from prerl_lightning.report.files import FILES


def expand(given: Sequence[str]) -> list[Path]:
    """The run folders that arguments mean: a run itself, or all version_N below a folder, without doubles.

    Raises:
        InputError: no such folder, or no run in it.
    """
    found: dict[Path, Path] = {}
    for item in given:
        path = _folder(item)
        below = [path] if _has(path, FILES[:1]) else versions(path, FILES[:1])
        if not below:
            raise InputError(
                f"{item}: no metrics.csv in it, and no version_N folder that has one. "
                "Give the folder of a run, e.g. runs/dsrl/version_0, or of its versions, runs/dsrl. (Lightning's "
                "CSVLogger, the default, writes metrics.csv.)"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def passed_over(given: Sequence[str]) -> list[Path]:
    """The version_N folders below these that `expand` leaves out: they have a file of a run, and no metrics.csv."""
    return [p for item in given for p in versions(Path(item), FILES) if not _has(p, FILES[:1])]


def find(given: str | None) -> Path:
    """The one run that an argument means: itself, or its newest version; None: the newest below runs/.

    Raises:
        InputError: there is none.
    """
    if given is None:
        folders = [p for p in Path("runs").glob("*/version_*") if _has(p, FILES)]
        # one with a configuration alone is starting, or never started: it is taken where there is nothing else
        found = newest([p for p in folders if _has(p, FILES[:2])] or folders)
        if found is None:
            raise InputError(
                "prerl watch: no run below runs/ here. Give its folder; it appears some 15 s after the start."
            )
        return found
    path = _folder(given)
    if _has(path, FILES):
        return path
    numbered = versions(path, FILES)
    if not numbered:
        raise InputError(f"{given}: no run in it: neither metrics.csv nor run.json, and no version_N that has one.")
    return numbered[-1]


def below(folder: Path) -> list[Path]:
    """All runs in a folder, itself included, however deep; nothing is looked for inside one.

    Raises:
        InputError: no such folder.
    """
    found = []
    for name, inner, _ in os.walk(_folder(str(folder))):
        path = Path(name)
        if _has(path, FILES if re.fullmatch(r"version_\d+", path.name) else FILES[:2]):
            found.append(path)
            inner.clear()
    return found


def versions(path: Path, files: Sequence[str]) -> list[Path]:
    """version_0, version_1, ... below a folder that have one of these files, by number."""
    found = [p for p in path.glob("version_*") if re.fullmatch(r"version_\d+", p.name) and _has(p, files)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("version_")))


def newest(folders: Iterable[Path]) -> Path | None:
    """By when one of its files was last written."""

    def written(folder: Path) -> float:
        return max((file.stat().st_mtime for name in FILES if (file := folder / name).is_file()), default=0.0)

    return max(folders, key=written, default=None)


def _folder(item: str) -> Path:
    path = Path(item)
    if path.is_file():
        raise InputError(f"{item} is a file. Give the run's folder: {path.parent}")
    if not path.is_dir():
        raise InputError(f"{item}: no such folder.{near_folder(item)} A run's folder is e.g. runs/dsrl/version_0.")
    return path


def _has(path: Path, files: Sequence[str]) -> bool:
    return any((path / name).is_file() for name in files)
