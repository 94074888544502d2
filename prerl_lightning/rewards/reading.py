r"""How an answer is read from a response by every verifier but `boxed_reward`, whose rule is the paper's to the letter.

- Of a response with ``</think>``, what stands behind the last one counts, if anything does.
- The box is the last ``\boxed{}`` (or ``\fbox{}``, ``\boxed5``) that holds something: one that is only mentioned, with
  nothing or dots in it, is none. Boxes with nothing but commas, "and" or "or" between them are one answer of several
  parts: three boxes are right where the truth has three values, and no hedge for a truth of one.
- Numbers have a sign (``-``, U+2212, an en dash), thousands in threes, a decimal point, and an exponent
  (``1.6e-19``, ``1.6 \times 10^{-19}``) or a denominator (``3/4``, ``\frac34``, ``2\frac{1}{2}``, ``2 1/2``), which
  repeating decimals have too (``0.1\overline{6}``, ``0.1\dot{6}``).
- What an answer in a box is dressed in is no part of it: a style (``\text{50}``, ``\mathbf{50}``), a colour, a currency
  in front, "about" and ``\approx``, a label ("Total:", "The answer is"). ``2 million`` is 2000000.
"""

import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LONGEST = 1000  # characters of an answer; what is longer is none
LOOKED_AT = 100_000  # characters of a response, its last ones

_OPEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_ALL_BRACES = re.compile(r"[{}]")
_TOKEN = re.compile(r"[-+]?\d[\d.,/]*|\\[dt]?frac[^$\n]*|\\sqrt[^$\n]*")  # \boxed5, and what models make of it
_NOTHING = re.compile(r"(?:[\s.…{}]|\\(?:[lc]?dots|text\b|[,;:! ])|\b(?:your|the|final|answer|here)\b)*", re.IGNORECASE)
_BETWEEN = re.compile(
    r"(?:[\s$,;.&]|\\(?:[,;:!()\[\] \\]|q?quad\b)|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?"
    r"|[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=)*"
)
_PERCENT = re.compile(r"\s*(?:\$|\\[)\]])?\s*(?:\\?%|percent\b|pct\b)", re.IGNORECASE)


def final_part(response: str) -> str:
    """What stands behind the last ``</think>``; all of it where nothing does."""
    response = response[-LOOKED_AT:]
    tail = response.rpartition("</think>")[2]
    return tail if tail.strip() else response


def boxed_answer(text: str) -> str | None:
    """Content of the last box, of several joined ones with commas between; ``""`` where boxes are spoken of but none
    holds an answer, or the last does not close; None without any."""
    opened = deque(_OPEN.finditer(text), maxlen=20)  # an answer has no more parts
    if not opened:
        return None
    closing = _closing(text, _BRACES)
    if opened[-1].end() not in closing:  # as the paper's rule has it: 2007+\frac{\}{p}i2 is a truth of MATH
        closing = _closing(text, _ALL_BRACES) | closing
    parts: list[str] = []
    begin, percent = 0, ""
    for box in reversed(opened):
        at = box.end()
        if text[at : at + 1] == "{":
            if at not in closing:
                break
            if parts and closing[at] > begin:  # the box around the last one
                continue
            content, end = text[at + 1 : closing[at]].strip(), closing[at] + 1
        elif token := _TOKEN.match(text, at):
            content, end = token.group().rstrip(".,/"), token.end()
        else:
            continue
        if _NOTHING.fullmatch(content):
            continue
        if not parts:
            percent = r"\%" if "%" not in content and _PERCENT.match(text, end) else ""
        elif begin - end > 100 or not _BETWEEN.fullmatch(text, end, begin):
            break
        if content not in parts:
            parts.append(content)
        begin = box.start()
    return ", ".join(reversed(parts)) + percent


def _closing(text: str, braces: re.Pattern[str]) -> dict[int, int]:
    """Where each opened brace that closes does so."""
    closing: dict[int, int] = {}
    stack: list[int] = []
    for brace in braces.finditer(text):
        if brace.group() == "{":
            stack.append(brace.start())
        elif brace.group() == "}" and stack:
            closing[stack.pop()] = brace.start()
    return closing


def nested(text: str) -> int:
    """How deep brackets stand in brackets, of whatever kind."""
    deepest = depth = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


@dataclass(frozen=True)
class Number:
    """A number as written.

    Args:
        value: exactly what stands there.
        exact: written without a decimal point and without an exponent.
    """

    value: Fraction
    exact: bool

    def __str__(self) -> str:
        """Alike for equal values: ``18``, ``0.75``; to 28 digits where it is no integer."""
        if self.value.denominator == 1:
            return str(self.value.numerator)
        return str((Decimal(self.value.numerator) / Decimal(self.value.denominator)).normalize())


