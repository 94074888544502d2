"""Verifiers of the embedded tasks (data/tasks/sums.py)."""

import re
from collections.abc import Mapping
from typing import Any

from prerl_lightning.rewards.score import Score


def arithmetic_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if what follows the last ``#`` is the ground truth; 0.0 without one, and for a truncated response. All that
    follows is the answer, so that a hedge, or a word behind it, is wrong."""
    _, found, answer = response.rpartition("#")
    if not found or extra.get("truncated"):
        return Score(0.0)
    return Score(answer.strip() == ground_truth, answer.strip())


def last_number_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """1.0 if the last integer of the response is the ground truth; 0.0 without one, and for a truncated response. What
    else is said is not looked at: "68 or 69" is 69."""
    numbers = re.findall(r"-?[0-9]+", response)
    if not numbers or extra.get("truncated"):
        return Score(0.0)
    return Score(numbers[-1] == ground_truth, numbers[-1])
