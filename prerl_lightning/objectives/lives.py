"""The lives of a run: which objective trains the policy from which optimizer step on."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prerl_lightning.errors import InputError

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)


def reincarnations(callbacks: Iterable[Any]) -> list[Any]:
    """The `PolicyReincarnation`s among a run's callbacks, in the order of their lives."""
    return sorted((c for c in callbacks if hasattr(c, "successor")), key=lambda c: c.at_step)


def all_lives(host: "PolicyModule", callbacks: Iterable[Any]) -> "list[PolicyModule]":
    """The objectives of a run, in order."""
    return [host, *(switch.successor for switch in reincarnations(callbacks))]


def arrange(modules: "Sequence[PolicyModule]", steps: Sequence[int]) -> None:
    """Tell each life's module its place in the run.

    Args:
        modules: the host, and its successors in order.
        steps: the optimizer step that each begins at; 0 for the host.
    """
    modules[0].successors = tuple(modules[1:])
    modules[0].lives = [(m.title, step) for m, step in zip(modules, steps, strict=True)]
    ends = [*steps[1:], None]
    for life, (module, first, end) in enumerate(zip(modules, steps, ends, strict=True), start=1):
        module.life, module.first_step, module.end_step = life, first, end


def check_steps(host: "PolicyModule", max_steps: int) -> None:
    """Raises InputError where a life's end falls into the middle of a rollout's optimizer steps."""
    for module in (host, *host.successors):
        first, end, key = module.first_step, module.end_step, "PolicyReincarnation.at_step"
        name, rollout_steps = type(module).__name__, module.batching.steps
        if 0 < max_steps <= first:
            if module.life - 1 not in host.endings:
                log.warning("%s, from step %d, never begins: trainer.max_steps is %d.", name, first, max_steps)
            continue
        if max_steps > 0 and (end is None or max_steps < end):
            key, end = "trainer.max_steps", max_steps
        beyond = 0 if end is None else (end - first) % rollout_steps
        if end is not None and beyond:
            fitting = [step for step in (end - beyond, end - beyond + rollout_steps) if step > first]
            raise InputError(
                f"{key}: {end}. {name} takes {rollout_steps} optimizer steps a rollout (minibatches x epochs) from "
                f"step {first} on, so that it cannot end there. Write {' or '.join(map(str, fitting))}."
            )


def observe(host: "PolicyModule", metrics: Mapping[str, float]) -> None:
    """Show what a step or a validation has measured, the same on all ranks, to the present life's `Until`, which may
    end it."""
    acting, step = host.acting, host.trainer.global_step
    if acting.ending is None or host.trainer.state.fn != "fit":
        return
    why = acting.ending.observe(metrics, step)
    if why is not None and end_life(host, step, why):
        name, last = acting.title, host.lives[acting.life][1]
        later = ", where the next life's rollouts fit," if last > step else ","
        log.info("Step %d: %s. The life of %s ends at step %d%s as its `until` has it.", step, why, name, last, later)


def end_life(host: "PolicyModule", step: int, why: str) -> bool:
    """Let the next life begin ahead of its time: at ``step``, or soon after, where its own end fits its rollouts'
    optimizer steps. False where there is none."""
    acting = host.acting
    if acting.life > len(host.successors):
        return False
    following = host.successors[acting.life - 1]
    candidates = range(step, following.first_step + 1, acting.batching.steps)
    end = following.end_step if following.end_step is not None else max(host.trainer.max_steps, 0)
    fits = (s for s in candidates if not end or (end - s) % following.batching.steps == 0)
    steps = [first for _, first in host.lives]
    steps[acting.life] = next(fits, following.first_step)
    arrange([host, *host.successors], steps)
    host.endings[acting.life] = why
    return True


def state(host: "PolicyModule", sharded: bool = False) -> dict[str, Any]:
    """For a checkpoint, see `life_state`. Collective where a life keeps weights beside the policy's."""
    return {
        **host.acting.life_state(sharded),
        "schedule": _schedule(host),
        "began": [first for _, first in host.lives],
        "alive": host.acting.life,
        "endings": host.endings,
        "ending": host.acting.ending and host.acting.ending.state_dict(),
    }


def resume(host: "PolicyModule", found: dict[str, Any]) -> None:
    """Of a checkpoint's `state` what is the host's; a successor takes its own (`PolicyReincarnation`).

    Raises:
        InputError: it is of other lives than the configuration's.
    """
    if found["schedule"] != _schedule(host):
        raise InputError(
            f"The checkpoint's lives are {_described(found['schedule'])}, the configuration's "
            f"{_described(_schedule(host))}. Resume with the configuration it was made with (config.yaml beside "
            "its run), or start a new run from its exported model folder."
        )
    arrange([host, *host.successors], found["began"])
    host.endings |= {life: why for life, why in found.get("endings", {}).items() if why}
    alive = (host, *host.successors)[found["alive"] - 1]
    if alive.ending is not None and (seen := found.get("ending")):
        alive.ending.load_state_dict(seen)
    if found["alive"] == 1:
        host.restore_life(found)


def _schedule(host: "PolicyModule") -> list[list[Any]]:
    """The class of each life and its planned step; not its title, which may change."""
    modules = (host, *host.successors)
    return [[type(module).__name__, step] for module, (_, step) in zip(modules, host.planned_lives, strict=True)]


def _described(lives: Sequence[Sequence[Any]] | None) -> str:
    if not lives:
        return "none (it is not one of ours)"
    return ", then ".join(f"{name} from step {step}" for name, step in lives)
