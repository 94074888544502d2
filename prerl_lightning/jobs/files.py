"""What of this folder goes along with a job: its configuration files, the data and small models that they name, and the
modules with all that those import of this folder. By their places in the job's folder, which are those in this one."""

import ast
import glob
import gzip
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml

from prerl_lightning import shipped
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.refusals import config_files
from prerl_lightning.secrets import hidden_keys, hide

SECRET = (
    "would stand in the job's script. Take it out, and hand on the variable that its library reads: --env WANDB_API_KEY"
)


def arguments_and_files(rest: Sequence[str], files: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Those of `prerl fit`, each configuration file by its place in the job's folder, and these files. What they and
    the other arguments name of this folder comes to ``files``."""
    words = shipped.in_arguments(rest, lambda given: _configuration(given, files))
    for word, after in zip(rest, [*rest[1:], ""], strict=False):
        option, is_one, value = word.partition("=")
        if re.fullmatch(r"--(\w+\.)+\w+", option):
            _collect({option[2:]: _parsed(value if is_one else after)}, files)
    return words, config_files(rest)


def _configuration(given: str, files: dict[str, Path]) -> str:
    """Its place; a shipped one comes with the package, and goes by its name."""
    path = Path(given)
    if not path.is_file():
        if shipped.taken(given) is None:
            raise InputError(f"--config: {given}: no such file (looked for from {Path.cwd()}).{shipped.hint(given)}")
        return given
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config: {given}: not YAML: {in_one_line(error)}") from None
    if key := next(hidden_keys(hide(tree)), None):
        raise InputError(f"--config: {given}: {key}, a key or password, {SECRET}.")
    _collect(tree, files)
    there = path.resolve()
    # one from elsewhere lies beside the others
    return _add(files, there.relative_to(Path.cwd()) if there.is_relative_to(Path.cwd()) else Path(path.name), path)


def _parsed(value: str) -> Any:
    """A whole value on the command line may be YAML."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _collect(tree: Any, files: dict[str, Path]) -> None:
    """Files and folders that it names below ``model`` and ``data``, and modules with what those import."""
    for key, value in _strings(tree):
        if re.match(r"(model|data)\b", key) and value and not value.startswith(("/", "~")):
            for found in glob.glob(value, recursive=True):
                add_all(files, found, key)
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
            _add_module(files, value.partition(".")[0])


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """With their dotted keys."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, held in tree.items():
            yield from _strings(held, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for held in tree:
            yield from _strings(held, key)


def _add(files: dict[str, Path], place: Path, path: Path) -> str:
    name = place.as_posix()
    if files.setdefault(name, path).resolve() != path.resolve():
        raise InputError(f"prerl job: {files[name]} and {path} would be the same file, {name}. Rename one.")
    return name


def add_all(files: dict[str, Path], given: str, key: str) -> None:
    here, top = Path.cwd(), Path(os.path.abspath(given))  # with its links: the machine looks for it by this name
    if not top.is_relative_to(here):
        top = top.resolve()
    if not top.exists():
        raise InputError(f"{key}: {given}: no such file or folder.")
    if not top.is_relative_to(here):
        raise InputError(
            f"{key}: {given} is not below this folder, {here}. Start prerl job above it, or give its place on the "
            "machine, which begins with /."
        )
    for path in _below(top):
        _add(files, path.relative_to(here), path)


def _below(path: Path) -> Iterator[Path]:
    """A file, or the files in a folder; of a link what it leads to."""
    if path.is_file():
        yield path
    elif path.is_dir() and path.name != "__pycache__" and path.resolve() not in map(Path.resolve, path.parents):
        for inside in sorted(path.iterdir()):
            yield from _below(inside)


def _add_module(files: dict[str, Path], name: str) -> None:
    """One that Python finds in this folder, and those of this folder that it imports."""
    spec = PathFinder.find_spec(name) if name != "prerl_lightning" else None
    places = [*(spec.submodule_search_locations or [spec.origin or ""])] if spec is not None else []
    for place in (Path(place).resolve() for place in places):
        if not place.is_relative_to(Path.cwd()) or place.is_relative_to(sys.prefix):
            continue
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            if (at := path.relative_to(Path.cwd())).as_posix() not in files:
                _add(files, at, path)
                for imported in _imports(path):
                    _add_module(files, imported)


def _imports(path: Path) -> set[str]:
    """First parts of the modules that its text imports, but for those of its own package."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}: {in_one_line(error)}") from None
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.partition(".")[0] for name in found}


def packed(files: Mapping[str, Path]) -> bytes:
    """As tar.gz, the same for the same contents."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for place, path in sorted(files.items()):
            entry = tarfile.TarInfo(place)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    return gzip.compress(held.getvalue(), mtime=0)
