"""Model FLOPs utilisation of the train step: the arithmetic that the model needs over what the device could do.

Needed are the forward and twice that for the backward pass, once where weights are frozen; recomputing for gradient
checkpointing, or in the output head, is not (PaLM's definition, arXiv 2204.02311, appendix B). Tokens are those
forwarded, without padding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.budget import ModelShape, idle_parameters
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import MicroBatch

# Dense bf16 FLOP/s with fp32 sums, by the exact name that the driver gives. From NVIDIA's data sheets, where figures
# "with sparsity" are halved: H100, H200, B200 and B300 (HGX), GH200, A100, A30, A40, A10, L4, L40, L40S; for GeForce
# and RTX cards the white papers of Ampere GA102, Ada and Blackwell. The end of a name decides about the clock:
# "NVIDIA H100 80GB HBM3" is the SXM card.
PEAK_FLOPS = {
    "NVIDIA B300 SXM6 AC": 2250e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA RTX 6000 Ada Generation": 364.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Of a device in the table; None: unknown, CPUs too."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class TrainingFlops:
    """Counts for one model, by its policy, sharded or not, or by its shape. Of a mixture of experts those that a token
    goes through."""

    def __init__(self, of: Policy | ModelShape) -> None:
        if isinstance(of, ModelShape):
            self.head = of.vocab * of.hidden
            self.body = of.parameters - of.idle_parameters - self.head * (1 if of.tied else 2)
            self.frozen = (self.body, self.head) if of.adapters else (0, 0)
            self.body += of.adapters
            self.attention = of.layers * of.heads * of.head_dim
            return
        config = of.model.config.get_text_config()
        embedding: Any = of.model.get_input_embeddings().weight
        head: Any = of.model.get_output_embeddings().weight
        body = [p for p in of.parameters() if p is not embedding and p is not head]
        idle = idle_parameters(of.model)
        self.head = head.numel()
        self.body = sum(p.numel() for p in body) - idle
        frozen = sum(p.numel() for p in body if not p.requires_grad)
        self.frozen = (max(0, frozen - idle), 0 if head.requires_grad else self.head)
        heads = getattr(config, "num_attention_heads", 0)  # state-space layers have none
        head_dim = (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
        self.attention = config.num_hidden_layers * heads * head_dim

    def __call__(self, attended: Tensor, n_targets: int) -> float:
        """Forward and backward of one micro-batch: its `attended_tokens`, and how many log-probs it gives."""
        return self.training(len(attended), float(attended.sum()), n_targets)

    def training(self, tokens: float, attended: float, n_targets: float) -> float:
        """Forward and backward of so many input tokens, which attend to ``attended`` in sum. A frozen weight has no
        gradient of its own."""
        body, head = self.frozen
        return 3.0 * self.forward(tokens, attended, n_targets) - 2.0 * (body * tokens + head * n_targets)

    def forward(self, tokens: float, attended: float, n_targets: float) -> float:
        return 2.0 * self.body * tokens + 2.0 * self.head * n_targets + 4.0 * self.attention * attended


def rates(metrics: Mapping[str, float], seconds: Mapping[str, float], peak: float | None) -> dict[str, float]:
    """Of a step: time/... of each stage, tokens a second, and train/mfu where the ``peak`` FLOP/s of all devices is
    known."""
    found = {f"time/{stage}": value for stage, value in seconds.items()}
    sampled = metrics["rollout/tokens"] + metrics.get("refill/tokens", 0.0)
    found["rollout/tokens_per_second"] = sampled / seconds["rollout"]
    found["train/tokens_per_second"] = metrics["train/tokens"] / seconds["forward_backward"]
    if peak:
        found["train/mfu"] = metrics["train/flops"] / seconds["forward_backward"] / peak
    return found


def attended_tokens(batch: MicroBatch) -> Tensor:
    """How many tokens each input token attends to, itself included."""
    if batch.positions is not None:
        return batch.positions.flatten() + 1
    rows, width = batch.input_ids.shape
    last = torch.full((rows,), -1).scatter_reduce_(0, batch.predictors // width, batch.predictors % width, "amax")
    return torch.cat([torch.arange(1, int(end) + 2) for end in last])
