"""A frozen copy of what is trained of the policy's weights, for a KL penalty: one of each rank's shard, on its device.

With LoRA that is the adapters: where a life begins with new ones, the reference is the model without them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prerl_lightning import ranks
from prerl_lightning.policy.model import Policy


class Reference:
    """The weights of ``policy`` as they are now (re-anchor by making a new one)."""

    def __init__(self, policy: Policy) -> None:
        self.shards = {name: ranks.local(p.detach()).clone() for name, p in policy.trained()}

    @contextmanager
    def in_place(self, policy: Policy) -> Iterator[None]:
        """Within, the policy computes with the reference's weights; not for use inside a graph.

        The two exchange their contents tensor by tensor, which works under every strategy and needs no second module.
        """
        self._exchange(policy)
        try:
            yield
        finally:
            self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: Policy) -> None:
        for name, parameter in policy.trained():
            held = ranks.local(parameter)
            shard = self.shards[name] = self.shards[name].to(held.device)
            kept = held.clone()
            held.copy_(shard)
            shard.copy_(kept)

    def state_dict(self, policy: Policy, sharded: bool = False) -> dict[str, Tensor]:
        """Full tensors on the CPU, one gathered at a time; collective under FSDP2. ``sharded``: as the policy's are."""
        with self.in_place(policy):
            if sharded:
                return {name: p.detach().clone() for name, p in policy.trained()}
            return {name: ranks.full(p).detach().cpu().clone() for name, p in policy.trained()}

    @torch.no_grad()
    def load_state_dict(self, policy: Policy, state: Mapping[str, Tensor]) -> None:
        for name, parameter in policy.trained():
            self.shards[name].copy_(ranks.local(ranks.held_as(state[name], parameter)))
