r"""The paper's verifier: the content of the last \boxed{} equals the ground truth after LaTeX normalisation.

Written from the description and the cases in arXiv 2604.14142's released code; strings are compared, not values:
``27.0`` is not ``27``, ``-\frac{33}{2}`` is not ``\frac{-33}{2}``. Which answers count as wrong decides what NSR
trains on, so a reproduction needs exactly this one.
"""

import re
from collections.abc import Mapping
from typing import Any

from prerl_lightning.rewards.score import Score


def boxed_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the last box of ``response`` equals ``ground_truth`` after normalisation, else 0.0; 0.0 without a box,
    and for a truncated response (``extra["truncated"]``).

    The paper's rule to the letter, also where it errs: of several boxes the last alone counts, and ``\boxed `` with a
    space before any of them; a hedge in a box is a string like others; ``3\text{ or }7`` is cut to ``3``; AIME's
    ``033`` is not ``33``; an empty box earns an empty ground truth. What stands behind the box is not looked at.
    """
    answer = None if extra.get("truncated") else last_boxed(response)
    if answer is None:
        return Score(0.0)
    return Score(equivalent(answer, ground_truth), normalised(answer))


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces balanced, or, where some ``\boxed `` has a space for its brace, of
    the last of those up to the next ``$``. None where there is none, or its braces do not close."""
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$", 1)[0]
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
    return None


def equivalent(a: str, b: str) -> bool:
    """Equal after normalisation, or, where one of them cannot be normalised, as they stand."""
    try:
        return normalise(a) == normalise(b)
    except _MalformedError:
        return a == b


def normalised(text: str) -> str:
    """`normalise`, or the text itself where it cannot be."""
    try:
        return normalise(text)
    except _MalformedError:
        return text


class _MalformedError(Exception):
    pass


DROPPED = ("\n", "\\!")
DROPPED_LATER = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


def normalise(text: str) -> str:
    r"""The LaTeX clean-up of the MATH benchmark's checker (arXiv 2103.03874).

    Spacing, degree signs, ``\left``/``\right`` and trailing units (``\text{ miles}``) go; ``x=`` in front goes;
    ``.5`` becomes ``0.5``, ``0.5`` and ``a/b`` become ``\frac``; ``\sqrt3`` and ``\frac12`` get their braces.
    """
    for piece in DROPPED:
        text = text.replace(piece, "")
    text = text.replace("\\\\", "\\").replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    for piece in DROPPED_LATER:
        text = text.replace(piece, "")
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise _MalformedError
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    quotient = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    if quotient and all(str(int(n)) == n for n in quotient.groups()):
        return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}"
    return text


def _brace_roots(text: str) -> str:
    head, *rest = text.split("\\sqrt")
    if "" in rest:
        raise _MalformedError
    return head + "".join("\\sqrt" + (r if r[0] == "{" else f"{{{r[0]}}}{r[1:]}") for r in rest)


def _brace_fractions(text: str) -> str:
    head, *rest = text.split("\\frac")
    done = head
    for part in rest:
        if not part:
            raise _MalformedError
        if part[0] == "{":
            done += "\\frac" + part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            done += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            done += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return done
