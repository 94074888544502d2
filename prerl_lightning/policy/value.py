"""The value model: of each response token the return to be expected in front of it, told from the last hidden state
there. It reads a body of its own, or the policy's."""

import torch
from torch import Tensor, nn

from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import MicroBatch


class ValueHead(nn.Module):
    """(T, H) hidden states -> (T,) values, fp32 or fp64. It begins at zero everywhere: no seed, and the same on all
    ranks."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        # one dimension, which FSDP2 cuts evenly; of (1, H) all but the first rank would have nothing
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        exact = torch.promote_types(self.weight.dtype, torch.float32)  # under FSDP2 it may be gathered in 16 bits
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(exact) @ self.weight.to(exact)


class ValueModel:
    """Args:
        body: whose hidden states are read. A whole one, not sharded yet.
        own: ``body`` is this model's own, which trains with the head; False: it is the policy, which does not, so that
            its gradient is that of its objective alone.

    Attributes:
        module: what of it is trained.
    """

    def __init__(self, body: Policy, own: bool) -> None:
        self.body, self.own = body, own
        output: Tensor = body.model.get_output_embeddings().weight
        dtype = torch.promote_types(output.dtype, torch.float32)
        self.head = ValueHead(output.shape[1], dtype)
        self.module: nn.Module = self.head
        if own:
            if output is not body.model.get_input_embeddings().weight:
                output.requires_grad_(False)  # nothing reads it
            body.value_head = self.head  # sharded with it
            self.module = body

    def __call__(self, batch: MicroBatch) -> Tensor:
        """(T,) values in front of ``batch.targets``."""
        if self.own:
            return self.body(batch, read=self.head)[0]
        with torch.no_grad():
            hidden, _ = self.body(batch, read=lambda hidden: hidden)
        return self.head(hidden)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}
