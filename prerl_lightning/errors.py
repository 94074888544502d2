"""The errors whose message is all there is to say: the command line shows it alone, without a traceback."""

import math
from collections.abc import Mapping


class InputError(ValueError):
    """The user's configuration or data is at fault. The message names the place and the mend."""


class RunError(RuntimeError):
    """The run cannot go on, for a reason that only training it could show. The message has the figures and the mend."""


def check_ranges(options: object, key: str, checks: Mapping[str, bool]) -> None:
    """Raises InputError for the first field of ``options``, found under ``key``, whose check is False or whose value
    is infinite."""
    for name, fine in checks.items():
        value = getattr(options, name)
        if not fine or (isinstance(value, float) and math.isinf(value)):
            raise InputError(f"{key}.{name}: {value!r} is out of range.")


def check_bounds(
    options: object, key: str, least: Mapping[str, float] | None = None, above: Mapping[str, float] | None = None
) -> None:
    """Raises InputError for the first field of ``options``, found under ``key``, that is no finite number, below its
    ``least`` or not ``above``. None passes."""
    for bounds, words in ((least or {}, "of at least"), (above or {}, "above")):
        for name, bound in bounds.items():
            value = getattr(options, name)
            # written so that nan, of which no comparison is true, is refused
            fine = value is None or (bound <= value < math.inf and (words != "above" or value > bound))
            if not fine:
                raise InputError(f"{key}.{name}: {value} must be a finite number {words} {bound:g}.")


def in_one_line(error: BaseException, most: int = 300) -> str:
    """Its class and so many characters of what it says: of other libraries' errors, for a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"