SIGNS = {ord(c): "-" for c in "\u2212\u2010\u2011\u2013\ufe63\uff0d"}  # an em dash is punctuation
_PLAIN = {**SIGNS, **{ord(c): "*" for c in "\u00d7·\u22c5\u2217"}}
_FRAC = re.compile(r"(?:(\d)\s*)?\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3}){1,9}(?![\d,])|\d+)"
_NUMBER = re.compile(
    rf"""(?=[-+.\d])(?P<sign>[-+]?)(?:
        (?P<whole>\d+)\s+(?P<n>\d+)\s*/\s*(?P<d>\d+)
      | 10\s?\^\s?(?P<p>[-+]?\d{{1,3}}|\{{\s*[-+]?\d{{1,3}}\s*\}}|\([-+]?\d{{1,3}}\))
      | (?P<a>{_INTEGER}(?:\.\d+)?|\.\d+)
        (?: \s*/\s*(?P<b>{_INTEGER})(?!\.\d)
          | [eE](?P<e>[-+]?\d{{1,3}})(?!\w|\.\d)
          | \s*[*x]\s*10\s?\^\s?(?P<t>[-+]?\d{{1,3}}|\{{\s*[-+]?\d{{1,3}}\s*\}}|\([-+]?\d{{1,3}}\)) )? )""",
    re.VERBOSE,
)
EXPONENT = re.compile(
    r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)(?:[eE]|\\(?:mathrm|text)\{[eE]\})\{?([-+]?\d{1,3})\}?(?!\w|\.\d)"
)
_SEPARATED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\\!\s?|\{,\}|\\[,!; ]|[ ~\u00a0\u2009\u202f])\d{3}){1,9}(?!\d)")

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_TENS = re.compile(r"(?<!\d)10[⁻⁺]?[⁰¹²³⁴-⁹]+")


def raised(text: str) -> str:
    """``3⁵`` as ``3^{5}``."""
    return re.sub(r"[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)


_REPEATING = re.compile(
    r"(?<![\w.,])(\d{0,20})\.(\d{0,20})(?:\\(?:overline|bar)\s*(?:\{\s*(\d{1,20})\s*\}|(\d))"
    r"|\\dot\s*(?:\{\s*(\d)\s*\}|(\d))(?:(\d{0,20})\\dot\s*(?:\{\s*(\d)\s*\}|(\d)))?)"  # on its first and last digit
)


def repeating(text: str) -> str:
    r"""Repeating decimals as fractions: ``0.1\overline{6}`` and ``0.1\dot{6}`` as ``\frac{15}{90}``."""

    def fraction(found: re.Match[str]) -> str:
        whole, fixed, *period = (part or "" for part in found.groups())
        once, again = int(f"0{whole}{fixed}"), "".join(period)
        return f"\\frac{{{int(f'{once}{again}') - once}}}{{{'9' * len(again)}{'0' * len(fixed)}}}"

    return _REPEATING.sub(fraction, text)


def joined_thousands(text: str) -> str:
    r"""``10\,000``, ``10{,}000``, ``10,\!000`` and ``10 000`` as ``10000``."""
    return _SEPARATED.sub(lambda m: re.sub(r"\D", "", m.group()), text)


TEXT = r"\\(?:text(?:rm|bf|it|normal)?|mbox|math(?:rm|bf|it))(?![A-Za-z])\s*"
MORE = r"\b(?:or\s+[A-Za-z]|at\s(?:least|most)\b)"  # behind a number: a bound, or another answer
_MULTIPLIERS = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "trillion": "10^{12}"}
_MULTIPLIERS["dozen"] = "12"
_MULTIPLIER = re.compile(
    rf"(?<=[\d}}])(?:[\s~]|\\[,;: ])*+({TEXT}\{{\s*)?({'|'.join(_MULTIPLIERS)})s?(?![A-Za-z])(?(1)(\s*\}})?)"
)


def multiplied(text: str) -> str:
    r"""``3\text{ million dollars}`` as ``3\times 10^6\text{ dollars}``."""
    return _MULTIPLIER.sub(lambda m: f"\\times {_MULTIPLIERS[m[2]]}" + (m[1] if m[1] and not m[3] else ""), text)


