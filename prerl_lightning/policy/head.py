"""Token log-probs from hidden states without a tokens x vocabulary tensor, forward or backward.

Both directions go through the vocabulary block by block with all tokens at once: a block's logits are the largest
tensor alive, each row of the weight's gradient is written once, and the matrix products stay large. The backward pass
makes the logits again; sums are kept in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # of one block's logits: 64 MiB in fp32


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    chunked: bool = True,
) -> Tensor:
    """(T,) fp32 log-softmax(scale * cap(hidden @ weight.T + bias))[targets].

    Args:
        hidden: (T, H).
        weight: (V, H), bias (V,): of the output head.
        targets: (T,) token ids.
        scale: of the (capped) logits, 1 / temperature.
        softcap: logits become softcap * tanh(logits / softcap); None: they stay.
        chunked: False: by autograd over all logits at once.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        if chunked:
            return _HeadLogProbs.apply(hidden, weight, bias, targets, scale, softcap)
        logits = _cap(F.linear(hidden, weight.to(hidden), None if bias is None else bias.to(hidden)).float(), softcap)
        return -F.cross_entropy(scale * logits, targets, reduction="none")


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.scale, ctx.softcap = scale, softcap
        maximum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        total, target_logits = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for start, logits in _blocks(hidden, weight, bias):
            scaled = _cap(logits, softcap).mul_(scale)
            rows, columns = _in_block(targets, start, scaled.shape[1])
            target_logits[rows] = scaled[rows, columns]
            higher = torch.maximum(maximum, scaled.amax(1))
            total = total * (maximum - higher).exp() + scaled.sub_(higher[:, None]).exp_().sum(1)
            maximum = higher
        log_normaliser = maximum + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser)
        return target_logits - log_normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser = ctx.saved_tensors
        gradient = gradients[0].float()
        by_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        by_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start, logits in _blocks(hidden, weight, bias):
            end = start + logits.shape[1]
            slope = None
            if ctx.softcap:
                bent = torch.tanh(logits / ctx.softcap)
                slope, logits = 1 - bent**2, ctx.softcap * bent
            # d log p(target) / d logit = [target] - p
            by_logits = logits.mul_(ctx.scale).sub_(log_normaliser[:, None]).exp_().mul_(-gradient[:, None])
            rows, columns = _in_block(targets, start, end - start)
            by_logits[rows, columns] += gradient[rows]
            by_logits = by_logits.mul_(ctx.scale) if slope is None else by_logits.mul_(ctx.scale).mul_(slope)
            if by_bias is not None:
                by_bias[start:end] = by_logits.sum(0)
            low = by_logits.to(hidden.dtype)
            by_hidden += low @ weight[start:end].to(hidden.dtype)
            if by_weight is not None:
                by_weight[start:end] = low.T @ hidden
        return by_hidden.to(hidden.dtype), by_weight, by_bias, None, None, None


def _blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """(first token id, (T, block) fp32 logits of its own) over the vocabulary."""
    size = max(1024, BLOCK_ELEMENTS // max(1, len(hidden)))
    for start in range(0, len(weight), size):
        rows = weight[start : start + size].to(hidden.dtype)
        logits = F.linear(hidden, rows, None if bias is None else bias[start : start + size].to(hidden.dtype))
        yield start, logits.float()


def _in_block(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Tokens whose target lies in the block, and its column there."""
    rows = ((targets >= start) & (targets < start + size)).nonzero().flatten()
    return rows, targets[rows] - start
