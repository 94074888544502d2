"""Verifiers: ``(prompt, response, ground_truth, extra) -> float``, named by import path in the configuration."""

from prerl_lightning.rewards.arithmetic import arithmetic_reward, last_number_reward
from prerl_lightning.rewards.boxed import boxed_reward

__all__ = ["arithmetic_reward", "boxed_reward", "last_number_reward"]
