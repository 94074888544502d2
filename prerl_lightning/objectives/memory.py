"""Whether a run fits on its GPUs, and how large its packs may be there."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed import ReduceOp

from prerl_lightning import ranks
from prerl_lightning.budget import GIB, ModelShape, PackChoice, rank_budget
from prerl_lightning.compat import all_callbacks
from prerl_lightning.objectives.lives import all_lives
from prerl_lightning.policy.model import load_config
from prerl_lightning.rollout.engine import Engine

if TYPE_CHECKING:
    from prerl_lightning.objectives.base import PolicyModule

log = logging.getLogger(__name__)


def copies(module: "PolicyModule", callbacks: Iterable[Any], shape: ModelShape) -> tuple[int, int]:
    """Of what is trained, that a life of the run keeps beside the policy, at most: in memory, and in a checkpoint.
    Another body is its weights and two moments, in memory gradients too, and all of it though the policy trains
    adapters."""
    lives, whole = all_lives(module, callbacks), -(-shape.parameters // shape.trained)
    in_memory, on_disk = (max(life.copies + n * whole * life.bodies for life in lives) for n in (4, 3))
    return in_memory, on_disk


def watching(callbacks: Iterable[Any], parameters: int) -> int:
    """The most bytes that a callback takes between two steps on a rank with so many of the weights that are trained."""
    return max((c.device_bytes(parameters) for c in callbacks if hasattr(c, "device_bytes")), default=0)


def shape_of(module: "PolicyModule", callbacks: Iterable[Any]) -> ModelShape:
    """The model's, by its config.json alone, with what the lives of a run ask of its head."""
    return replace(
        ModelShape.of_config(load_config(module.model_name), module.lora),
        whole_logits=not module.chunked_head,
        entropy=any(life.loss.entropy_coefficient != 0 for life in all_lives(module, callbacks)),
    )


def plan(module: "PolicyModule", engine: Engine, device: torch.device, longest: int) -> PackChoice | None:
    """The packs' size and whether activations are recomputed, by the model's shape and what is free on the ranks' GPUs
    before anything is loaded; None on a CPU. The same on all ranks; collective.

    Args:
        longest: tokens of the longest prompt and response.

    Raises:
        InputError: the run does not fit.
    """
    if device.type != "cuda":
        return None
    trainer = module.trainer
    shape = shape_of(module, all_callbacks(trainer))
    engine.sleep()  # one that an earlier fit of this process has started
    free, total = torch.cuda.mem_get_info(device)
    free = int(ranks.all_reduce(torch.tensor(free), ReduceOp.MIN))
    if engine.device_bytes(shape, total)[0]:  # else it has started already
        engine.sizes(shape, load_config(module.model_name), total).check(longest)
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    own = shape.trained // (trainer.world_size if sharded else 1)
    budget = rank_budget(
        shape,
        free,
        engine.device_bytes(shape, total),
        longest,
        strategy="fsdp2" if sharded else "ddp" if isinstance(trainer.strategy, DDPStrategy) else "single",
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        copies=copies(module, all_callbacks(trainer), shape)[0],
        checkpointing=module.gradient_checkpointing,
        max_tokens=module.batching.max_tokens_per_microbatch,
        watching=watching(all_callbacks(trainer), own),
    )
    log.info(
        "GPU memory, of %.1f GiB free: %.1f in a rollout, %.1f in a training step with packs of %d tokens%s.",
        *(free / GIB, budget.rollout / GIB, budget.step / GIB, budget.pack.tokens),
        ", activations recomputed" if budget.pack.checkpointing else "",
    )
    return budget.pack
