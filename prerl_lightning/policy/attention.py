"""Attention within packs: many sequences in one row of tokens, none seeing another.

Everything else in a transformer works token by token, so a pack needs no padding there. Attention runs in a few calls
of torch's scaled_dot_product_attention, each over segments of similar length. A segment may have a parent: the
responses of a group share one pass over their prompt, whose keys and values they all attend to.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "prerl_packed"

# Segments go into one call as long as its padding stays below this share of its tokens, or this many tokens.
PADDING_SHARE, PADDING_TOKENS = 0.15, 256


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``start + length`` of a pack: they attend to ``parent``, if any, and causally within."""

    start: int
    length: int
    parent: "Segment | None" = None


@dataclass(frozen=True)
class AttentionCall:
    """One batch of S segments, all padded to ``width`` tokens.

    Args:
        rows: S.
        width: of the longest.
        parent: which of the pack's parents, and its length; None: no parent.
        mask: (width, parent length + width) bool; None without a parent: causal.
    """

    rows: int
    width: int
    parent: tuple[int, int] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """How a pack of T tokens is rearranged into R = sum(rows * width) rows of attention calls, and back.

    Args:
        calls: in the order of their rows.
        gather: (R,) the token of each row; padding repeats the segment's last one.
        padding: the rows that are padding.
        restore: (T,) the row of each token.
        parents: the tokens of all parents, behind one another.
    """

    calls: tuple[AttentionCall, ...]
    gather: Tensor
    padding: Tensor
    restore: Tensor
    parents: Tensor

    def to(self, device: torch.device) -> "AttentionPlan":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        calls = tuple(replace(c, mask=move(c.mask)) if c.mask is not None else c for c in self.calls)
        return AttentionPlan(calls, *(move(t) for t in (self.gather, self.padding, self.restore, self.parents)))

    @property
    def parent_lengths(self) -> list[int]:
        lengths = dict(c.parent for c in self.calls if c.parent is not None)
        return [lengths[i] for i in range(len(lengths))]


def plan_attention(segments: Sequence[Segment]) -> AttentionPlan:
    """The calls for ``segments``, which cover a pack's tokens 0 to T without a gap."""
    calls, gather, real = [], [], []
    parents: dict[Segment, int] = {}
    for batch in _batches(segments):
        width, parent = batch[0].length, batch[0].parent
        step = torch.arange(width)
        starts = torch.tensor([s.start for s in batch])[:, None]
        lengths = torch.tensor([s.length for s in batch])[:, None]
        gather.append((starts + torch.minimum(step, lengths - 1)).flatten())
        real.append((step < lengths).flatten())
        if parent is None:
            calls.append(AttentionCall(len(batch), width))
        else:
            number = parents.setdefault(parent, len(parents))
            mask = torch.ones(width, parent.length + width, dtype=torch.bool).tril(parent.length)
            calls.append(AttentionCall(len(batch), width, (number, parent.length), mask))
    tokens, is_real = torch.cat(gather), torch.cat(real)
    rows = is_real.nonzero().flatten()
    restore = torch.empty(len(rows), dtype=torch.long)
    restore[tokens[rows]] = rows
    spans = [torch.arange(p.start, p.start + p.length) for p in parents]
    return AttentionPlan(
        tuple(calls),
        tokens,
        (~is_real).nonzero().flatten(),
        restore,
        torch.cat(spans) if spans else torch.empty(0, dtype=torch.long),
    )


def _batches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments of one call: all roots or all of one parent, the longest first."""
    families: dict[Segment | None, list[Segment]] = {}
    for segment in segments:
        families.setdefault(segment.parent, []).append(segment)
    batches = []
    for family in families.values():
        batch: list[Segment] = []
        real = 0
        for segment in sorted(family, key=lambda s: -s.length):
            padded = batch[0].length * (len(batch) + 1) if batch else 0
            padding = padded - real - segment.length
            if batch and padding > max(PADDING_TOKENS, PADDING_SHARE * padded):
                batches.append(batch)
                batch, real = [], 0
            batch.append(segment)
            real += segment.length
        batches.append(batch)
    return batches


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; without a ``plan`` its own SDPA path.

    Args:
        query: (1, H, T, D), rotated; key and value (1, H_kv, T, D).

    Returns:
        (1, T, H, D).
    """
    if plan is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [k for k in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(k) is not None]
    if unknown:
        raise NotImplementedError(f"packed attention does not know {', '.join(unknown)}")
    # On a CPU the backward pass of bf16 attention over short segments takes 2 to 8 times as long as that of fp32.
    upcast = query.device.type == "cpu" and query.dtype != torch.float64
    q, k, v = (x[0].transpose(0, 1).to(torch.float32 if upcast else x.dtype) for x in (query, key, value))  # (T, H, D)
    sizes = [call.rows * call.width for call in plan.calls]
    none = plan.parents[:0]
    own_q = _Gather.apply(q, plan.gather, plan.restore, none).split(sizes)
    *own_k, parents_k = _Gather.apply(k, plan.gather, plan.restore, plan.parents).split([*sizes, len(plan.parents)])
    *own_v, parents_v = _Gather.apply(v, plan.gather, plan.restore, plan.parents).split([*sizes, len(plan.parents)])
    parents = list(zip(parents_k.split(plan.parent_lengths), parents_v.split(plan.parent_lengths), strict=True))
    outputs = []
    for call, qc, kc, vc in zip(plan.calls, own_q, own_k, own_v, strict=True):
        qc, kc, vc = (x.unflatten(0, (call.rows, call.width)) for x in (qc, kc, vc))
        if call.parent is not None:
            shared_k, shared_v = (x.expand(call.rows, *x.shape) for x in parents[call.parent[0]])
            kc, vc = torch.cat([shared_k, kc], 1), torch.cat([shared_v, vc], 1)
        with torch.autocast(query.device.type, enabled=False) if upcast else nullcontext():
            out = F.scaled_dot_product_attention(
                qc.transpose(1, 2),  # (S, H, width, D)
                kc.transpose(1, 2),
                vc.transpose(1, 2),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (S * width, H, D)
    out = _Restore.apply(torch.cat(outputs), plan.gather, plan.padding, plan.restore)[None]
    return out.to(query.dtype), None


# Rearranging tokens by autograd's own indexing costs a scatter in the backward pass. But each token has one row, and
# the gradient of padding is zero (causal attention does not see what is behind), so that both directions are gathers.


class _Gather(torch.autograd.Function):
    """(T, ...) tokens to (R + parents, ...) rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gather: Tensor, restore: Tensor, parents: Tensor) -> Tensor:
        ctx.save_for_backward(restore, parents)
        return tokens.index_select(0, torch.cat([gather, parents]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        restore, parents = ctx.saved_tensors
        by_tokens = gradients[0].index_select(0, restore)
        if len(parents):
            by_tokens.index_add_(0, parents, gradients[0][-len(parents) :])
        return by_tokens, None, None, None


class _Restore(torch.autograd.Function):
    """(R, ...) rows to (T, ...) tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Tensor, padding: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(gather, padding)
        return rows.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gather, padding = ctx.saved_tensors
        return gradients[0].index_select(0, gather).index_fill_(0, padding, 0), None, None, None


# no mask function goes with it: transformers then makes none, which is right for right-padded rows and for packs
AttentionInterface.register(NAME, packed_attention)
