"""Multiple choice."""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.rewards.score import Score

LETTER = re.compile(r"\W{0,9}(?:\\text\{)?\W{0,9}([A-Za-z])(?![A-Za-z])")
STATED = re.compile(
    r"\b(?:answer|option|choice)\b[\s*:]{0,9}(?:is\b)?[\s*:$]{0,9}(?:\(([A-Z])\)|([A-Z])(?![A-Za-z']))", re.I
)
ALONE = re.compile(r"\(([A-Z])\)")


def choice_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if the chosen letter is the ground truth's (``C``, ``(C)``, ``c``), else 0.0; 0.0 if truncated.

    Read in this order: the last box; the last "the answer is (C)", "Answer: C"; the last "(C)"; a response that is a
    letter and nothing else.
    """
    truth = chosen(ground_truth)
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth[:100]!r} names no letter")
    answer = None if extra.get("truncated") else chosen(response)
    return Score(answer == truth, answer)


def chosen(text: str) -> str | None:
    """The letter, in upper case."""
    boxed = last_boxed(text)
    if boxed is not None:
        found = LETTER.match(boxed)
        return found[1].upper() if found else None
    for pattern in (STATED, ALONE):
        last = deque(pattern.finditer(text), maxlen=1)
        if last:
            return next(group for group in last[0].groups() if group).upper()
    alone = re.fullmatch(r"([A-Za-z])\W{0,9}", text.strip()[:20])
    return alone[1].upper() if alone else None
