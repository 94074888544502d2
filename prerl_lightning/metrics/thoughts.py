"""Reasoning behaviours counted by keywords, as arXiv 2604.14142 counts transitions and reflections.

The families are data: assets/thoughts.yaml, or a file of the user's. A phrase matches whole words, in any case:

- a space is any white space, `'` also ’, and a `*` at the end the rest of the word (``recheck*``: rechecked, not "re");
- words of scripts without spaces (Chinese, Japanese, Thai ...) match anywhere;
- a passage counts once: the phrase that begins first, of those that begin there the longest ("no, wait" is
  backtracking and no transition).
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Tensor
from torchmetrics import Metric

from prerl_lightning.errors import InputError
from prerl_lightning.metrics.evaluation import bootstrap, is_right
from prerl_lightning.ranks import gather_state

FAMILIES = Path(__file__).parents[1] / "assets" / "thoughts.yaml"
Families = Mapping[str, Sequence[str]]

# words are not set apart by spaces in these
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")

_LONG = 500  # characters of a text; in fewer, numpy's calls take longer than the search
_PLACES = 8
_ORDER = ((2, 4), (1, 3, 5, 6, 7))  # of the places after the first: those that rule most out, then the others
_ASCII = "".join(map(chr, range(128)))
_NO_LETTERS = re.sub(r"\w", "", _ASCII)
_SPACES = "".join(re.findall(r"\s", _ASCII)) + "?"
# all outside ASCII that matches an ASCII character of a phrase: \u2019, dotless and dotted i, long s, Kelvin
_ALIKE = {"\u2019": "'", "\u0131": "i", "\u0130": "i", "\u017f": "s", "\u212a": "k"}


def load_families(given: str | Path | Families | None = None) -> dict[str, list[str]]:
    """Family -> phrases, from a YAML file or as they are; None: this package's.

    Raises:
        InputError: the file is missing or it has another form; a phrase is empty, or in it twice.
    """
    where, found = "thoughts.families", given
    if not isinstance(given, Mapping):
        path = Path(given or FAMILIES)
        where = f"thoughts.families: {path}"
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{where} cannot be read: {error}") from error
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{where}: must map each family to a list of phrases.")
    seen: dict[str, str] = {}
    for family, phrases in found.items():
        if not re.fullmatch(r"\w+", str(family)) or not isinstance(phrases, list) or not phrases:
            raise InputError(
                f"{where}: {family!r}: a family is one word and a list of phrases, as in family: [wait, but]."
            )
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip(" *"):
                raise InputError(f"{where}: {family}: {phrase!r} is no phrase; put it in quotes.")
            key = _folded(phrase)
            if key in seen:
                raise InputError(f"{where}: {phrase!r} is in {family} and in {seen[key]}.")
            seen[key] = family
    return {str(family): list(phrases) for family, phrases in found.items()}


def _folded(phrase: str) -> str:
    return " ".join(phrase.replace("\u2019", "'").lower().split())


def _bounded(letter: str) -> bool:
    """Whether a phrase with this letter at its edge ends there only where the word does."""
    in_word = re.match(r"\w", letter) or unicodedata.category(letter).startswith("M")
    return bool(in_word) and not unicodedata.name(letter, "").startswith(_UNSPACED)


@lru_cache
def _marks() -> str:
    """All combining marks of the basic plane, to stand in a regular expression's class."""
    return "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c).startswith("M"))


class _Starts:
    """The few places of a text where an English phrase can begin; of those where one does, none is left out.

    Each phrase has a bit (more than 64 share them, neighbours in the alphabet), and a table says which phrases can
    have a character at their first place, at their second, and so on to the eighth. A phrase can begin where a word
    does and the eight entries for the text from there have a bit in common. Characters outside ASCII are read as "?",
    which therefore stands for white space and for the end of a word too.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        firsts = {phrase[0] for phrase in phrases}
        # 0: no letter, or outside ASCII; 2: the first of a phrase; 1: another letter
        self._kinds = bytes(0 if c in _NO_LETTERS else 1 + (c.lower() in firsts) for c in _ASCII).ljust(256, b"\0")
        self._phrases_with = np.zeros((_PLACES, 128), np.uint64)
        for number, phrase in enumerate(sorted(phrases)):
            letters, star, _ = phrase.partition("*")
            space = (letters + " ").index(" ")
            ends = not star and space == len(letters) and _bounded(letters[-1])
            for place in range(_PLACES):
                here = _NO_LETTERS if ends and place == len(letters) else _ASCII
                if place < len(letters):  # more white space than one character shifts what is behind it
                    here = letters[min(place, space) : place + 1]
                    here = (here + here.upper()).replace(" ", _SPACES)
                self._phrases_with[place, list(here.encode())] |= np.uint64(1 << number * 64 // len(phrases))

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, first letter of the phrases that can begin there), from left to right."""
        for letter, same in _ALIKE.items():
            text = text.replace(letter, same)
        data = b" " + text.encode("ascii", "replace") + b" " * _PLACES
        kinds = np.frombuffer(data.translate(self._kinds), np.uint8)
        letters = np.frombuffer(data, np.uint8)[1:]
        starts = np.flatnonzero((kinds[:-1] == 0) & (kinds[1:] == 2))
        phrases = self._phrases_with[0].take(letters.take(starts))
        for places in _ORDER:
            for place in places:
                phrases &= self._phrases_with[place].take(letters[place:].take(starts))
            left = np.flatnonzero(phrases)
            starts, phrases = starts.take(left), phrases.take(left)
        return zip(starts.tolist(), letters.take(starts).tobytes().decode().lower(), strict=True)


