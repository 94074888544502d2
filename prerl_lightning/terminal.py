"""Text of a model, a file or a library, made harmless for a terminal."""

import unicodedata

STEERING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories of what has no picture of its own


def printable(text: str) -> str:
    """Characters that could steer the terminal, one for one, as a dot: offsets into the text stay right."""
    return "".join("↵" if c == "\n" else "·" if unicodedata.category(c) in STEERING else c for c in text)


def printable_lines(text: str) -> str:
    """The same of each line."""
    return "\n".join(map(printable, text.split("\n")))
