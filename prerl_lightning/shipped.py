"""``prerl configs``, and the configurations that come with the package, found by name from anywhere.

    prerl configs                        # what there is
    prerl configs dsrl > mine.yaml       # one of them, to change
    prerl fit --config dsrl.yaml         # as it is, where no such file lies here

They lie in configs/ at the top of the repository; here is a link to it, which a wheel has as a folder.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from pathlib import Path

from prerl_lightning.errors import ArgumentParser, InputError, nearest

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "configs"
EXAMPLES = Path(__file__).parent / "examples"


def names() -> list[str]:
    """dsrl, ..., then those in folders: sums/dsrl, ..."""
    found = (path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
    return [path.with_suffix("").as_posix() for path in sorted(found, key=lambda p: (len(p.parts), p))]


def taken(given: str) -> Path | None:
    """The shipped file of this name, with or without configs/ in front and .yaml behind; the log says so."""
    name = _name(given)
    if name not in names():
        return None
    found = FOLDER / f"{name}.yaml"
    log.info("There is no %s: the shipped one is taken, %s", given, found)
    return found


def path(given: str) -> str:
    """The user's file where there is one, else the shipped one of this name, else ``given``."""
    return given if os.path.isfile(given) else str(taken(given) or given)


def in_arguments(args: Sequence[str], change: Callable[[str], str] = path) -> list[str]:
    """A command line with each ``--config`` changed, into its path by default."""
    found: list[str] = []
    for i, arg in enumerate(args):
        if i and args[i - 1] in ("--config", "-c"):
            arg = change(arg)
        elif arg.startswith("--config="):
            arg = f"--config={change(arg.partition('=')[2])}"
        found.append(arg)
    return found


def overlay(folder: str, word: str) -> str | None:
    """The one of a folder that is called so: objectives/reinforce_pp of REINFORCE++, logger/wandb of WandB."""
    known = {_folded(name): name for name in names() if name.startswith(f"{folder}/")}
    return known.get(_folded(f"{folder}/{word}"))


def hint(given: str) -> str:
    """For the end of a message that there is no such file."""
    return f" The shipped ones, which `prerl configs` lists, go by name.{_nearest(given)}"


def run_name(file: Path) -> str | None:
    """sums-dsrl of the shipped sums/dsrl.yaml, which is another experiment than dsrl.yaml; None: not a shipped one."""
    file, folder = file.resolve(), FOLDER.resolve()
    return "-".join(file.relative_to(folder).with_suffix("").parts) if file.is_relative_to(folder) else None


def configs(args: Sequence[str]) -> None:
    """Run the command: list the shipped configurations, or print one.

    Raises:
        InputError: there is none of this name.
    """
    parser = ArgumentParser("prerl configs", description="The configurations that come with the package.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one, e.g. dsrl; default: list them")
    own = parser.parse_args(args)
    if own.name is None:
        width = max(map(len, names()))
        for name in names():
            print(f"{name:{width}}  {about(name, 1)}")
        if EXAMPLES.is_dir():
            print(f"\nExamples to copy from: {EXAMPLES}")
    elif _name(own.name) in names():
        print(_text(_name(own.name)), end="")
    else:
        raise InputError(f"prerl configs: {own.name}: none has this name.{_nearest(own.name)}")


def about(name: str, most: int | None = None) -> str:
    """What the comment at its head says, or the first lines of that."""
    head = takewhile(lambda line: line.startswith("#"), _text(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in islice(head, most))


def _name(given: str) -> str:
    return given.removeprefix("configs/").removesuffix(".yaml")


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower().replace("+", "p"))


def _nearest(given: str) -> str:
    name = _name(given)
    in_folder = next((known for known in names() if known.endswith(f"/{name}")), None)
    return f" Did you mean {in_folder}?" if in_folder else nearest(name, names())


def _text(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