_ABOUT = r"(?i:about|approximately|approx\.?|around|roughly)"
_LABEL = r"[A-Za-z][A-Za-z' ]{1,60}:|[A-Za-z][A-Za-z' ]{0,60}\s(?:is|are)\b:?"
_LEAD = re.compile(
    rf"\A(?:[\s=≈~€£¥]|Rs\.|\\(?:approx|simeq|sim|pounds|therefore|displaystyle|[lL]arge|bf|rm|tt|q?quad)(?![A-Za-z])"
    rf"|\\[,;:! ]|{TEXT}\{{\s*(?:{_ABOUT}|{_LABEL})\s*\}}|{_ABOUT}\s|{_LABEL})++(?![A-Za-z]{{2}})"
)
_STYLED = re.compile(rf"(?:({TEXT})|\\(?:boldsymbol|bm|underline)\s*)?\{{")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{\w+\}")
NEAR = re.compile(r"\\(?:approx|simeq)(?![A-Za-z])|≈")


def undressed(text: str) -> str:
    r"""``25`` of ``\mathbf{25}``, ``\color{red}{25}``, ``{+}25``, ``\approx 25``, ``\text{Total: }25``, ``€25``. Words
    in a style stay as they are: a library may take their letters for variables."""
    text = re.sub(r"\{([-+])\}", r"\1", _COLOUR.sub("", multiplied(text)))
    while True:
        text = _LEAD.sub("", text).strip()
        styled = _STYLED.match(text)
        if not styled or _closing(text, _BRACES).get(styled.end() - 1) != len(text) - 1:
            return text
        inner = text[styled.end() : -1].strip()
        if not inner or (styled[1] and re.match(r"[^\d\\]*[A-Za-z]", _LEAD.sub("", inner))):
            return text
        text = inner


def plain(text: str) -> str:
    r"""LaTeX's fractions, products and signs as numbers are read here: ``2\frac{1}{2}`` as ``2 1/2``."""
    if not text.isascii():
        text = _TENS.sub(lambda m: raised(m[0]), text.translate(_PLAIN))
    text = EXPONENT.sub(r"\1e\2", repeating(text))
    return _FRAC.sub(_fraction, re.sub(r"\\(?:times|cdot|ast)(?![A-Za-z])", "*", text))


def _fraction(found: re.Match[str]) -> str:
    whole, above, below = found[1], found[2] or found[3], found[4] or found[5]
    if below.startswith("-"):
        if whole or found.string[: found.start()].rstrip().endswith(("-", "+")):
            return found[0]
        above, below = f"-{above}".removeprefix("--"), below[1:]
    return (f"{whole} " if whole else "") + f"{above}/{below}"


def number(text: str) -> Number | None:
    """Of a text that is one number and nothing else."""
    if len(text) > LONGEST:
        return None
    text = joined_thousands(plain(text).strip())
    sign = re.match(r"-\s+", text)
    found = _NUMBER.fullmatch(text, sign.end() if sign else 0)
    if found is None or (sign and found["sign"]):
        return None
    return _valued(found, negative=bool(sign))


def first_number(text: str) -> tuple[int, int, Number] | None:
    r"""Start, end and number of the first one in a `plain` text: ``3/4`` is one, ``-$5`` is -5."""
    found = _NUMBER.search(text)
    value = found and _signed(found, text)
    return (found.start(), found.end(), value) if found and value else None


def last_number(text: str) -> Number | None:
    """The last one in a text."""
    for size in (300, len(text)):
        end = plain(text[-size:])
        last = deque(_NUMBER.finditer(end), maxlen=1)
        if last and (size >= len(text) or last[0].start() > 100):  # none that the cut went through
            return _signed(last[0], end)
    return None


def _signed(found: re.Match[str], text: str) -> Number | None:
    before = text[max(0, found.start() - 8) : found.start()].rstrip(" $\\")
    # a minus with a space or a currency behind it: a sign where nothing stands before it that it could be taken from
    apart = not found["sign"] and before.endswith("-") and not re.search(r"[\w)]\s*-$", before)
    return _valued(found, negative=apart) if len(found.group()) <= LONGEST else None


def _valued(found: re.Match[str], negative: bool) -> Number | None:
    if found["whole"]:
        parts, exponent = (found["whole"], found["n"], found["d"]), ""
    else:
        parts, exponent = ("0", found["a"] or "1", found["b"] or "1"), found["p"] or found["e"] or found["t"] or ""
    whole, above, below = (Fraction(part.replace(",", "")) for part in parts)
    if not below:
        return None
    value = (whole + above / below) * Fraction(10) ** int(exponent.strip("{() }") or 0)
    exact = "." not in parts[1] and not found["e"]
    return Number(-value if negative or found["sign"] == "-" else value, exact)
