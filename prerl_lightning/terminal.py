"""Text of a model, a file or a library, made harmless for a terminal."""

import re
import unicodedata

STEERING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories of what has no picture of its own
# what tokenizers' special tokens look like: <|im_end|>, <s>, <start_of_turn>, [INST]
SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def printable(text: str) -> str:
    """Characters that could steer the terminal, one for one, as a dot: offsets into the text stay right."""
    return "".join("↵" if c == "\n" else "·" if unicodedata.category(c) in STEERING else c for c in text)


def printable_lines(text: str) -> str:
    """The same of each line."""
    return "\n".join(map(printable, text.split("\n")))


def last_part(text: str, most: int) -> str:
    """Its last characters, ``most`` or a few less: it does not begin inside a special token."""
    begin = max(0, len(text) - most)
    inside = (token.end() for token in SPECIAL.finditer(text) if token.start() < begin < token.end())
    return text[next(inside, begin) :]
