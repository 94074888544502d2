"""The optimizer of a life, and its learning rates."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from prerl_lightning.objectives.schedule import learning_rate_factor
from prerl_lightning.objectives.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Of what is trained; over two groups in all lives, what has several dimensions and what has one, so that a
    checkpoint's optimizer fits whichever life's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1]},
    ]
    if not settings.decay_norms_and_biases:
        groups[1]["weight_decay"] = 0.0
    return settings.optimizer(cast(Iterable, [group for group in groups if group["params"]]))


def take_settings(optimizer: Optimizer, fresh: Optimizer) -> None:
    """A checkpoint brings its optimizer's settings back with the state; those of the configuration hold."""
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({key: value for key, value in new.items() if key != "params"})


def learning_rates(settings: OptimizerSettings, steps: range, total: int | None) -> list[float]:
    """At these optimizer steps of a life that has ``total``; None: no end is known."""
    factors = (learning_rate_factor(settings.lr_schedule, step, settings.warmup_steps, total) for step in steps)
    return [settings.lr * factor for factor in factors]
