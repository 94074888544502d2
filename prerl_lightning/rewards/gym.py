"""reasoning-gym's own scorers, for data/procedural.py. Imports the package, which takes seconds, once a worker."""

from collections.abc import Mapping
from typing import Any

from reasoning_gym import get_score_answer_fn

from prerl_lightning.rewards.boxed import last_boxed
from prerl_lightning.rewards.score import Score


def reasoning_gym_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """What the task's own scorer (0 to 1) gives for the last ``<answer>...</answer>``, or the last box; 0.0 without
    either, and for a truncated response."""
    head, closed, _ = response.rpartition("</answer>")
    tagged = head.rpartition("<answer>") if closed else ("", "", "")
    answer = tagged[2].strip() if tagged[1] else last_boxed(response)
    if answer is None or extra.get("truncated"):
        return Score(0.0)
    return Score(get_score_answer_fn(extra["task"])(answer, extra["entry"]), answer)
