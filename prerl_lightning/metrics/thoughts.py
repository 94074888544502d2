"""Reasoning behaviours counted by keywords, as arXiv 2604.14142 counts transitions and reflections.

The families are data: assets/thoughts.yaml, or a file of the user's. A phrase matches whole words, in any case:

- a space is any white space, `'` also ’, and a `*` at the end the rest of the word (``recheck*``: rechecked, not "re");
- words of scripts without spaces (Chinese, Japanese, Thai ...) match anywhere;
- a passage counts once: the phrase that begins first, of those that begin there the longest ("no, wait" is
  backtracking and no transition).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor
from torchmetrics import Metric

from prerl_lightning.errors import InputError
from prerl_lightning.metrics.evaluation import is_right

FAMILIES = Path(__file__).parents[1] / "assets" / "thoughts.yaml"
Families = Mapping[str, Sequence[str]]

# words are not set apart by spaces in these
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def load_families(path: str | Path | None = None) -> dict[str, list[str]]:
    """Family -> phrases from a YAML file; None: this package's.

    Raises:
        InputError: the file is missing or has another form; a phrase is empty, or in it twice.
    """
    path = Path(path or FAMILIES)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"thoughts.families: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"thoughts.families: {path} must map each family to a list of phrases.")
    seen: dict[str, str] = {}
    for family, phrases in found.items():
        if not re.fullmatch(r"\w+", str(family)) or not isinstance(phrases, list) or not phrases:
            raise InputError(
                f"thoughts.families: {path}: {family!r}: a family is one word and a list of phrases, as in "
                "family: [wait, but]."
            )
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip(" *"):
                raise InputError(f"thoughts.families: {path}: {family}: {phrase!r} is no phrase; put it in quotes.")
            key = _folded(phrase)
            if key in seen:
                raise InputError(f"thoughts.families: {path}: {phrase!r} is in {family} and in {seen[key]}.")
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


class ThoughtFinder:
    """Finds the phrases of families in text, 6 MB a second and more (benchmarks/watchers.py)."""

    def __init__(self, families: Families) -> None:
        self.families = tuple(families)
        phrases = {_folded(phrase): family for family, phrases in families.items() for phrase in phrases}
        self._of_group: list[str] = []  # family by number of the pattern's group
        # vowel signs and accents that stand for themselves are no \w; a class with them is long, and English has none
        self._letter = r"\w" if all(phrase.isascii() for phrase in phrases) else rf"[\w{_marks()}]"
        anywhere = {p: f for p, f in phrases.items() if not _bounded(p[0])}
        alternatives = [self._alternatives(anywhere)] if anywhere else []
        if rest := {p: f for p, f in phrases.items() if p not in anywhere}:
            alternatives.append(f"(?<!{self._letter})" + self._alternatives(rest))
        self._pattern = re.compile("|".join(alternatives), re.IGNORECASE)

    def _alternatives(self, phrases: Mapping[str, str]) -> str:
        """One regular expression for many phrases, branching letter by letter; a list of them is 5 times slower."""
        tree: dict[str, Any] = {}
        for phrase, family in phrases.items():
            node = tree
            for letter in phrase:
                node = node.setdefault(letter, {})
            node[""] = family
        return self._branch(tree, "")

    def _part(self, letter: str) -> str:
        special = {" ": r"\s+", "'": "['\u2019]", "*": f"{self._letter}*"}
        return special.get(letter) or re.escape(letter)

    def _branch(self, node: Mapping[str, Any], before: str) -> str:
        letters = sorted(node, key=lambda c: (c == "*", c))
        found = [self._part(c) + self._branch(node[c], c) for c in letters if c]
        if "" in node:  # tried last, so that the longest phrase wins; the empty group says whose it was
            self._of_group.append(node[""])
            found.append((f"(?!{self._letter})" if _bounded(before) else "") + "()")
        return found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"

    def spans(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, family) in characters of ``text``, one behind the other."""
        return [(*m.span(), self._of_group[cast(int, m.lastindex) - 1]) for m in self._pattern.finditer(text)]

    def counts(self, text: str) -> list[int]:
        """How often each family occurs, in the order of `families`."""
        found = Counter(self._of_group[cast(int, m.lastindex) - 1] for m in self._pattern.finditer(text))
        return [found[family] for family in self.families]


class ThoughtCounts(Metric):
    """Mean counts a response and per 1,000 tokens: of all responses, of right and of wrong ones.

    Right is a reward of 1 or more, as in pass@k.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, families: Sequence[str]) -> None:
        super().__init__()
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
