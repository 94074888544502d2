"""How far a life has moved the weights."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prerl_lightning import ranks
from prerl_lightning.callbacks.watcher import Watcher
from prerl_lightning.errors import check_bounds
from prerl_lightning.metrics.sketch import Sketch, local_piece
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.policy.model import Policy


class WeightChange(Watcher):
    """Logs weights/change, the norm of the weights' change since the present life began, and weights/relative_change,
    over the norm of the weights then.

    Both from sketches (metrics/sketch.py; 0.3 % standard deviation): the weights at a life's start would take as much
    memory again, in checkpoints too.

    Args:
        every_n_steps: and at a life's end; 0: never.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        check_bounds(self, "weights", {"every_n_steps": 0})
        self.life = 0  # whose start is kept
        self.at_start: Tensor | None = None  # None: not known

    def state_dict(self) -> dict[str, Any]:
        return {"life": self.life, "at_start": self.at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.life, self.at_start = state_dict["life"], state_dict["at_start"]

    def on_train_start(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        if trainer.global_step and not self.life:  # resumed from a checkpoint without this callback
            self.life = _life(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: PolicyModule, *_: Any) -> None:  # type: ignore[override]
        if self.every_n_steps and self.life != (life := _life(trainer, pl_module)):
            self.life, self.at_start = life, weight_sketch(pl_module.live_policy)

    def watch(self, trainer: L.Trainer, module: PolicyModule) -> dict[str, float]:
        if self.at_start is None or not module.due(self.every_n_steps):
            return {}
        change = float((weight_sketch(module.live_policy) - self.at_start).norm())
        return {"weights/change": change, "weights/relative_change": change / float(self.at_start.norm())}


def _life(trainer: L.Trainer, module: PolicyModule) -> int:
    """By the schedule, and so whether or not PolicyReincarnation comes first in the list of callbacks."""
    return sum(first <= trainer.global_step for _, first in module.lives)


@torch.no_grad()
def weight_sketch(policy: Policy) -> Tensor:
    """(buckets,) float64 on the CPU, the same however the weights are sharded. Collective under FSDP2."""
    first = next(policy.parameters())
    sketch = Sketch(device=first.device)
    start = 0
    for weight in policy.weights():
        piece, offset = local_piece(weight)
        sketch.add(piece, start + offset)
        start += weight.numel()
    sums = sketch.sums.cpu()
    return ranks.all_reduce(sums) if isinstance(first, DTensor) else sums
