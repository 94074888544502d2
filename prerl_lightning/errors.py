"""The errors whose message is all there is to say: the command line shows it alone, without a traceback."""

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """The user's configuration or data is at fault. The message names the place and the mend."""


class RunError(RuntimeError):
    """The run cannot go on, for a reason that only training it could show. The message has the figures and the mend."""


def said_by_us(error: BaseException | None) -> InputError | RunError | None:
    """The error of ours that ``error`` is, or was raised from: jsonargparse wraps what a class raises about its
    arguments."""
    while error is not None and not isinstance(error, (InputError, RunError)):
        error = error.__cause__
    return error


def is_name(text: str) -> bool:
    """Of letters, digits, dots and dashes alone, so that it can stand in a column and a key."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def check_bounds(
    options: object,
    key: str,
    least: Mapping[str, float] | None = None,
    above: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
) -> None:
    """Raises InputError for the first field of ``options``, found under ``key``, that is no finite number, below its
    ``least``, not ``above``, or beyond its ``most``. None passes."""
    for bounds, words in ((least or {}, "of at least"), (above or {}, "above"), (most or {}, "of at most")):
        for name, bound in bounds.items():
            value = getattr(options, name)
            # written so that nan, of which no comparison is true, is refused
            low, high = (-math.inf, bound) if words == "of at most" else (bound, math.inf)
            number = isinstance(value, Real)
            above_it = (words, value) != ("above", low)
            fine = value is None or (number and low <= value <= high and abs(value) < math.inf and above_it)
            if not fine:
                shown = value if number else repr(value)
                raise InputError(f"{key}.{name}: {shown} must be a finite number {words} {bound:g}.")


def nearest(word: str, names: Iterable[str]) -> str:
    """`` Did you mean NAME?`` where one of the names is near, else nothing: for the end of a sentence."""
    folded, word = {name.lower(): name for name in names}, word.lower()
    found = get_close_matches(word, folded) or [name for name in folded if word and name.startswith(word)]
    found.sort(key=lambda name: sorted(name) != sorted(word))  # letters that have changed places first
    return f" Did you mean {folded[found[0]]}?" if found else ""


def near_folder(path: str | Path) -> str:
    """`nearest` among what lies beside a folder that is not there."""
    above = Path(path).parent
    beside = [p for p in above.iterdir() if p.is_dir()] if above.is_dir() else []
    name = Path(path).name
    ends = [p.name for p in beside if p.name.endswith(f"-{name}")]  # of runs/rloo runs/objectives-rloo
    return f" Did you mean {above / ends[0]}?" if ends else nearest(str(path), [str(above / p.name) for p in beside])


class ArgumentParser(argparse.ArgumentParser):
    """Of the commands that LightningCLI does not parse: what is wrong becomes an InputError; no abbreviations."""

    def __init__(self, prog: str, description: str = "", epilog: str | None = None) -> None:
        super().__init__(prog, allow_abbrev=False, description=description, epilog=epilog)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}. {self.prog} --help has all of them.")


def in_one_line(error: BaseException, most: int = 300) -> str:
    """Its class and so many characters of what it says: of other libraries' errors, for a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"
