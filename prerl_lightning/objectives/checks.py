"""What of a run can be refused before its data are read and its engine is started."""

from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prerl_lightning.arguments import check_kind, check_kinds
from prerl_lightning.compat import all_callbacks, is_trial
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError, check_bounds, in_one_line, nearest
from prerl_lightning.objectives import lives
from prerl_lightning.objectives.advantages import LENS, SignedReward
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.trainer_arguments import ARGUMENTS, CALLBACKS, HOOKS
from prerl_lightning.objectives.until import Ending
from prerl_lightning.policy.lora import KEY, targeted
from prerl_lightning.policy.model import empty_model
from prerl_lightning.rewards.shaping import LengthPenalty, RepetitionPenalty, WeightedSum

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule


# the Trainer's own arguments, of which Lightning says less, or says it late
TRAINER_LEAST = {
    **{"max_steps": -1, "max_epochs": -1, "num_nodes": 1, "log_every_n_steps": 0, "check_val_every_n_epoch": 1},
    **{f"limit_{stage}_batches": 0 for stage in ("train", "val", "test")},
    **{"fast_dev_run": 0, "num_sanity_val_steps": -1, "min_epochs": 0, "min_steps": 0},
}
PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
STRATEGIES = ("auto", "ddp", "fsdp2", "DDPStrategy", "SingleDeviceStrategy")


def check_trainer(trainer: Any, trains: bool) -> None:
    """Raises InputError for arguments of the Trainer, by its configuration, that no run could have."""
    check_bounds(trainer, "trainer", TRAINER_LEAST)
    for key in ("max_steps", "max_epochs", "limit_train_batches") if trains else ():
        if getattr(trainer, key) == 0:
            raise InputError(f"trainer.{key}: 0 trains nothing. Give 1 or more, or leave it out.")
    _check_refused(trainer)
    if trainer.accelerator not in ACCELERATORS and isinstance(trainer.accelerator, str):
        raise InputError(f"trainer.accelerator: {trainer.accelerator} has no engine here. Write auto, cpu or gpu.")
    if 0 < trainer.max_steps < (trainer.min_steps or 0):
        raise InputError(
            f"trainer.min_steps: {trainer.min_steps} are more than trainer.max_steps, {trainer.max_steps}."
        )
    every = trainer.val_check_interval
    shares = isinstance(every, float) and trainer.check_val_every_n_epoch is not None  # of an epoch
    if every is not None and not (0 < every <= 1 if shares else isinstance(every, int) and every >= 1):
        # by a time, too: each rank goes by its own clock, and another run has other steps
        raise InputError(f"trainer.val_check_interval: {every} must be a whole number of rollouts, 1 or more.")
    _check_time(trainer)
    _check_strategy(trainer.strategy)
    # here too, since on a CPU Lightning makes bf16-mixed of 16-mixed
    check_precision(str(trainer.precision))


def _check_refused(trainer: Any) -> None:
    for key, row in ARGUMENTS.items():
        if row.refused and (value := getattr(trainer, key, None)) not in (None, row.neutral):
            raise InputError(f"trainer.{key}: {value}: {row.says}")


def _check_time(trainer: Any) -> None:
    limit = trainer.max_time
    if limit is None:
        return
    try:
        left = cast(float, Timer(limit).time_remaining())
    except (MisconfigurationException, TypeError) as error:
        raise InputError(
            f'trainer.max_time: {limit} is no time. Write DD:HH:MM:SS in quotes, e.g. "00:00:50:00", or {{minutes: 50}}'
        ) from error
    if left <= 0:
        raise InputError(f"trainer.max_time: {limit} trains nothing. Give a longer time, or leave it out.")
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    if any(str(getattr(c, "class_path", type(c).__name__)).rpartition(".")[2] == "Timer" for c in callbacks):
        raise InputError(
            "trainer.max_time: it would not count beside the Timer of trainer.callbacks. Keep one of them."
        )


