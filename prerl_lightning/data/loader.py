"""The order of prompts: sized, shuffled by a seed, sharded by rank, with a cursor that goes into the checkpoint."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.data.mixture import MixedPrompts
from prerl_lightning.types import Prompt


def shuffled(prompts: Sequence[Prompt], seed: int, epoch: int) -> Tensor:
    """(P,) places of the prompts of an epoch."""
    if isinstance(prompts, MixedPrompts):
        return prompts.order(seed, epoch)
    return torch.randperm(len(prompts), generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


class PromptLoader:
    """Yields one rank's share of each global batch of prompts.

    It yields prompts only, and no rollouts: a loader may be read ahead of the training step, when the weights are
    still those of the step before. It has a length, so that Lightning does not read ahead.

    Args:
        prompts: all of them, the same on every rank.
        batch_size: global, a multiple of ``world_size``.
        shuffle_seed: None keeps the order and the last, smaller batch (evaluation); an int draws a new permutation
            for each epoch and leaves out what does not fill a batch.
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, rank: int, world_size: int, shuffle_seed: int | None
    ) -> None:
        self.prompts, self.batch_size, self.rank, self.world_size = prompts, batch_size, rank, world_size
        self.shuffle_seed = shuffle_seed
        self.epoch = 0
        self.cursor = 0

    def __len__(self) -> int:
        if self.shuffle_seed is None:
            return -(-len(self.prompts) // self.batch_size)
        return len(self.prompts) // self.batch_size

    def __iter__(self) -> Iterator[list[Prompt]]:
        if self.cursor >= len(self):
            self.epoch, self.cursor = self.epoch + 1, 0
        order = torch.arange(len(self.prompts))
        if self.shuffle_seed is not None:
            order = shuffled(self.prompts, self.shuffle_seed, self.epoch)
        while self.cursor < len(self):
            batch = order[self.cursor * self.batch_size : (self.cursor + 1) * self.batch_size].tolist()
            share = -(-len(batch) // self.world_size)
            self.cursor += 1
            yield [self.prompts[i] for i in batch[self.rank * share : (self.rank + 1) * share]]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
