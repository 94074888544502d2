"""What a reward is, in its three forms, and what it says of a response.

    def right(prompt, response, ground_truth, extra): ...            # one answer at a time
    async def judge(prompt, response, ground_truth, extra): ...      # one answer, while others are awaited
    class Model:                                                     # many answers at once
        batched = True
        def __call__(self, prompts, responses, ground_truths, extras): ...   # -> as many numbers

Of any form ``sees_tokens = True``, an attribute of the function or the class, adds two things to ``extra``:
``token_ids``, the response's, and ``raw``, its text with all special tokens.
"""

from collections.abc import Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any

#: (prompt, response text, ground truth, extra) -> reward. ``extra`` holds the problem's further columns, and of the
#: response ``truncated`` (the length limit ended it), ``tokens`` and ``max_new_tokens``.
Reward = Callable[[str, str, str, Mapping[str, Any]], float]


class Score(float):
    """A reward that also tells which answer it read: what maj@k counts votes of.

    Args:
        value: the reward.
        answer: as compared with the ground truth; None: the response has none.
        parts: by name, the rewards that this one was made of; each is logged.
    """

    answer: str | None
    parts: Mapping[str, float]

    def __new__(cls, value: float, answer: str | None = None, parts: Mapping[str, float] | None = None) -> "Score":
        score = super().__new__(cls, value)
        score.answer, score.parts = answer, parts or {}
        return score


def is_async(reward: Reward) -> bool:
    return iscoroutinefunction(reward) or iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def at_once(reward: Reward) -> bool:
    """Whether it is better given many answers than one."""
    return bool(getattr(reward, "batched", False)) or is_async(reward)


def sees_tokens(reward: Reward) -> bool:
    return bool(getattr(reward, "sees_tokens", False))


def name_of(reward: Reward) -> str:
    return str(getattr(reward, "__qualname__", type(reward).__qualname__))
