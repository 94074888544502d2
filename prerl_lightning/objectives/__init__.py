"""One LightningModule an objective; objectives/term.py has the axes that they choose along."""

from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.objectives.composed import Objective
from prerl_lightning.objectives.grpo import GRPO
from prerl_lightning.objectives.mixed import MixedRL
from prerl_lightning.objectives.ppo import PPO
from prerl_lightning.objectives.prerl import NSRPreRL, PreRL, PSRPreRL
from prerl_lightning.objectives.signed import NSRRL, PSRRL

__all__ = ["GRPO", "NSRRL", "PPO", "PSRRL", "MixedRL", "NSRPreRL", "Objective", "PSRPreRL", "PolicyModule", "PreRL"]
