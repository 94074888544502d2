"""Rewards that are put together, and rewards of form instead of truth."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.rewards.score import Reward, Score


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight * reward. The answer that maj@k counts is the first reward's that reads one.

    Args:
        rewards: by import path, or class_path and init_args.
        weights: as many.
    """

    rewards: Sequence[Reward]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.weights) or not self.rewards:
            raise ValueError(f"WeightedSum: {len(self.rewards)} rewards and {len(self.weights)} weights.")

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
        scores = [reward(prompt, response, ground_truth, extra) for reward in self.rewards]
        answers = (getattr(score, "answer", None) for score in scores)
        value = sum(w * float(s) for w, s in zip(self.weights, scores, strict=True))
        return Score(value, next((a for a in answers if a is not None), None))


def boxed_format(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 if there is a box that closes."""
    return float(last_boxed(response) is not None)


def think_format(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 for a thought that one ``</think>`` closes and an answer behind it. Its ``<think>`` is in front of the
    response, or was the chat template's. An empty thought counts."""
    thought, closed, answer = response.partition("</think>")
    return float(bool(closed) and "think>" not in thought.removeprefix("<think>") + answer and bool(answer.strip()))


@dataclass(frozen=True)
class LengthPenalty:
    """-1 times the response's tokens over ``full``, at least -1.

    Args:
        full: tokens that cost 1.
    """

    full: int

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
        return -min(1.0, extra["tokens"] / self.full)


@dataclass(frozen=True)
class SoftOverlongPenalty:
    """DAPO's (arXiv 2503.14476, equation 13): 0 up to ``max_new_tokens - buffer`` tokens, then falling in a straight
    line to -1 at ``max_new_tokens``, which is data.sampling's.

    Args:
        buffer: tokens before the limit in which it falls.
    """

    buffer: int

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
        over = extra["tokens"] - (extra["max_new_tokens"] - self.buffer)
        return -min(1.0, max(0.0, over / self.buffer))


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of word n-grams that have occurred before in the response.

    Args:
        n: words of an n-gram.
    """

    n: int = 3

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
        words = response.split()
        total = len(words) - self.n + 1
        if total < 2:
            return 0.0
        return len(set(zip(*(words[i:] for i in range(self.n)), strict=False))) / total - 1.0


@dataclass(frozen=True)
class DenyList:
    """0.0 if a phrase occurs, else 1.0: under NSR-PreRL or NSRRL, what is unwanted is trained away and nothing else.

    Args:
        phrases: whole words, in any case.
    """

    phrases: Sequence[str]
    _pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.phrases or not all(p.strip() for p in self.phrases):
            raise ValueError("DenyList: an empty phrase, or none.")
        joined = "|".join(re.escape(p.strip()) for p in self.phrases)
        object.__setattr__(self, "_pattern", re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE))

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
        return float(self._pattern.search(response) is None)