def _check_strategy(strategy: Any) -> None:
    name = str(getattr(strategy, "class_path", strategy))
    if isinstance(strategy, str) and name.startswith("fsdp") and name != "fsdp2":
        raise InputError(
            f"trainer.strategy: {name} is Lightning's FSDP1, which this library does not use. Write fsdp2."
        )
    known = ("auto", *StrategyRegistry.available_strategies())
    if isinstance(strategy, str) and name not in known:
        raise InputError(f"trainer.strategy: there is no {name}.{nearest(name, known)} Write auto, ddp or fsdp2.")
    if (isinstance(strategy, str) or name.startswith("lightning.")) and name.rpartition(".")[2] not in STRATEGIES:
        raise InputError(
            f"trainer.strategy: {name}: ranks are processes of their own here, that share their work by ddp or fsdp2. "
            "Write auto, ddp or fsdp2."
        )


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
    if not is_trial(trainer):  # which sets limits of its own
        _check_refused(trainer)
    check_callbacks(all_callbacks(trainer))
    for part in (host, *all_callbacks(trainer)):
        check_kinds(part, type(part).__name__)
    switches = lives.reincarnations(all_callbacks(trainer))
    steps = [c.at_step for c in switches]
    if len(set(steps)) < len(steps):
        raise InputError(
            f"PolicyReincarnation.at_step: two lives begin at the same step ({', '.join(map(str, steps))}). Give each "
            "a step of its own."
        )
    modules = [host, *(c.successor for c in switches)]
    lives.arrange(modules, [0, *steps])
    host.planned_lives = host.lives
    for module, until in zip(modules, [*(c.until for c in switches), None], strict=True):
        module.ending = until and Ending(until)
    host.endings = {module.life: None for module in modules if module.ending is not None}
    if len(set(map(id, modules))) < len(modules):
        raise InputError(
            "PolicyReincarnation.successor: one object is two lives. Make one for each, "
            f"{type(modules[-1]).__name__}(...)."
        )
    for module in modules:
        name = type(module).__name__
        check_kind(module.terms, tuple[Term, ...], f"{name}.terms")
        if not module.terms:
            raise InputError(f'{name}.terms: there is none. Give one or more: terms = (Term(space="post-train"),).')
        check_hooks(type(module), successor=module is not host)
    _check_successors(host, switches, isinstance(trainer.strategy, ModelParallelStrategy))
    _check_lora(host, switches, str(trainer.precision))
    for module in modules:
        endless = module.end_step is None and trainer.max_steps < 0
        if endless and (schedule := module.optimization.lr_schedule) != "constant":
            raise InputError(f"{type(module).__name__}.lr_schedule: {schedule} needs an end: set trainer.max_steps.")
    for module in modules:
        binary = [type(t.advantage).__name__ for t in module.terms if isinstance(t.advantage, SignedReward | LENS)]
        if module.loss.kl_in == "reward" and binary:
            raise InputError(
                f"{type(module).__name__}.kl_in: reward, while a term's {binary[0]} asks only whether a reward is 1, "
                "which none would be any more. Write kl_in: loss, or another advantage."
            )
        parts = data.reward.parts if isinstance(data.reward, WeightedSum) else {}
        if binary and (
            taken := [n for n, part in parts.items() if isinstance(part, LengthPenalty | RepetitionPenalty)]
        ):
            raise InputError(
                f"data.reward: a term's {binary[0]} asks only whether the sum is 1 or more, and {taken[0]} takes from "
                "the sum of nearly every response, so that hardly one would be right. Leave that part out, or take "
                "another advantage."
            )
    if data.sampling.group_size < 2 and any(term.of_groups for module in modules for term in module.terms):
        raise InputError(
            "data.sampling.group_size: 1. A response's advantage is its reward less the mean of its prompt's group, "
            "and a group of one has nothing to compare it with. Write 2 or more, or take an advantage without groups, "
            "such as BatchStd."
        )
    for module in modules:
        if (minibatches := module.batching.minibatches) > data.prompts_per_step:
            raise InputError(
                f"{type(module).__name__}.minibatches: {minibatches} are more than data.prompts_per_step "
                f"({data.prompts_per_step}), by which a rollout is split: some would be empty. Write fewer minibatches."
            )
    if not is_trial(trainer):  # which has a max_steps of its own
        lives.check_steps(host, trainer.max_steps)
    for callback in all_callbacks(trainer):
        if (check := getattr(callback, "check_run", None)) is not None:
            check(trainer, host)


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Raises InputError for one of Lightning's that has no meaning here, and for its ModelCheckpoint with a monitor."""
    for callback in callbacks:
        kind = type(callback).__name__
        if type(callback) is ModelCheckpoint and callback.monitor is not None:
            raise InputError(
                f"trainer.callbacks: {kind}.monitor: {callback.monitor}: it may judge a step by the validation before. "
                "Give checkpoint.monitor, which judges by the step's own."
            )
        for base in type(callback).__mro__:
            row = CALLBACKS.get(base.__name__) if base.__module__.startswith("lightning.") else None
            if row is not None and row.refused:
                raise InputError(f"trainer.callbacks: {kind}: {row.says}")


