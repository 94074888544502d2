"""What of a run can be refused before its data are read and its engine is started."""

from typing import TYPE_CHECKING, Any

from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import lives

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule


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


def check_run(host: "PolicyModule", data: RolloutDataModule) -> None:
    """Learn the run's lives from the Trainer's callbacks, and raise InputError for what no life could learn under."""
    trainer: Any = host.trainer
    check_precision(str(trainer.precision))
    switches = lives.reincarnations(trainer.callbacks)
    steps = [c.at_step for c in switches]
    if len(set(steps)) < len(steps):
        raise InputError(f"PolicyReincarnation.at_step: two lives begin at the same step ({steps}).")
    modules = [host, *(c.successor for c in switches)]
    lives.arrange(modules, [0, *steps])
    host.planned_lives = host.lives
    if data.sampling.group_size < 2:
        raise InputError(
            "data.sampling.group_size: 1. A response's advantage is its reward less the mean of its prompt's group, "
            "and a group of one has nothing to compare it with. Write 2 or more."
        )
    for module in modules:
        if module.minibatches > data.prompts_per_step:
            raise InputError(
                f"{type(module).__name__}.minibatches: {module.minibatches} are more than data.prompts_per_step "
                f"({data.prompts_per_step}), by which a rollout is split: some would be empty. Write fewer minibatches."
            )
    if not trainer.fast_dev_run:  # which has a max_steps of its own
        lives.check_steps(host, trainer.max_steps)
    for callback in trainer.callbacks:
        if (check := getattr(callback, "check_run", None)) is not None:
            check(trainer, host)
