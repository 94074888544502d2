"""A frozen copy of the policy's weights, for a KL penalty: one copy of each rank's shard, on its device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prerl_lightning import ranks
from prerl_lightning.policy.model import Policy


class Reference:
    """The weights of ``policy`` as they are now (re-anchor by making a new one)."""

    def __init__(self, policy: Policy) -> None:
        self.shards = {name: _local(p.detach()).clone() for name, p in policy.named_parameters()}

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
        for name, parameter in policy.named_parameters():
            held = _local(parameter)
            shard = self.shards[name] = self.shards[name].to(held.device)
            kept = held.clone()
            held.copy_(shard)
            shard.copy_(kept)

    def state_dict(self, policy: Policy, sharded: bool = False) -> dict[str, Tensor]:
        """Full tensors on the CPU, one gathered at a time; collective under FSDP2. ``sharded``: as the policy's are."""
        with self.in_place(policy):
            if sharded:
                return {name: p.detach().clone() for name, p in policy.named_parameters()}
            return {name: ranks.full(p).detach().cpu().clone() for name, p in policy.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, policy: Policy, state: Mapping[str, Tensor]) -> None:
        for name, parameter in policy.named_parameters():
            saved = state[name]
            if isinstance(parameter, DTensor) and not isinstance(saved, DTensor):
                from torch.distributed.tensor import distribute_tensor

                full = saved.to(_local(parameter))
                saved = distribute_tensor(full, parameter.device_mesh, parameter.placements)
            self.shards[name].copy_(_local(saved))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
