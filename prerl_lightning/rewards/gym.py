"""reasoning-gym's own scorers, for data/procedural.py. Imports the package, which takes seconds, once a worker."""

from collections.abc import Mapping
from typing import Any

from reasoning_gym import get_score_answer_fn

from prerl_lightning.rewards.reading import boxed_answer
from prerl_lightning.rewards.score import Score


def reasoning_gym_reward(prompt: str, response: str, ground_truth: str, extra: Mapping[str, Any]) -> Score:
    """What the task's own scorer (0 to 1) gives for the last ``<answer>...</answer>``, or the last box (`reading`); 0.0
    without either, and for a truncated response. Hedges and several answers are the scorer's to judge; what stands
    behind the answer is not looked at."""
    head, closed, _ = response.rpartition("</answer>")
    tagged = head.rpartition("<answer>") if closed else ("", "", "")
    answer = tagged[2].strip() if tagged[1] else boxed_answer(response) or None
    if answer is None or extra.get("truncated"):
        return Score(0.0)
    return Score(get_score_answer_fn(extra["task"])(answer, extra["entry"]), answer)