class ThoughtFinder:
    """Finds the phrases of families in text, 6 MB a second and more, in long English 50 (benchmarks/watchers.py).

    A regular expression of all phrases is tried at each character. In a long text and for English phrases, one of
    those with the same first letter is tried instead, only where they can begin (`_Starts`).
    """

    def __init__(self, families: Families) -> None:
        self.families = tuple(families)
        phrases = {_folded(phrase): family for family, phrases in families.items() for phrase in phrases}
        # vowel signs and accents that stand for themselves are no \w; a class with them is long, and English has none
        self._letter = r"\w" if all(phrase.isascii() for phrase in phrases) else rf"[\w{_marks()}]"
        self._all = self._compiled(phrases)
        self._starts: _Starts | None = None
        if all(phrase.isascii() and _bounded(phrase[0]) for phrase in phrases):
            self._starts = _Starts(list(phrases))
            letters = {phrase[0] for phrase in phrases}
            self._of_letter = {c: self._compiled({p: f for p, f in phrases.items() if p[0] == c}) for c in letters}

    def _compiled(self, phrases: Mapping[str, str]) -> tuple[re.Pattern[str], list[str]]:
        """A regular expression, and the family of each of its groups."""
        groups: list[str] = []
        anywhere = {p: f for p, f in phrases.items() if not _bounded(p[0])}
        alternatives = [self._alternatives(anywhere, groups)] if anywhere else []
        if rest := {p: f for p, f in phrases.items() if p not in anywhere}:
            alternatives.append(f"(?<!{self._letter})" + self._alternatives(rest, groups))
        return re.compile("|".join(alternatives), re.IGNORECASE), groups

    def _alternatives(self, phrases: Mapping[str, str], groups: list[str]) -> str:
        """One regular expression for many phrases, branching letter by letter; a list of them is 5 times slower."""
        tree: dict[str, Any] = {}
        for phrase, family in phrases.items():
            node = tree
            for letter in phrase:
                node = node.setdefault(letter, {})
            node[""] = family
        return self._branch(tree, "", groups)

    def _part(self, letter: str) -> str:
        special = {" ": r"\s+", "'": "['\u2019]", "*": f"{self._letter}*"}
        return special.get(letter) or re.escape(letter)

    def _branch(self, node: Mapping[str, Any], before: str, groups: list[str]) -> str:
        letters = sorted(node, key=lambda c: (c == "*", c))
        found = [self._part(c) + self._branch(node[c], c, groups) for c in letters if c]
        if "" in node:  # tried last, so that the longest phrase wins; the empty group says whose it was
            groups.append(node[""])
            found.append((f"(?!{self._letter})" if _bounded(before) else "") + "()")
        return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        if self._starts is None or len(text) < _LONG:
            pattern, groups = self._all
            for match in pattern.finditer(text):
                yield *match.span(), groups[cast(int, match.lastindex) - 1]
            return
        end = 0
        for start, letter in self._starts(text):
            pattern, groups = self._of_letter[letter]
            if start >= end and (found := pattern.match(text, start)):
                end = found.end()
                yield start, end, groups[cast(int, found.lastindex) - 1]

    def spans(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, family) in characters of ``text``, one behind the other."""
        return list(self._found(text))

    def counts(self, text: str) -> list[int]:
        """How often each family occurs, in the order of `families`."""
        found = dict.fromkeys(self.families, 0)
        for _, _, family in self._found(text):
            found[family] += 1
        return list(found.values())


def ratio_interval(now: Tensor, start: Tensor) -> tuple[float, float]:
    """95 % interval of sum(now) / sum(start) by a bootstrap over problems, each drawn with both of its counts.

    Args:
        now, start: (P,) float64 counts of the same problems.

    Returns:
        Its ends; infinite where more than 2.5 % of the draws have none at the start.
    """
    low, high = torch.quantile(
        (bootstrap(now) / bootstrap(start)).nan_to_num(nan=math.inf, posinf=math.inf),
        torch.tensor([0.025, 0.975], dtype=torch.float64),
        interpolation="nearest",  # between a number and infinity lies none
    ).tolist()
    return low, high


class ThoughtCounts(Metric):
    """Mean counts a response and per 1,000 tokens: of all responses, of right and of wrong ones.

    Right is a reward of 1 or more, as in pass@k. Its state is on the CPU.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, families: Sequence[str]) -> None:
        super().__init__(dist_sync_fn=gather_state)
        self.families = tuple(families)
        # wrong and right; of each the families' counts, the tokens and the responses
        self.add_state("totals", torch.zeros(2, len(families) + 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, counts: Tensor, tokens: Tensor, rewards: Tensor) -> None:
        """(N, families) counts; (N,) tokens and rewards."""
        ones = torch.ones_like(tokens)
        rows = torch.cat([counts, tokens[:, None], ones[:, None]], dim=1).double()
        self.totals.index_add_(0, is_right(rewards).long().to(self.totals.device), rows.to(self.totals))

    def compute(self) -> dict[str, float]:
        """FAMILY, FAMILY_per_1k, and of each /right and /wrong; what there are no responses for is left out."""
        wrong, right = self.totals.tolist()
        both = [w + r for w, r in zip(wrong, right, strict=True)]
        found: dict[str, float] = {}
        for suffix, (*counts, tokens, responses) in (("", both), ("/right", right), ("/wrong", wrong)):
            for family, count in zip(self.families, counts, strict=True):
                if responses:
                    found[family + suffix] = count / responses
                if tokens:
                    found[f"{family}_per_1k{suffix}"] = 1000 * count / tokens
        return found
