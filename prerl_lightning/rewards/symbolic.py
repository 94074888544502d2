r"""Symbolic equality by the math-verify library: ``0.5`` is ``\frac{1}{2}``, ``27.0`` is ``27``.

Here stands what goes in and out of it: which part of a response is the answer (`reading`), how that is spelled for the
library, plain numbers without it (its parser takes 5 ms), and what of its verdicts is not believed.

Its own time limits are alarms of the main thread, which raise off it (verl issue 5635) and do not nest: they are off
here, and rewards/pool.py holds the time.
"""

import logging
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import is_expr_of_only_symbols
from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from prerl_lightning.rewards.choice import chosen
from prerl_lightning.rewards.reading import (
    EXPONENT,
    LONGEST,
    MORE,
    NEAR,
    SIGNS,
    TEXT,
    Number,
    boxed_answer,
    final_part,
    joined_thousands,
    nested,
    number,
    raised,
    repeating,
    undressed,
)
from prerl_lightning.rewards.score import Score

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limits being off

CLOSE = 5e-6  # of the larger: six digits agree. The library compares to six decimals, to which small numbers are all 0
DEEPEST = 15  # brackets in brackets, for which the parser takes a second; for forty it takes three, for eighty twelve


def math_verify_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the answer has the ground truth's value, else 0.0; 0.0 for a truncated response.

    The answer is the last box, or Minerva's "The final answer is X. I hope ..." behind it, read as a whole or not at
    all. Boxes joined by commas, "and" or "or" are one answer of several values: right for that list or set of values,
    whatever the order, wrong for one of them, so hedges do not earn; nor does a bound (``\ge 5``, ``5\text{ or more}``)
    earn a value. Without a box the library looks in the 1,000 characters from the last "answer is" on, else in the last
    1,000, where it takes the last formula or number, hedged or not; for a letter it is read as a choice (`choice`). A
    box without an answer, or one that does not close, is no answer, whatever else is said.

    An equation is read as its right side (``x = 5`` is ``5``, ``6 \cdot 7 = 42`` is ``42``) where its left side is a
    name or a sum of numbers; not ``2x = 6``. Of ``\frac23 \approx 0.667`` the decimal is read where one is wanted, else
    the fraction. ``1.6e-19`` is a power of ten, not Euler's number. Decimals are compared to six decimals and six
    digits, all else exactly; repeating ones (``0.1\overline{6}``) are exact. A decimal comma is one where a decimal
    point is wanted. Bases (``204_5``, ``204_{\text{five}}``, ``204 in base 5``) are compared where the ground truth has
    one; units (``12\text{ cm}^2``, ``12 cm^2``) never, but ``5\text{ feet }3\text{ inches}`` is not 5, and
    ``3\text{ million}`` is 3000000; ``50\%`` is 50 and 0.5. Matrices whose rows have lost their ends, as in verl's copy
    of MATH, get them back.

    As an answer (maj@k), what is right counts as one, and what is wrong by its value.

    Raises:
        ValueError: math-verify cannot read the ground truth: an error, not a wrong answer.
    """
    if not ground_truth.strip():
        raise ValueError("the ground truth is empty")
    if extra.get("truncated"):
        return Score(0.0)
    response = final_part(response)
    found = boxed_answer(response)
    if said := _FINAL.search(response, max(response.rfind("\\boxed"), 0)):
        found = said[1]
    if found == "":
        return Score(0.0)
    text = _stated(response) if found is None else found
    if len(text) > LONGEST or nested(text) > DEEPEST:
        return Score(0.0, found)
    return _judged("" if found else text, found, ground_truth)


_FINAL = re.compile(r"[Ff]inal answer is:?\s*([^\n]{1,300}?)\.?\s*I hope")
_STATEMENT = re.compile(r"\banswer\b[^.\n]{0,60}?(?:\bis\b|[:=])", re.IGNORECASE)


def _stated(response: str) -> str:
    starts = [m.start() for m in _STATEMENT.finditer(response)]
    return response[starts[-1] :][:LONGEST] if starts else response[-LONGEST:]


@lru_cache(4096)  # the responses of a group often agree
def _judged(text: str, boxed: str | None, ground_truth: str) -> Score:
    """Of the content of a box, or without one of a text."""
    truth = boxed_answer(ground_truth) or ground_truth
    wanted = _one_side(_spelled(truth), "")
    given = _one_side(_spelled(boxed or ""), wanted)
    given, wanted = _without_unit(given, wanted), _without_unit(wanted, given)
    letter = bool(_LETTER.fullmatch(truth))
    if boxed is None and letter:
        choice = chosen(text)
        return Score(choice == _LETTER.sub(r"\1", truth), choice)
    if boxed is not None:
        right = _same_text(given, wanted)
        if right is not None:
            return Score(right, ground_truth if right else _name(number(given) or given))
    gold = _parsed_truth(truth, wanted)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth[:100]!r}")
    answer = _parse(_digits(text.translate(SIGNS))) if boxed is None else _parse_box(given, letter)
    if not answer:
        return Score(0.0, boxed)
    if not _apart(gold[0], answer[0]) and verify(gold, answer, timeout_seconds=None):
        return Score(1.0, ground_truth)
    return Score(0.0, _name(answer[0]))


@lru_cache(4096)
def _parsed_truth(truth: str, spelled: str) -> list:
    sentence = re.search(r"(?<!\\)\$.+(?<!\\)\$|\\\(.+\\\)", truth) and _parse(_digits(truth))
    return sentence or _parse_box(spelled, bool(_LETTER.fullmatch(truth)))


def _parse_box(spelled: str, letter: bool) -> list:
    known = number(spelled)
    if known is not None and known.exact:
        return [sympy.Rational(known.value.numerator, known.value.denominator)]
    content = spelled.removesuffix("\\%")  # a fraction with a percent sign in one box it cannot read
    box = f"\\boxed{{{spelled}}}" if content == spelled else f"$\\boxed{{{content}}}$\\%"
    found = _parse(box, _BOX_OR_LETTER if letter else _BOX)
    name, equals, value = spelled.rpartition("=")
    if equals and _NAME.fullmatch(name) and all(isinstance(part, str) for part in found):
        return _parse_box(value.strip(), letter)  # \max = 25, whose name it cannot read
    return found


# of a box that cannot be read as a whole no part is taken: the library would read \ge 42 and 4 \to 42 as 42
_BOX = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
_BOX_OR_LETTER = [*_BOX, StringExtractionConfig(try_extract_without_anchor=False)]
_ANYWHERE = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _parse(text: str, kinds: list = _ANYWHERE) -> list:
    return parse(text, kinds, parsing_timeout=None, raise_on_error=False)


_LETTER = re.compile(r"\s*(?:(?:\\text\s*)?\{)?\s*\(?([A-Z])\)?\s*\}?[\s.,]*")
_UNICODE = {
    **SIGNS,
    **str.maketrans(dict.fromkeys("~\xa0\u2009\u202f", " ")),
    **str.maketrans({"\u00d7": "\\times ", "·": "\\cdot ", "\u22c5": "\\cdot ", "÷": "\\div ", "π": "\\pi "}),
    **str.maketrans({"°": "^\\circ ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "\u222a": "\\cup "}),
    **str.maketrans({"½": "\\frac{1}{2}", "∅": "\\emptyset ", "√": "\\sqrt", "\uff0c": ",", "\uff1a": ":"}),
}
_ENDING = re.compile(r"(?:\s|[.,;€£]|(?<!\\)\$|\\[,;:! ]|\\+$)+$")
_MORE = re.compile(  # no unit, but another answer, a bound, or a second amount
    rf"{TEXT}\{{[^{{}}]*(?:\b(?:or|and)\b[^{{}}]*\d|{MORE})[^{{}}]*\}}"
    rf"|[\d}}]\s*(?:\\[,;: ])*{TEXT}\{{[^{{}}]*(?<!mod)\s\d"
    rf"|\d\s*{TEXT}\{{(?!\s*[,;]?\s*(?:and|or)?\s*\}})[^{{}}]*\}}\s*\d"
)
_NAME = re.compile(r"(?!.*\\not|\W*$)[^\d=<>,;+*/^-][^=<>,;+*/^-]*")
_TWO_TEXTS = re.compile(rf"{TEXT}\{{[^{{}}]*\}}(.*)({TEXT}\{{.*)", re.DOTALL)
_BETWEEN_UNITS = re.compile(r"(?:[\s/*~]|\\(?:[,;: ]|cdot|times)|\^(?:\{-?\d\}|-?\d))*")
_LISTED_UNIT = re.compile(rf"(?<=[\d}}])\s*{TEXT}\{{[A-Za-z ]*\}}(?=\s*,)")
_BASED = re.compile(r"(?:[A-Za-z]\w* ?= ?)?([0-9][0-9A-Za-z]*) ?(?:_ ?(?:base)?|(?:in )?base)[ -]?(\w+)")
_BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
_BASES += ["fourteen", "fifteen", "sixteen"]
_SETTING = re.compile(rf"{TEXT}|\\[,;:! ]|[{{}}()~]")
_UNIT = (
    r"(?:[cdkm]?m|[km]?g|ft|in|yd|mi|sec|s|h|hr|min|feet|foot|inch(?:es)?|(?:centi|milli|kilo)?met(?:er|re)s?|yards?"
    r"|miles?|units?)(?:\^(?:\{-?\d\}|-?\d))?"
)
_COUNTED = re.compile(r"(?<=\d)\s+(?:dollars?|cents?|euros?|points?|people|pairs?|weeks?|integers|solutions)$")
# 12m^2 may be a monomial
_UNITS = re.compile(rf"(?:(?<=[\d}}i])(?:\s|~|\\[,;: ])+|(?<=\d)(?=[cdkm]m)){_UNIT}(?:\s?/\s?{_UNIT})*$")


def _without_unit(text: str, other: str) -> str:
    r"""``12 cm^2`` as ``12`` where nothing says that letters are variables; the library knows ``12 cm`` and
    ``12\text{ cm}^2``."""
    found = _UNITS.search(text)
    if found is None or not re.search("[/^]", found.group()):
        return text
    sides = (side.rpartition("=")[2] for side in (text[: found.start()], _UNITS.sub("", other)))
    names = re.sub(rf"{TEXT}\{{[^{{}}]*\}}|\\[A-Za-z]+", "", " ".join(sides))
    return text if re.search("[A-Za-z]", names) else text[: found.start()]


def _with_one_unit(text: str) -> str:
    r"""``5\text{ feet }3\text{ inches}`` without the last: the library takes all from the first one on for a unit."""
    text = _COUNTED.sub("", _LISTED_UNIT.sub("", text))
    found = _TWO_TEXTS.search(text)
    return text[: found.start(2)] if found and not _BETWEEN_UNITS.fullmatch(found[1]) else text


def _one_side(text: str, other: str) -> str:
    r"""Of ``\frac23 \approx 0.667`` the decimal if the other is a decimal, else the exact; of ``x \approx 0.667`` an
    equation; nothing where the sides are not near: a hedge. Of a ground truth, for which there is no other, the exact.
    """
    left, *rounded = NEAR.split(text)
    if len(rounded) != 1:
        return text
    name, equals, exact = left.rpartition("=")
    x, y = _value(exact), _value(rounded[0])
    if x is None:
        return f"{left}={rounded[0]}"
    if other and (y is None or abs(x - y) > 0.05 * abs(x)):
        return ""
    known = number(other)
    return (name + equals + (rounded[0] if known and not known.exact else exact)).strip()


def _value(text: str) -> float | None:
    found = next(iter(_parse_box(text.strip(), False)), None)
    known = isinstance(found, sympy.Expr) and found.is_number and found.is_real
    return float(sympy.N(found)) if known else None


def _rows(matrix: str) -> str:
    r"""With the ends of its rows: verl's copy of MATH has lost one backslash of each, or both before a command."""
    matrix = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|.)", "", matrix)
    if r"\\" in matrix:
        return matrix
    ends = r"\\(?=[-\d])|(?<!matrix\})(?<=[\d}])(?=\\[dt]?frac)|(?<=/\d)(?=\\sqrt)"
    return re.sub(ends, r"\\\\ ", matrix)


