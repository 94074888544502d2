"""What a verifier says about a response."""

from collections.abc import Callable, Mapping
from typing import Any

#: (prompt, response text, ground truth, extra) -> reward. ``extra`` holds the problem's further columns, and of the
#: response ``truncated`` (the length limit ended it), ``tokens`` and ``max_new_tokens``.
Reward = Callable[[str, str, str, Mapping[str, Any]], float]


class Score(float):
    """A reward that also tells which answer it read: what maj@k counts votes of.

    Args:
        value: the reward.
        answer: as compared with the ground truth; None: the response has none.
    """

    answer: str | None

    def __new__(cls, value: float, answer: str | None = None) -> "Score":
        score = super().__new__(cls, value)
        score.answer = answer
        return score
