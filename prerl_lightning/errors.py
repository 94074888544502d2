"""The one error class for bad input."""


class InputError(ValueError):
    """The user's configuration or data is at fault. The message names the place and the mend, and the command line
    shows it alone, without a traceback."""