def check_hooks(objective: type, successor: bool) -> None:
    """Raises InputError where an objective's class has a hook of Lightning's that would never be called."""
    for kind in objective.__mro__:
        if kind.__module__ == "prerl_lightning.objectives.base":
            return
        for name in (name for name in HOOKS if name in vars(kind)):
            key = "PolicyReincarnation.successor" if successor else "model"
            if HOOKS[name].refused:
                raise InputError(f"{key}: {kind.__name__}.{name}: {HOOKS[name].says}")
            if successor and name != "training_step":
                raise InputError(
                    f"{key}: {kind.__name__}.{name} would never be called: Lightning calls the hooks of the "
                    "run's first objective. Put it into a callback under trainer.callbacks, or into training_step."
                )


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


def _check_lora(host: "PolicyModule", switches: Sequence[Any], precision: str) -> None:
    lora = host.lora
    for switch in switches:
        if switch.successor.lora not in (None, lora):
            raise InputError(
                f"PolicyReincarnation.successor: {type(switch.successor).__name__}.lora: a successor takes over the "
                "policy and its adapters: leave its lora out."
            )
        if switch.merge and (lora is None or lora.base == "bfloat16"):
            why = "there are no adapters" if lora is None else "bfloat16 would round off most of what they have learned"
            mend = "Leave merge out" + (f", or write {KEY}.base: float32." if lora else ".")
            raise InputError(f"PolicyReincarnation.merge: at step {switch.at_step} {why}. {mend}")
    if lora is None:
        return
    if lora.base == "bfloat16" and not precision.startswith("bf16"):
        raise InputError(
            f"{KEY}.base: bfloat16 while trainer.precision is {precision}, whose products are fp32. Write "
            "trainer.precision: bf16-mixed, or base: float32."
        )
    try:
        model = empty_model(host.model_name)
    except ValueError:  # no language model, which its loading says better
        return
    targeted(model, lora)


def _optimizer(module: "PolicyModule") -> type:
    """Its class. Raises InputError where it does not take its arguments, or has a learning rate of its own."""
    try:
        made = module.optimization.optimizer([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        raise InputError(f"{type(module).__name__}.optimizer: {in_one_line(error)}") from error
    lr, default = made.defaults.get("lr"), signature(type(made)).parameters.get("lr")
    if lr != module.optimization.lr and (default is None or lr != default.default):
        raise InputError(
            f"{type(module).__name__}.optimizer: its lr, {lr}, would not be used: the learning rate is model.init_args."
            f"lr, {module.optimization.lr}. Give it there."
        )
    return type(made)
