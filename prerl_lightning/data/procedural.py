"""Procedural problem sets: reasoning-gym's generators by name, with its own scorers.

    data.train: {class_path: ReasoningGym, init_args: {task: chain_sum, size: 4096, options: {max_digits: 2}}}

The generators are listed at https://github.com/open-thought/reasoning-gym; the package is optional
(``pip install reasoning-gym``).
"""

from typing import Any

from prerl_lightning.data.problems import ProblemSet
from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.rewards.score import Reward
from prerl_lightning.types import Problem

INSTRUCTION = "Think step by step, then give the final answer between <answer> and </answer>."


class ReasoningGym(ProblemSet):
    """Problems of one of reasoning-gym's tasks; problem i is a function of (task, seed, options, i).

    Args:
        task: its name, e.g. ``chain_sum``.
        size: number of problems.
        seed: of the problems; give the held-out set another one.
        options: of the task, e.g. ``{min_terms: 2, max_terms: 3}``.
        instruction: system message.
    """

    def __init__(
        self,
        task: str,
        size: int = 1024,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        instruction: str = INSTRUCTION,
    ) -> None:
        self.task, self.size, self.seed, self.options, self.instruction = task, size, seed, options or {}, instruction
        check_bounds(self, type(self).__name__, {"size": 1})
        self._data: Any = None

    @property
    def reward(self) -> Reward:
        from prerl_lightning.rewards.gym import reasoning_gym_reward

        return reasoning_gym_reward

    def load(self) -> None:
        try:
            from reasoning_gym import create_dataset
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise InputError("ReasoningGym needs the package reasoning-gym: pip install reasoning-gym") from None
        if self.task not in DATASETS:
            raise InputError(f"ReasoningGym: no task {self.task!r}; there are {', '.join(sorted(DATASETS))}.")
        try:
            self._data = create_dataset(self.task, size=self.size, seed=self.seed, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise InputError(f"ReasoningGym: {self.task} with {self.options}: {error}") from error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        entry = self._data[index]
        messages = [{"role": "system", "content": self.instruction}] if self.instruction else []
        messages.append({"role": "user", "content": entry["question"]})
        return Problem(index, messages, str(entry["answer"]), {"task": self.task, "entry": entry})