def _based(text: str) -> tuple[str, str] | None:
    r"""Digits and base of ``204_6``, ``204_{\text{six}}`` and ``204 in base 6``."""
    found = _BASED.fullmatch(" ".join(_SETTING.sub(" ", text).split()))
    if found is None:
        return None
    base = found[2].lower()
    return found[1], str(_BASES.index(base) + 2) if base in _BASES else base


def _digits(text: str) -> str:
    r"""``1.6e-19`` as its digits and ``0.\overline{3}`` as a fraction, in LaTeX and out of it."""
    return EXPONENT.sub(lambda m: format(Decimal(f"{m[1]}e{m[2]}"), "f"), repeating(text))


@lru_cache(4096)
def _spelled(answer: str) -> str:
    """Without what the library stumbles on."""
    text = re.sub(r"√\s?(\d[\d.]*)", r"\\sqrt{\1}", raised(answer))
    text = joined_thousands(text.translate(_UNICODE)).strip()
    for mark in ("**", "`", "*", "$"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    if not re.search(r"\.\.\.$|\\l?dots\W*$", text):  # an ellipsis says that there is more
        text = _ENDING.sub("", text)
    if "matrix}" in text:
        return _rows(text)
    text = undressed(text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"(?<![A-Za-z])\{(and|or)\}", r" \1 ", text)  # as \text{or} is in verl's copy of MATH
    text = re.sub(r"(?<=[c}]\{)\d{1,3}(?:,\d{3})+(?=\})", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(\d)\s+(\d+)\s?/\s?(\d+)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", ", ", _digits(text))  # it adds 1 2 to 3
    return _with_one_unit(text)


def _same_text(given: str, wanted: str) -> bool | None:
    """Whether they are equal, where that needs no algebra; None where it does."""
    if given == wanted or _unstyled(given) == _unstyled(wanted):
        return True
    if _MORE.search(given):
        return False
    if based := _based(wanted):
        return _based(given) == based
    a, b = _decimal(given, wanted), number(wanted)
    if a is None or b is None:
        return None
    if a.value == b.value:
        return True
    if a.exact and b.exact:
        return False
    near = abs(a.value - b.value) <= CLOSE * max(abs(a.value), abs(b.value))
    return near and round(a.value, 6) == round(b.value, 6)


def _unstyled(text: str) -> str:
    r"""``June20`` of ``\text{June 20}``."""
    words = re.fullmatch(rf"{TEXT}\{{([^{{}}]*)\}}", text)
    return "".join((words[1] if words else text).split())


def _decimal(given: str, wanted: str) -> Number | None:
    """`number`; ``2,5`` is 2.5 if a decimal point is wanted."""
    found = number(given)
    if found is None and re.fullmatch(r"-?\d+\.\d+", wanted):
        found = number(re.sub(r"^(-?\d+)(?:,|\{,\})(\d+)$", r"\1.\2", given))
    return found


def _apart(gold: Any, answer: Any) -> bool:
    """What the library would hold equal and is not: an equation and its right side, whatever is on the left, and small
    numbers whose difference is small. Of numbers this is decided in a hundredth of its time."""
    if isinstance(answer, Relational):
        return not isinstance(gold, Relational | sympy.Set) and not _names(answer.lhs)
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and gold.is_number and answer.is_number):
        return False
    if gold.has(sympy.UnevaluatedExpr) or answer.has(sympy.UnevaluatedExpr):  # percent: 50 and 0.5 are both 50 %
        return False
    x, y = sympy.N(gold, 20), sympy.N(answer, 20)
    if not (x.is_finite and y.is_finite):
        return False
    return bool(abs(x - y) > CLOSE * sympy.Max(abs(x), abs(y)))


def _names(left: Any) -> bool:
    if not left.free_symbols or isinstance(left, AppliedUndef):
        return True
    return bool(is_expr_of_only_symbols(left)) and not left.has(sympy.Add)


def _name(answer: Any) -> str:
    """Of a wrong answer: alike for what is equal, as far as that is cheap to tell."""
    if isinstance(answer, Number):
        return _shown(answer.value.numerator / Decimal(answer.value.denominator))
    if isinstance(answer, Relational) and _names(answer.lhs):
        answer = answer.rhs
    if isinstance(answer, sympy.FiniteSet | sympy.Tuple):
        parts = [_name(part) for part in answer.args]
        return f"{{{', '.join(sorted(parts) if isinstance(answer, sympy.FiniteSet) else parts)}}}"
    if isinstance(answer, sympy.Expr) and answer.is_number and not answer.has(sympy.Integral, sympy.Sum):
        value = sympy.N(answer, 20)
        if value.is_real and value.is_finite:
            return _shown(Decimal(str(value)))
    return str(answer)


def _shown(value: Decimal) -> str:
    """Integers to the digit, up to the 20 that are known; else six decimals, or six digits of what is below 0.1."""
    if value == value.to_integral_value():
        return f"{value:.0f}"
    return f"{value:.6f}" if abs(value) >= Decimal("0.1") else f"{value:.5e}"
