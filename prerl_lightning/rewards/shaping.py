"""Rewards that are put together, and rewards of form instead of truth."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from prerl_lightning.errors import InputError, is_name
from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.rewards.score import Reward, Score, at_once, name_of, sees_tokens


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight * reward; each is logged by itself as reward/NAME/mean. The answer that maj@k counts is the first
    reward's that reads one.

    Args:
        rewards: by import path, or class_path and init_args; by names, or a list, whose names are the functions'.
        weights: as many, or by the same names; None: 1 each.
        normalise: advantages are of sum of weight * (reward - mean) / (std + 1e-6), mean and unbiased std over the
            prompt's responses, for each reward by itself (GDPO, arXiv 2601.05242): rewards that add up to the same are
            told apart. What is logged, and what counts as right, is the plain sum.
    """

    rewards: Sequence[Reward] | Mapping[str, Reward]
    weights: Sequence[float] | Mapping[str, float] | None = None
    normalise: bool = False
    parts: Mapping[str, Reward] = field(init=False, repr=False)
    _weights: Sequence[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rewards, weights = self.rewards, self.weights
        named = dict(rewards) if isinstance(rewards, Mapping) else _named(rewards)
        if isinstance(weights, Mapping):
            if weights.keys() != named.keys():
                raise InputError(f"WeightedSum.weights: of {', '.join(weights)}; the rewards are {', '.join(named)}.")
            weights = [weights[name] for name in named]
        weights = [1.0] * len(named) if weights is None else weights
        if len(named) != len(weights) or not named:
            raise InputError(f"WeightedSum: {len(named)} rewards and {len(weights)} weights.")
        if wrong := [name for name in named if not is_name(name)]:
            raise InputError(f"WeightedSum.rewards: {wrong[0]!r}: a name is of letters, digits, dots and dashes.")
        object.__setattr__(self, "parts", named)
        object.__setattr__(self, "_weights", [float(w) for w in weights])

    @property
    def batched(self) -> bool:
        """Where one of the rewards is better given many answers, all are (judging.py)."""
        return any(at_once(reward) for reward in self.parts.values())

    @property
    def sees_tokens(self) -> bool:
        return any(sees_tokens(reward) for reward in self.parts.values())

    def __call__(self, prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
        return self.combined([reward(prompt, response, ground_truth, extra) for reward in self.parts.values()])

    def combined(self, scores: Sequence[Any]) -> Score:
        """Of what each reward said of one response."""
        answers = (getattr(score, "answer", None) for score in scores)
        found = {name: float(score) for name, score in zip(self.parts, scores, strict=True)}
        return Score(self._sum(found.values()), next((a for a in answers if a is not None), None), found)

    def signals(self, group: Sequence[Mapping[str, float]]) -> list[float]:
        """What advantages are of, for the responses to one prompt.

        Args:
            group: (G,) of each response its rewards by name; of a failed verification none, which count 0.
        """
        columns = ([parts.get(name, 0.0) for parts in group] for name in self.parts)
        return [self._sum(row) for row in zip(*map(_normalised, columns), strict=True)]

    def _sum(self, scores: Iterable[float]) -> float:
        return sum(w * s for w, s in zip(self._weights, scores, strict=True))


def _named(rewards: Sequence[Reward]) -> dict[str, Reward]:
    """By the last part of each one's own name; what is there twice has a number."""
    named: dict[str, Reward] = {}
    for reward in rewards:
        name = re.sub(r"[^\w.-]", "_", name_of(reward).rpartition(".")[2])
        same = sum(known == name or known.startswith(f"{name}_") for known in named)
        named[f"{name}_{same + 1}" if name in named else name] = reward
    return named


def _normalised(scores: Sequence[float]) -> list[float]:
    """Equal ones are 0 by comparison: their float mean may miss them."""
    if min(scores) == max(scores):
        return [0.0] * len(scores)
    center, spread = mean(scores), stdev(scores)
    return [(score - center) / (spread + 1e-6) for score in scores]


def boxed_format(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 if there is a box that closes."""
    return float(last_boxed(response) is not None)


def think_format(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 for a thought that one ``</think>`` closes, and an answer behind it. The ``<think>`` begins the response, or
    is missing: the chat template has opened the thought, unless it has closed it, too. An empty thought counts."""
    opened = response.lstrip().startswith("<think>") or not prompt.rstrip().endswith("</think>")
    thought, closed, answer = response.lstrip().removeprefix("<think>").partition("</think>")
    return float(opened and bool(closed) and "think>" not in thought + answer and bool(answer.strip()))


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
