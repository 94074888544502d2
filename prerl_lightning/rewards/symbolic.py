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

from prerl_lightning.rewards.reading import (
    EXPONENT,
    LONGEST,
    SIGNS,
    Number,
    boxed_answer,
    final_part,
    joined_thousands,
    number,
    repeating,
)
from prerl_lightning.rewards.score import Score

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limits being off

CLOSE = 5e-6  # of the larger: six digits agree. The library compares to six decimals, to which small numbers are all 0


def math_verify_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the answer has the ground truth's value, else 0.0; 0.0 for a truncated response.

    The answer is the last box, or Minerva's "The final answer is X. I hope ..." behind it. Boxes joined by commas,
    "and" or "or" are one answer of several values: right for that list or set of values, whatever the order, wrong for
    one of them, so hedges do not earn. Without a box the library looks in the 1,000 characters from the last "answer
    is" on, else in the last 1,000, where it takes the last formula or number, hedged or not. A box without an
    answer, or one that does not close, is no answer, whatever else is said.

    An equation is read as its right side (``x = 5`` is ``5``, ``6 \cdot 7 = 42`` is ``42``) where its left side is a
    name or a sum of numbers; not ``2x = 6``. ``1.6e-19`` is a power of ten, not Euler's number. Decimals are compared
    to six decimals and six digits, all else exactly; repeating ones (``0.1\overline{6}``) are exact. A decimal comma is
    one where the other side has the same digits with a point. Bases (``204_5``, ``204_{\text{five}}``, ``204 in base
    5``) are compared where the ground truth has one; units (``12\text{ cm}^2``, ``12 cm^2``) never; ``50\%`` is 50 and
    0.5.

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
    if found is None:
        return _judged(_stated(response), None, ground_truth)
    return _judged("", found, ground_truth) if len(found) <= LONGEST else Score(0.0, found)


_FINAL = re.compile(r"[Ff]inal answer is:?\s*([^\n]{1,300}?)\.?\s*I hope")
_STATEMENT = re.compile(r"\banswer\b[^.\n]{0,60}?(?:\bis\b|[:=])", re.IGNORECASE)


def _stated(response: str) -> str:
    starts = [m.start() for m in _STATEMENT.finditer(response)]
    return response[starts[-1] :][:LONGEST] if starts else response[-LONGEST:]


@lru_cache(4096)  # the responses of a group often agree
def _judged(text: str, boxed: str | None, ground_truth: str) -> Score:
    """Of the content of a box, or without one of a text."""
    truth = boxed_answer(ground_truth) or ground_truth
    given, wanted = _spelled(boxed or ""), _spelled(truth)
    given, wanted = _without_unit(given, wanted), _without_unit(wanted, given)
    if boxed is not None:
        right = _same_text(given, wanted)
        if right is not None:
            return Score(right, ground_truth if right else _name(number(given) or given))
    gold = _parsed_truth(truth, wanted)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth[:100]!r}")
    letter = bool(_LETTER.fullmatch(truth))
    answer = _parse(_digits(text.translate(SIGNS)), letter) if boxed is None else _parse_box(given, letter)
    if not answer:
        return Score(0.0, boxed)
    if not _apart(gold[0], answer[0]) and verify(gold, answer, timeout_seconds=None):
        return Score(1.0, ground_truth)
    return Score(0.0, _name(answer[0]))


@lru_cache(4096)
def _parsed_truth(truth: str, spelled: str) -> list:
    sentence = re.search(r"(?<!\\)\$.+(?<!\\)\$|\\\(.+\\\)", truth) and _parse(_digits(truth))
    letter = bool(_LETTER.fullmatch(truth))
    return sentence or _parse_box(spelled, letter) or _parse(truth, letter)


def _parse_box(spelled: str, letter: bool) -> list:
    known = number(spelled)
    if known is not None and known.exact:
        return [sympy.Rational(known.value.numerator, known.value.denominator)]
    return _parse(f"\\boxed{{{spelled}}}", letter)


def _parse(text: str, letter: bool = False) -> list:
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    if letter:  # else the C of "1.6e-19 C" is taken for one
        kinds.append(StringExtractionConfig(try_extract_without_anchor=False))
    return parse(text, kinds, parsing_timeout=None, raise_on_error=False)


