"""The one error class for bad input."""

from collections.abc import Mapping


class InputError(ValueError):
    """The user's configuration or data is at fault. The message names the place and the mend, and the command line
    shows it alone, without a traceback."""


def check_ranges(options: object, key: str, checks: Mapping[str, bool]) -> None:
    """Raises InputError for the first field of ``options``, found under ``key``, whose check is False."""
    for name, fine in checks.items():
        if not fine:
            raise InputError(f"{key}.{name}: {getattr(options, name)!r} is out of range.")
