"""Verifiers, each ``(prompt, response, ground_truth, extra) -> float`` and named by its path in the configuration.

``symbolic.math_verify_reward`` is not here: its library takes a second to import.
"""

from prerl_lightning.rewards.arithmetic import arithmetic_reward, last_number_reward
from prerl_lightning.rewards.boxed import boxed_reward
from prerl_lightning.rewards.choice import choice_reward
from prerl_lightning.rewards.countdown import countdown_reward
from prerl_lightning.rewards.numeric import NumericReward, exact_reward, gsm8k_reward
from prerl_lightning.rewards.score import Reward, Score
from prerl_lightning.rewards.shaping import (
    DenyList,
    LengthPenalty,
    RepetitionPenalty,
    SoftOverlongPenalty,
    WeightedSum,
    boxed_format,
    think_format,
)

__all__ = [
    "DenyList",
    "LengthPenalty",
    "NumericReward",
    "RepetitionPenalty",
    "Reward",
    "Score",
    "SoftOverlongPenalty",
    "WeightedSum",
    "arithmetic_reward",
    "boxed_format",
    "boxed_reward",
    "choice_reward",
    "countdown_reward",
    "exact_reward",
    "gsm8k_reward",
    "last_number_reward",
    "think_format",
]
