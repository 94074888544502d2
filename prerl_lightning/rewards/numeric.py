"""Numbers and exact strings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from fractions import Fraction
from typing import Any

from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.rewards.score import Score

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
LONGEST = 100  # characters of a number; longer ones are compared as text


def gsm8k_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if the number behind the last ``####``, or else the last number, is the ground truth's; else 0.0.

    Compared as numbers: ``1,000`` is ``1000`` and ``18.00`` is ``18``. 0.0 for a truncated response. A ground truth may
    be GSM8K's whole solution.
    """
    if extra.get("truncated"):
        return Score(0.0)
    answer, truth = _last_number(response), _last_number(ground_truth)
    return Score(0.0) if answer is None else Score(answer == truth, answer)


def _last_number(text: str) -> str | None:
    """As digits without commas and needless zeros; behind the last ``####`` if there is one with a number."""
    head, marker, tail = text.rpartition("####")
    first = NUMBER.search(tail) if marker else None
    if first is None:
        numbers = NUMBER.findall(head or tail)
        return _plain(numbers[-1]) if numbers else None
    return _plain(first.group())


def _plain(number: str) -> str:
    number = number.replace(",", "")
    if len(number) > LONGEST:
        return number
    value = Decimal(number)
    return format(value.normalize() if value else Decimal(0), "f")


def exact_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if the last box, or else the whole response, is the ground truth up to outer spaces; 0.0 if truncated."""
    if extra.get("truncated"):
        return Score(0.0)
    boxed = last_boxed(response)
    answer = (response if boxed is None else boxed).strip()
    return Score(answer == ground_truth.strip(), answer)


@dataclass(frozen=True)
class NumericReward:
    r"""1.0 if the last box, or else the last number, is within a tolerance of the ground truth; 0.0 if truncated.

    Reads ``1,000``, ``3/4``, ``\frac{3}{4}``, ``1.5e-3``, ``1.5 \times 10^{-3}``. A ground truth that is no number is
    an error, not a wrong answer.

    Args:
        relative: tolerance as a share of the ground truth.
        absolute: tolerance where the ground truth is 0 or small; the larger of the two holds.
    """

    relative: float = 1e-4
    absolute: float = 1e-9

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
        truth = _value(ground_truth)
        if truth is None:
            raise ValueError(f"the ground truth {ground_truth[:100]!r} is no number")
        if extra.get("truncated"):
            return Score(0.0)
        answer = last_boxed(response)
        if answer is None:
            numbers = re.findall(NUMBER.pattern + r"(?:[eE][-+]?\d{1,3})?", response)
            answer = numbers[-1] if numbers else None
        value = None if answer is None else _value(answer)
        if value is None:
            return Score(0.0, answer)
        right = abs(value - truth) <= max(self.relative * abs(truth), self.absolute)
        return Score(right, str(value))


FORM = re.compile(
    rf"(?P<a>{NUMBER.pattern})(?:[eE](?P<e>[-+]?\d{{1,3}})|\\times10\^\{{?(?P<t>[-+]?\d{{1,3}})\}}?|/(?P<b>\d+))?"
)
FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?")


def _value(text: str) -> float | None:
    """None: no number, or one too long to be an answer."""
    text = re.sub(r"\s|\\[!,$%]|[$%]", "", text[: 10 * LONGEST]).rstrip(".")
    if len(text) > LONGEST:
        return None
    text = FRACTION.sub(r"\1\2/\3", text).replace(r"\cdot", r"\times")
    found = FORM.fullmatch(text)
    if found is None:
        return None
    try:
        value = Fraction(Decimal(found["a"].replace(",", "")))
        if found["b"]:
            value /= int(found["b"])
        return float(value) * 10.0 ** int(found["e"] or found["t"] or 0)
    except (ZeroDivisionError, OverflowError, DecimalException):
        return None
