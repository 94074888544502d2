"""Reasoning behaviours by the field's rule, SEAL's (arXiv 2504.07986): pieces of a response, one label each.

A response is cut at blank lines (two line breaks on end). A piece is a reflection, else a transition, else execution,
by how it begins and by what it holds, in any case and also within words ("verifying"). The phrases of
metrics/thoughts.py are another measure: a piece may hold many of them, and their "wait" is a transition.
"""

from collections.abc import Sequence

# of each label, what its pieces begin with, and what they hold
_REFLECTION = (
    "wait",
    ("verify", "make sure", "hold on", "think again", "'s correct", "'s incorrect", "let me check", "seems right"),
)
_TRANSITION = (
    "alternatively",
    (
        "think differently",
        *(f"another {noun}" for noun in ("way", "approach", "method", "solution", "strategy", "technique")),
    ),
)


class SealLabels:
    """Labels pieces, 60 MB of long answers a second (benchmarks/watchers.py)."""

    families = ("seal/reflection", "seal/transition", "seal/execution")

    def labels(self, text: str) -> list[int]:
        """Of each piece, in order, the index of its label in `families`; none of a text without any."""
        text = text.lower().replace("\u2019", "'")
        # few of the words are anywhere in an answer, so few are looked for in its pieces
        rules = [(start, [word for word in within if word in text]) for start, within in (_REFLECTION, _TRANSITION)]
        return [_label(piece, rules) for part in text.split("\n\n") if (piece := part.lstrip())]

    def counts(self, text: str) -> list[int]:
        """How many pieces have each label, in the order of `families`."""
        found = self.labels(text)
        return [found.count(i) for i in range(len(self.families))]


def _label(piece: str, rules: Sequence[tuple[str, Sequence[str]]]) -> int:
    for label, (start, within) in enumerate(rules):
        if piece.startswith(start) or (within and any(word in piece for word in within)):
            return label
    return len(rules)
