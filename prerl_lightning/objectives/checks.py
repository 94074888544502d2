"""What of a run can be refused before its data are read and its engine is started."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, check_bounds, in_one_line, nearest
from prerl_lightning.objectives import lives

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule


# the Trainer's own arguments, of which Lightning says less, or says it late
TRAINER_LEAST = {
    **{"max_steps": -1, "max_epochs": -1, "num_nodes": 1, "log_every_n_steps": 0, "check_val_every_n_epoch": 1},
    **{f"limit_{stage}_batches": 0 for stage in ("train", "val", "test")},
    **{"fast_dev_run": 0, "num_sanity_val_steps": -1},
}
# what has another meaning here, or none: the value that leaves it alone, and why
TRAINER_UNUSED: dict[str, tuple[Any, str]] = {
    "gradient_clip_val": (
        None,
        "gradients are clipped by model.init_args.gradient_clip, by global norm: leave it out.",
    ),
    "gradient_clip_algorithm": (None, "model.init_args.gradient_clip clips by global norm: leave it out."),
    "accumulate_grad_batches": (
        1,
        "a step adds up the gradients of its whole rollout, in as many passes as memory asks for: leave it out, and "
        "give data.prompts_per_step more for a larger one.",
    ),
    "overfit_batches": (
        0,
        "prompts are drawn anew in each epoch. Give data.train fewer problems, by its limit or size.",
    ),
    "barebones": (False, "it logs nothing and keeps no checkpoint: leave it out."),
    "reload_dataloaders_every_n_epochs": (0, "it would begin the order of prompts anew: leave it out."),
}
PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")


def check_trainer(trainer: Any, trains: bool) -> None:
    """Raises InputError for arguments of the Trainer, by its configuration, that no run could have."""
    check_bounds(trainer, "trainer", TRAINER_LEAST)
    for key in ("max_steps", "max_epochs", "limit_train_batches") if trains else ():
        if getattr(trainer, key) == 0:
            raise InputError(f"trainer.{key}: 0 trains nothing. Give 1 or more, or leave it out.")
    for key, (neutral, why) in TRAINER_UNUSED.items():
        if (value := getattr(trainer, key)) not in (None, neutral):
            raise InputError(f"trainer.{key}: {value}: {why}")
    every = trainer.val_check_interval
    shares = isinstance(every, float) and trainer.check_val_every_n_epoch is not None  # of an epoch
    if isinstance(every, (int, float)) and not (0 < every <= 1 if shares else isinstance(every, int) and every >= 1):
        raise InputError(f"trainer.val_check_interval: {every} must be a whole number of rollouts, 1 or more.")
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy.startswith("fsdp") and strategy != "fsdp2":
        raise InputError(
            f"trainer.strategy: {strategy} is Lightning's FSDP1, which this library does not use. Write fsdp2."
        )
    known = ("auto", *StrategyRegistry.available_strategies())
    if isinstance(strategy, str) and strategy not in known:
        raise InputError(
            f"trainer.strategy: there is no {strategy}.{nearest(strategy, known)} Write auto, ddp or fsdp2."
        )
    # here too, since on a CPU Lightning makes bf16-mixed of 16-mixed
    check_precision(str(trainer.precision))


def check_precision(precision: str) -> None:
    """Raises InputError for one that training would go wrong in."""
    if precision in ("bf16-true", "16-true", "half"):
        raise InputError(
            f"trainer.precision: {precision} keeps the weights in 16 bits, where Adam's small steps are "
            "lost to rounding. Write bf16-mixed: fp32 weights, bf16 arithmetic."
        )
    if precision in ("16-mixed", "16"):
        raise InputError(
            f"trainer.precision: {precision} scales the loss, so that gradients would be clipped and "
            "measured at a scale that changes. Write bf16-mixed, which needs none, or 32-true."
        )
    if precision not in (*PRECISIONS, "None"):
        raise InputError(f"trainer.precision: {precision} is not for training here. Write 32-true or bf16-mixed.")


def check_run(host: "PolicyModule", data: RolloutDataModule, trainer: L.Trainer) -> None:
    """Learn the run's lives from the Trainer's callbacks, and raise InputError for what no life could learn under."""
    check_precision(str(trainer.precision))
    switches = lives.reincarnations(trainer.callbacks)  # type: ignore[attr-defined]
    steps = [c.at_step for c in switches]
    if len(set(steps)) < len(steps):
        raise InputError(
            f"PolicyReincarnation.at_step: two lives begin at the same step ({', '.join(map(str, steps))}). Give each "
            "a step of its own."
        )
    modules = [host, *(c.successor for c in switches)]
    lives.arrange(modules, [0, *steps])
    host.planned_lives = host.lives
    _check_successors(host, switches, isinstance(trainer.strategy, ModelParallelStrategy))
    for module in modules:
        endless = module.end_step is None and trainer.max_steps < 0
        if endless and (schedule := module.optimization.lr_schedule) != "constant":
            raise InputError(f"{type(module).__name__}.lr_schedule: {schedule} needs an end: set trainer.max_steps.")
    if data.sampling.group_size < 2:
        raise InputError(
            "data.sampling.group_size: 1. A response's advantage is its reward less the mean of its prompt's group, "
            "and a group of one has nothing to compare it with. Write 2 or more."
        )
    for module in modules:
        if (minibatches := module.batching.minibatches) > data.prompts_per_step:
            raise InputError(
                f"{type(module).__name__}.minibatches: {minibatches} are more than data.prompts_per_step "
                f"({data.prompts_per_step}), by which a rollout is split: some would be empty. Write fewer minibatches."
            )
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which has a max_steps of its own
        lives.check_steps(host, trainer.max_steps)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (check := getattr(callback, "check_run", None)) is not None:
            check(trainer, host)


def _check_successors(host: "PolicyModule", switches: Sequence[Any], sharded: bool) -> None:
    """What a switch would stumble over: another model, an optimizer's state of another kind."""
    kinds = [_optimizer(module) for module in (host, *host.successors)]
    for switch, (old, new) in zip(switches, pairwise(kinds), strict=True):
        name = type(switch.successor).__name__
        model = switch.successor._model
        if model not in (None, host._model):
            raise InputError(
                f"PolicyReincarnation.successor: {name}.model: {model!r}, while the run trains {host._model!r}. A "
                "successor takes over the policy: leave its model out."
            )
        if old is not new and switch.optimizer == "carry":
            raise InputError(
                f"PolicyReincarnation.optimizer: at step {switch.at_step} the state of {old.__name__} cannot be "
                f"carried into {new.__name__}. Write optimizer: reset, or use one optimizer class."
            )
        if old is not new and sharded:
            raise InputError(
                f"PolicyReincarnation.successor: {name}.optimizer: {new.__name__} follows {old.__name__}, and under "
                "fsdp2 a resume would load the wrong one. Use one optimizer class in all lives."
            )


def _optimizer(module: "PolicyModule") -> type:
    """Its class. Raises InputError where it does not take its arguments."""
    try:
        return type(module.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))]))
    except Exception as error:
        raise InputError(f"{type(module).__name__}.optimizer: {in_one_line(error)}") from error
