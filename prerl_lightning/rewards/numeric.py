"""Numbers and exact strings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from prerl_lightning.rewards.reading import (
    LONGEST,
    MORE,
    NEAR,
    TEXT,
    Number,
    boxed_answer,
    final_part,
    first_number,
    last_number,
    multiplied,
    number,
    plain,
    undressed,
)
from prerl_lightning.rewards.score import Score


def gsm8k_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the number behind the last ``####``, else of the last box, else the last one of all, is the ground
    truth's; 0.0 without one, and for a truncated response.

    Compared by value: ``1,000`` is ``1000``, ``18.00`` is ``18``, ``1/2`` is ``0.5``. Behind ``####`` the first number
    counts, of a sum (``9 * 2 = 18``) the one behind the last ``=``. A box is read as `NumericReward` does: two numbers
    in it (``18 or 20``) are a wrong answer. Without ``####`` and box the last number counts, whatever is said of it:
    GSM8K's convention, so "18 or 19" is read as 19 and an answer with numbers behind it is not found. Commas that do
    not part thousands part numbers: ``1,2,3`` are three. Percent signs and units are not looked at, nor, outside a box,
    are words (``#### 1 million`` is 1). A ground truth may be GSM8K's whole solution.
    """
    if extra.get("truncated"):
        return Score(0.0)
    answer, truth = _stated(response), _stated(ground_truth)
    if answer is None:
        return Score(0.0)
    return Score(truth is not None and answer.value == truth.value, str(answer))


def _stated(text: str) -> Number | None:
    text = final_part(text)
    _, marker, tail = text.rpartition("####")
    if marker:
        line = next((line for line in tail.splitlines() if line.strip()), "")
        for part in (line.rpartition("=")[2], line):
            if found := first_number(plain(part[:LONGEST])):
                return found[2]
    boxed = boxed_answer(text)
    return _quantity(boxed) if boxed else last_number(text)


def exact_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the last box, or without one the whole response, is the ground truth up to outer spaces; 0.0 if
    truncated.

    To the character: a period, another case or a second answer beside the first is wrong. Of several boxes the last
    counts, joined ones (``\boxed{a}, \boxed{b}``) as ``a, b``.

    Raises:
        ValueError: the ground truth is empty, and any empty answer would earn it.
    """
    truth = ground_truth.strip()
    if not truth:
        raise ValueError("the ground truth is empty")
    if extra.get("truncated"):
        return Score(0.0)
    response = final_part(response)
    boxed = boxed_answer(response)
    answer = (response if boxed is None else boxed).strip()
    return Score(answer == truth, answer)


@dataclass(frozen=True)
class NumericReward:
    r"""1.0 if the last box, or without one the last number, is within a tolerance of the ground truth; 0.0 if
    truncated.

    Reads ``1,000``, ``3/4``, ``\frac{3}{4}``, ``2\frac{1}{2}``, ``1.5e-3``, ``1.5 \times 10^{-3}``; in a box also with
    a name (``x = 50``, ``6 \cdot 7 = 42``, ``\approx 50``) and a unit (``50\text{ m}``), which is not compared, nor is
    a percent sign; ``2 million`` is 2000000.
    A box with more than one number (``5 or 6``), or with an expression to work out, is a wrong answer; without a box
    the last number counts, and what is said before it does not.

    Args:
        relative: tolerance as a share of the ground truth.
        absolute: the same, as a number; the larger of the two holds. For ground truths of 0, which have no share.

    Raises:
        ValueError: the ground truth is no number: an error, not a wrong answer.
    """

    relative: float = 1e-4
    absolute: float = 0.0

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
        truth = _quantity(ground_truth)
        if truth is None:
            raise ValueError(f"the ground truth {ground_truth[:100]!r} is no number")
        if extra.get("truncated"):
            return Score(0.0)
        response = final_part(response)
        boxed = boxed_answer(response)
        answer = last_number(multiplied(response)) if boxed is None else _quantity(boxed)
        if answer is None:
            return Score(0.0, boxed)
        far = abs(answer.value - truth.value)
        right = far <= max(Fraction(self.relative) * abs(truth.value), Fraction(self.absolute))
        return Score(right, str(truth if right else answer))


_NAME = re.compile(r"[^\d+*/^-][^+*/^-]*")  # what may stand before an "=": f(2), a_1, \text{speed}; not 2x, x + y
# possessive: " . . . !" has 2^n ways
_POWER = r"(?:\^\{?-?\d\}?|[²³])"
_UNIT = re.compile(
    rf"(?:(?<=[\s~,;°])[A-Za-zµμΩ/.]+{_POWER}?|[\s~$€£.°'\")}}*/]|\\?%|\\(?:[,;:!) ]|right\b)|\^?\{{?\\circ\}}?"
    rf"|\\(?:degree|Omega|mu(?=\s*(?:\\text|\\math|m)))"
    rf"|(?:{TEXT}\{{|\{{\\rm\b|\\rm\s*\{{)(?:[^{{}}\d^]|{_POWER})*\}}{_POWER}?)*+"
)


def _quantity(text: str) -> Number | None:
    """The one number of a text that may have a name in front and a unit behind."""
    if len(text) > LONGEST:
        return None
    if (alone := number(text)) is not None:
        return alone
    name, equals, rest = NEAR.sub("=", plain(undressed(text))).rpartition("=")
    if equals and re.search(r"[A-Za-z]", name) and not _NAME.fullmatch(name.rpartition("=")[2].strip()):
        return None
    rest = re.sub(r"^(?:[\s$({*]|\\(?:[$(,;! ]|left\b))+", "", undressed(rest) if equals else rest)
    if (alone := number(rest)) is not None:
        return alone
    first = first_number(rest)
    if first is None or not re.fullmatch(r"[-+]?[ $]*", rest[: first[0]]) or not _UNIT.fullmatch(rest, first[1]):
        return None
    signs, bound = re.match(r"[-+].*[-+]", rest[: first[0] + 1]), re.search(MORE, rest[first[1] :])
    return None if signs or bound else first[2]