_LETTER = re.compile(r"\s*(?:\\text\s*\{)?\s*\(?[A-Z]\)?\s*\}?\s*")
_UNICODE = {
    **SIGNS,
    **str.maketrans(dict.fromkeys("~\xa0\u2009\u202f", " ")),
    **str.maketrans({"\u00d7": "\\times ", "·": "\\cdot ", "\u22c5": "\\cdot ", "÷": "\\div ", "π": "\\pi "}),
    **str.maketrans({"°": "^\\circ ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "\u222a": "\\cup "}),
    **str.maketrans({"²": "^2", "³": "^3", "½": "\\frac{1}{2}", "\uff0c": ",", "\uff1a": ":"}),
}
_ENDING = re.compile(r"(?:\s|[.,;]|(?<!\\)\$|\\[,;:! ]|\\$)+$")
_SECOND = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\b(?:or|and)\b[^{}]*\d[^{}]*\}")  # no unit, another answer
_BASED = re.compile(r"(?:[A-Za-z]\w* ?= ?)?([0-9][0-9A-Za-z]*) ?(?:_ ?(?:base)?|(?:in )?base)[ -]?(\w+)")
_BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
_BASES += ["fourteen", "fifteen", "sixteen"]
_STYLE = r"\\(?:text|mbox|mathrm|textrm)(?![A-Za-z])"
_SETTING = re.compile(rf"{_STYLE}|\\[,;:! ]|[{{}}()~]")
_UNIT = (
    r"(?:[cdkm]?m|[km]?g|ft|in|yd|mi|sec|s|h|hr|min|feet|foot|inch(?:es)?|(?:centi|milli|kilo)?met(?:er|re)s?|yards?"
    r"|miles?|units?)(?:\^(?:\{-?\d\}|-?\d))?"
)
# 12m^2 may be a monomial
_UNITS = re.compile(rf"(?:(?<=[\d}}i])(?:\s|~|\\[,;: ])+|(?<=\d)(?=[cdkm]m)){_UNIT}(?:\s?/\s?{_UNIT})*$")


def _without_unit(text: str, other: str) -> str:
    r"""``12 cm^2`` as ``12`` where nothing says that letters are variables; the library knows ``12 cm`` and
    ``12\text{ cm}^2``."""
    found = _UNITS.search(text)
    if found is None or not re.search("[/^]", found.group()):
        return text
    sides = (side.rpartition("=")[2] for side in (text[: found.start()], _UNITS.sub("", other)))
    names = re.sub(rf"{_STYLE}\s*\{{[^{{}}]*\}}|\\[A-Za-z]+", "", " ".join(sides))
    return text if re.search("[A-Za-z]", names) else text[: found.start()]


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
    text = joined_thousands(answer.translate(_UNICODE)).strip()
    for mark in ("**", "`", "*", "$"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    if not re.search(r"\.\.\.$|\\l?dots\W*$", text):  # an ellipsis says that there is more
        text = _ENDING.sub("", text)
    text = re.sub(r"(\d)\s+(\d+)\s?/\s?(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(?<=\d)\s+(?=\d)", ", ", _digits(text))  # it adds 1 2 to 3


def _same_text(given: str, wanted: str) -> bool | None:
    """Whether they are equal, where that needs no algebra; None where it does."""
    if given == wanted:
        return True
    if _SECOND.search(given):
        return False
    if based := _based(wanted):
        return _based(given) == based
    a, b = _decimal(given, wanted), _decimal(wanted, given)
    if a is None or b is None:
        return None
    if a.value == b.value:
        return True
    if a.exact and b.exact:
        return False
    near = abs(a.value - b.value) <= CLOSE * max(abs(a.value), abs(b.value))
    return near and round(a.value, 6) == round(b.value, 6)


def _decimal(text: str, other: str) -> Number | None:
    """`number`; ``2,5`` is 2.5 if the other side writes a decimal point."""
    found = number(text)
    if found is None and re.fullmatch(r"-?\d+\.\d+", other):
        found = number(re.sub(r"^(-?\d+)(?:,|\{,\})(\d+)$", r"\1.\2", text))
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
