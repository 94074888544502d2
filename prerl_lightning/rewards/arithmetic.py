"""Verifiers of the embedded tasks (data/arithmetic.py)."""

import re
from collections.abc import Mapping
from typing import Any


def arithmetic_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 if what follows the last ``#`` is the ground truth; 0.0 without one, and for a truncated response."""
    _, found, answer = response.rpartition("#")
    return float(bool(found) and not extra.get("truncated") and answer.strip() == ground_truth)


def last_number_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> float:
    """1.0 if the last integer of the response is the ground truth; 0.0 without one, and for a truncated response."""
    numbers = re.findall(r"-?[0-9]+", response)
    return float(bool(numbers) and not extra.get("truncated") and numbers[-1] == ground_truth)
