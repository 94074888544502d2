"""Token log-probs from hidden states without a tokens x vocabulary tensor, forward or backward.

Both directions go through the vocabulary block by block with all tokens at once: a block's logits are the largest
tensor alive, each row of the weight's gradient is written once, and the matrix products stay large. The backward pass
makes the logits again; sums are kept in fp32, or in fp64 for a model in it.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# of one block's logits in fp32: 512 MiB, 12 large products for 10,000 tokens and 152,000 words; on a CPU 8 MiB, which
# stay in its cache (1.7 times faster for SmolLM2)
BLOCK_ELEMENTS, CPU_BLOCK_ELEMENTS = 1 << 27, 1 << 21
BLOCK_ROWS = 1 << 14  # of the weight, at most: few tokens would have a copy of all of it, and two of its gradient


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    into_grad: Literal["no", "only", "also"] = "no",
) -> tuple[Tensor, Tensor | None]:
    """(T,) fp32 log-softmax(scale * cap(hidden @ weight.T + bias))[targets]; and the entropy of each row, or None. Of
    fp64 the results are fp64.

    Args:
        hidden: (T, H).
        weight: (V, H), bias (V,): of the output head.
        targets: (T,) token ids.
        scale: of the (capped) logits, 1 / temperature.
        softcap: logits become softcap * tanh(logits / softcap); None: they stay.
        entropy: compute (T,) entropies in nats too, which have a gradient; it costs nothing where no loss has them.
        into_grad: the backward pass adds the weight's gradient to ``weight.grad`` itself instead of handing
            autograd a (V, H) tensor, which it keeps, for tied weights until the body's backward pass is over. ``also``:
            autograd has other gradients for this weight; ``only``: it has not, and gets zeros (of no size), because
            DDP and FSDP2 wait for one. Both for ``backward()`` on leaf weights, not for `torch.autograd.grad`.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies = _HeadLogProbs.apply(hidden, weight, bias, targets, scale, softcap, entropy, into_grad)
        return log_probs, entropies if entropy else None


def log_probs_of(logits: Tensor, targets: Tensor, scale: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """The same from (T, V) logits, by autograd."""
    scaled = scale * logits.to(_exact(logits))
    entropies = torch.distributions.Categorical(logits=scaled).entropy() if entropy else None
    return -F.cross_entropy(scaled, targets, reduction="none"), entropies


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


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
        entropy: bool,
        into_grad: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.softcap, ctx.into_grad = scale, softcap, into_grad
        ctx.set_materialize_grads(False)
        exact = _exact(hidden)
        maximum = torch.full((len(hidden),), torch.finfo(exact).min, dtype=exact, device=hidden.device)
        # sums over the vocabulary of exp(logit - maximum), and of the same times (logit - maximum)
        total, moment = torch.zeros_like(maximum), torch.zeros_like(maximum)
        target_logits = torch.zeros_like(maximum)
        for start, logits in _blocks(hidden, weight, bias):
            scaled = _cap(logits, softcap)
            scaled = scaled if scale == 1 else scaled.mul_(scale)
            inside, columns = _in_block(targets, start, scaled.shape[1])
            target_logits = torch.where(inside, scaled.gather(1, columns[:, None])[:, 0], target_logits)
            higher = torch.maximum(maximum, scaled.amax(1))
            shift = maximum - higher
            scaled.sub_(higher[:, None])
            weights = scaled.exp() if entropy else scaled.exp_()
            if entropy:
                moment = shift.exp() * (moment + shift * total) + torch.einsum("tv,tv->t", weights, scaled)
            total = shift.exp() * total + weights.sum(1)
            maximum = higher
            del logits, scaled, weights
        log_normaliser = maximum + total.log()
        entropies = total.log() - moment / total if entropy else total.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser, entropies)
        return target_logits - log_normaliser, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser, entropies = ctx.saved_tensors
        exact = log_normaliser.dtype
        by_scaled, by_entropy = (None if g is None else (g.to(exact) * ctx.scale)[:, None] for g in gradients)
        by_scaled = torch.zeros_like(log_normaliser)[:, None] if by_scaled is None else by_scaled
        by_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
        by_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        by_weight, add = None, False
        if ctx.needs_input_grad[1]:
            add = ctx.into_grad != "no" and weight.grad is not None
            by_weight = weight.grad if add else torch.empty_like(weight)
        for start, logits in _blocks(hidden, weight, bias):
            end = start + logits.shape[1]
            slope = None
            if ctx.softcap:
                bent = torch.tanh(logits / ctx.softcap)
                slope, logits = 1 - bent**2, ctx.softcap * bent
            # d log p(target) / d logit = [target] - p; d entropy / d logit = -p (log p + entropy)
            scaled = logits if ctx.scale == 1 else logits.mul_(ctx.scale)
            log_p, slopes = scaled.sub_(log_normaliser[:, None]), by_scaled
            if by_entropy is not None:
                slopes = (log_p + entropies[:, None]).mul_(by_entropy).add_(by_scaled)
            by_logits = log_p.exp_().mul_(-slopes)
            inside, columns = _in_block(targets, start, end - start)
            by_logits.scatter_add_(1, columns[:, None], torch.where(inside[:, None], by_scaled, 0.0))
            by_logits = by_logits if slope is None else by_logits.mul_(slope)
            if by_bias is not None:
                by_bias[start:end] = by_logits.sum(0)
            low = by_logits.to(hidden.dtype)
            by_hidden += _product(low, weight[start:end].to(hidden.dtype))
            if by_weight is not None:
                block = _product(low.T, hidden)
                by_weight[start:end] = by_weight[start:end] + block if add else block
                del block
            del logits, scaled, log_p, slopes, by_logits, low
        if by_weight is not None and ctx.into_grad != "no":
            weight.grad = by_weight
            by_weight = by_weight.new_zeros(()).expand_as(by_weight) if ctx.into_grad == "only" else None
        return by_hidden.to(hidden.dtype), by_weight, by_bias, None, None, None, None, None


def block_elements(on_cpu: bool) -> int:
    return CPU_BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS


def block_rows(tokens: int, on_cpu: bool) -> int:
    """Of the weight, whose logits for so many tokens are made at once."""
    return min(max(1024, block_elements(on_cpu) // max(1, tokens)), BLOCK_ROWS)


def _blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """(first token id, (T, block) fp32 logits of its own) over the vocabulary."""
    size = block_rows(len(hidden), hidden.device.type == "cpu")
    for start in range(0, len(weight), size):
        logits = _product(hidden, weight[start : start + size].to(hidden.dtype).T)
        logits = logits.to(_exact(logits))
        yield start, logits if bias is None else logits.add_(bias[start : start + size])
        del logits  # before the next are made, here and where they are used


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; on CUDA of 16-bit matrices without rounding the result to 16 bits."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _in_block(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """(T,) whether each target lies in the block, and a column of it: the target's, or just one. No shape depends on
    the data: asking for it would make the GPU wait at every block."""
    columns = targets - start
    return (columns >= 0) & (columns < size), columns.clamp(0, size - 1)
