"""Verifier of the embedded countdown task (data/tasks/countdown.py)."""

import math
import re
from collections.abc import Mapping
from typing import Any

from prerl_lightning.rewards.score import Score

_ANSWER = re.compile(r"\d{1,2}(?:[+*-]\d{1,2})+")


def value_of(expression: str) -> int:
    """Of numbers with ``+``, ``-`` and ``*`` between them: ``3*7+5`` is 26."""
    terms = re.findall(r"([+-]?)([\d*]+)", expression)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, term.split("*"))) for sign, term in terms)


def countdown_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if what follows the last ``#`` has the value ``ground_truth`` and uses each of ``extra["numbers"]`` once;
    0.0 else, without a ``#``, and for a truncated response. All that follows is the answer: a hedge, two answers, or a
    word behind one, are wrong."""
    _, found, answer = response.rpartition("#")
    answer = answer.strip()
    if not found or extra.get("truncated"):
        return Score(0.0)
    if not _ANSWER.fullmatch(answer):
        return Score(0.0, answer)
    numbers = sorted(map(int, re.findall(r"\d+", answer)))
    return Score(numbers == list(extra["numbers"]) and value_of(answer) == int(ground_truth), answer)
