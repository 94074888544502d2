"""Symbolic equality by the math-verify library: ``0.5`` is ``\\frac{1}{2}``, ``27.0`` is ``27``.

Its own time limits are alarms of the main thread, which raise off it (verl issue 5635) and do not nest: they are off
here, and rewards/pool.py holds the time.
"""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

from prerl_lightning.rewards.boxed import equivalent, last_boxed
from prerl_lightning.rewards.score import Score

LONGEST = 1000  # characters of an answer; what sympy makes of a longer one is not worth its time
INTEGER = re.compile(r"-?\d{1,15}")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limits being off


def math_verify_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if the last box of ``response``, or without one the answer that math-verify finds in its last 1,000
    characters, equals ``ground_truth``; else 0.0. 0.0 for a truncated response.

    The library takes 5 ms an answer. Two integers are compared without it, and so are strings that `boxed_reward`
    holds equal. As an answer (maj@k), all that is right counts as one.

    Raises:
        ValueError: math-verify cannot read the ground truth: an error, not a wrong answer.
    """
    if extra.get("truncated"):
        return Score(0.0)
    boxed = last_boxed(response)
    if boxed is not None:
        if len(boxed) > LONGEST:
            return Score(0.0, boxed)
        if INTEGER.fullmatch(boxed) and INTEGER.fullmatch(ground_truth):
            return Score(int(boxed) == int(ground_truth), str(int(boxed)))
        if boxed.strip() and equivalent(boxed, ground_truth):
            return Score(1.0, ground_truth)
    return _verified(f"\\boxed{{{boxed}}}" if boxed is not None else response[-LONGEST:], boxed, ground_truth)


@lru_cache(4096)  # the responses of a group often agree
def _verified(text: str, boxed: str | None, ground_truth: str) -> Score:
    truth = _parsed_truth(ground_truth)
    if not truth:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth[:100]!r}")
    answer = _parse(text)
    if not answer:
        return Score(0.0, boxed)
    right = verify(truth, answer, timeout_seconds=None)
    return Score(right, ground_truth if right else str(answer[0]))


@lru_cache(4096)
def _parsed_truth(ground_truth: str) -> list:
    return _parse(f"\\boxed{{{ground_truth}}}") or _parse(ground_truth)


def _parse(text: str) -> list:
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig(), StringExtractionConfig()]
    return parse(text, kinds, parsing_timeout=None, raise_on_error=False)
