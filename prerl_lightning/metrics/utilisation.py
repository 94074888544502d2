"""Model FLOPs utilisation of the train step: the arithmetic that the model needs over what the device could do.

Needed are the forward and twice that for the backward pass; recomputing for gradient checkpointing, or in the output
head, is not (PaLM's definition, arXiv 2204.02311, appendix B). Tokens are those forwarded, without padding.
"""

import torch
from torch import Tensor

from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import MicroBatch

# dense bf16 FLOP/s from NVIDIA's data sheets, by a part of the device's name; the first that fits
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Of a device in the table; None: unknown, CPUs too."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class TrainingFlops:
    """Counts for one model; sizes are taken before it is sharded or as the full sizes of its shards."""

    def __init__(self, policy: Policy) -> None:
        config = policy.model.config.get_text_config()
        embedding = policy.model.get_input_embeddings().weight
        head = policy.model.get_output_embeddings().weight
        whole = sum(p.numel() for p in policy.parameters())
        self.head = head.numel()
        self.body = whole - embedding.numel() - (0 if head is embedding else head.numel())
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = config.num_hidden_layers * config.num_attention_heads * head_dim

    def __call__(self, attended: Tensor, n_targets: int) -> float:
        """Forward and backward of one micro-batch: its `attended_tokens`, and how many log-probs it gives."""
        return (
            6.0 * self.body * len(attended)
            + 6.0 * self.head * n_targets
            + 12.0 * self.attention * float(attended.sum())
        )


def attended_tokens(batch: MicroBatch) -> Tensor:
    """How many tokens each input token attends to, itself included."""
    if batch.positions is not None:
        return batch.positions.flatten() + 1
    rows, width = batch.input_ids.shape
    last = torch.full((rows,), -1).scatter_reduce_(0, batch.predictors // width, batch.predictors % width, "amax")
    return torch.cat([torch.arange(1, int(end) + 2) for end in last])
