"""Multiple choice."""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

from prerl_lightning.rewards.reading import boxed_answer, final_part
from prerl_lightning.rewards.score import Score


def choice_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    r"""1.0 if the chosen letter is the ground truth's (``C``, ``(C)``, ``c``), else 0.0; 0.0 if truncated.

    The first of these that says a letter is read, and of several of its kind the last: a box; "the answer is (C)",
    "Answer: C", "the right option is C"; "I choose C"; "C is correct", "so C."; the only "(C)" of the response, in
    front or at its end; a response that is a letter and little else, or begins with one ("C. Carbon", "C, because").
    Letters may be in bold, dollars, brackets, quotes or ``\text{}``.

    A hedge ("A or B", ``\boxed{A, B}``) is no choice, and is not looked behind; options that are listed or spoken of
    ("Option B is wrong") are none; what is explained behind the answer does not undo it, another "the answer is" does.
    The article "a" and the pronoun "I" are letters only where the clause ends with them, or "because" follows.

    Raises:
        ValueError: the ground truth names no letter.
    """
    truth = _LONE.fullmatch(_unmarked(ground_truth).strip())
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth[:100]!r} names no letter")
    answer = None if extra.get("truncated") else chosen(final_part(response))
    return Score(answer == _letter(truth), answer)


_MARKUP = re.compile(
    r"\\(?:text|math|bf|rm)(?:bf|rm|sf|it|tt|normal)?(?![A-Za-z])|\\[()]|[{}$*`\"'\u201c\u201d\u2018\u2019«»]|__|</answer>"
)
_BRACKETS = str.maketrans("[]\uff08\uff09\uff1a\uff1d\u3010\u3011", "()():=()")


def _unmarked(text: str) -> str:
    """Without bold, dollars, braces and quotes, brackets of every kind round, spaces single."""
    text = _MARKUP.sub("", text.translate(_BRACKETS)).replace("<answer>", "answer: ")
    text = re.sub(r"<([A-Za-z])>", r"(\1)", text)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


_CLAUSE_ENDS = r"(?=\s*(?:[.,;:!?)&/]|$|[-\u2013]\s|(?:because|since|as|and|or)\b)|\s*\n|\s\d)"
# in brackets; a capital that nothing goes on from; the rest, among them "a" and "I", where the clause ends
_LETTER = rf"(?:\(\s?([A-Za-z])\s?\)|([B-HJ-Z])(?!\w|\s*[=^_])|([AIa-z])(?!\w){_CLAUSE_ENDS})"
_CAPITAL = r"(?<![\w(])\(?([A-Z])\)?(?!\w)"
_FILLER = r"(?:(?i:either|both|probably|likely|clearly|rather|therefore|thus|the|option|choice|letter|answer)\s){0,3}"
_WORDS = r"(?:\s(?!(?:is|are|not|isnt|never|cannot|cant|options|choices)\b)[\w-]+){0,6}?"
_IS = r"\s*(?:(?:is|must be|should be|has to be|will be|would be|seems to be)\b\s*:?|[:=]|[-\u2013](?=\s)|是|为)\s*"
_NOT = r"(?i:\s(?:isnt|is\s(?:not|neither))\s)[^.\n]{0,40}?\b(?:but|its|it is|rather)\s"

_STATEMENTS = [
    re.compile(pattern)
    for pattern in (
        rf"(?:(?i:\b(?:answer|option|choice))(?![A-Za-z])|答案)"
        rf"(?:{_WORDS}{_IS}{_FILLER}{_LETTER}|{_NOT}{_FILLER}{_LETTER}{_CLAUSE_ENDS})",
        rf"(?i:\b(?:choose|chose|pick|select|go with|going with))\s{_FILLER}{_LETTER}",
        rf"{_CAPITAL}\sis\s(?:the\s|clearly\s)?(?:right|correct|best|answer)\b"
        rf"|(?i:\b(?:so|therefore|thus|hence|answer)\b),?\s{_FILLER}{_CAPITAL}(?=[\s.]*$)",
    )
]
# behind a statement: another letter at the end of its clause, or two and more options without a word on why
_HEDGED = re.compile(
    rf"\)?\s*(?:[,/&]\s?|\(?\b(?:and|or|nor)\s)+(?:(?:maybe|possibly|perhaps|either|option|choice)\s)*"
    rf"(?:\([A-Za-z]\)|[A-Z](?!\w)){_CLAUSE_ENDS}"
    rf"|[^.;\n]{{0,30}}?\b(?:could|might|may)\s(?:also\s)?be\s{_FILLER}(?:\([A-Z]\)|[A-Z](?!\w))"
    r"|(?:(?:(?!\b(?:because|since|as|not|but|while)\b)[^.,;\n])*?(?<!\w)\([A-Z]\)){2}"
)
_BOXED = re.compile(r"\(?([A-Za-z])(?:\)|(?=[.:,/\s]|$))(?!\s*[=+*^_<>-])")
_LONE = re.compile(r"\W{0,3}(?:(?i:option|choice|letter|answer)\s\(?)?([A-Za-z])\W{0,9}")
# with its explanation; a letter of a list, or of a second thought
_EXPLAINED = re.compile(r"([A-Z])(?:[.:]\s|\s[-\u2013]\s|,?\s(?:because|since)\b)")
_ANOTHER = re.compile(r"(?<!\w)([A-Z])(?:[.:,)]|\s[-\u2013]\s|\W*$)")
_LISTED = re.compile(r"(?<![\w(])\(?([A-Z])\)")


def _letter(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def chosen(text: str) -> str | None:
    """The letter, in upper case; None without one, and for a hedge."""
    boxed = _unmarked(boxed_answer(text) or "")
    if found := _BOXED.match(boxed):
        return None if re.search(r"(?<!\w)[A-Z](?!\w)", boxed[found.end() :]) else _letter(found)
    text = _unmarked(text)
    for pattern in _STATEMENTS:
        if last := deque(pattern.finditer(text), maxlen=1):
            return None if _HEDGED.match(text, last[0].end()) else _letter(last[0])
    if len(set(_LISTED.findall(text))) == 1:
        found = re.match(r"\W*\(?([A-Z])\)", text) or re.search(r"\(?([A-Z])\)[^A-Za-z(]*$", text)
        return found[1] if found else None
    found = _LONE.fullmatch(text[:40]) or _EXPLAINED.match(text)
    if found is None or {_letter(found), *_ANOTHER.findall(text, found.end())} != {_letter(found)}:
        return None
    return _letter(found)
