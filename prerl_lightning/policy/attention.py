"""Attention within packs: many sequences in one row of tokens, none seeing another.

Everything else in a transformer works token by token, so a pack needs no padding there. Attention runs in a few calls
of torch's scaled_dot_product_attention, each over segments of similar length. A segment may have a parent: the
responses of a group share one pass over their prompt, whose keys and values they all attend to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    """queries (S, Lq) and keys (S, Lk): tokens of the pack, padded by repeats; mask (Lq, Lk) bool, None: causal."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """restore (T,): where each token of the pack lies in the calls' flattened outputs."""

    calls: tuple[AttentionCall, ...]
    restore: Tensor

    def to(self, device: torch.device) -> "AttentionPlan":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        calls = (
            AttentionCall(move(c.queries), move(c.keys), None if c.mask is None else move(c.mask)) for c in self.calls
        )
        return AttentionPlan(tuple(calls), move(self.restore))


def plan_attention(segments: Sequence[Segment]) -> AttentionPlan:
    """The calls for ``segments``, which cover a pack's tokens 0 to T without a gap."""
    calls, outputs = [], []
    for batch in _batches(segments):
        width = batch[0].length
        step = torch.arange(width)
        starts = torch.tensor([s.start for s in batch])[:, None]
        lengths = torch.tensor([s.length for s in batch])[:, None]
        queries = starts + torch.minimum(step, lengths - 1)  # (S, Lq)
        parent = batch[0].parent
        if parent is None:
            calls.append(AttentionCall(queries, queries, None))
        else:
            shared = torch.arange(parent.start, parent.start + parent.length).expand(len(batch), -1)
            mask = torch.ones(width, parent.length + width, dtype=torch.bool).tril(parent.length)
            calls.append(AttentionCall(queries, torch.cat([shared, queries], 1), mask))
        outputs.append(torch.where(step < lengths, queries, -1).flatten())
    computed = torch.cat(outputs)  # token of each output row, -1: padding
    restore = torch.empty(sum(s.length for s in segments), dtype=torch.long)
    real = (computed >= 0).nonzero().flatten()
    restore[computed[real]] = real
    return AttentionPlan(tuple(calls), restore)


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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    outputs = []
    for call in plan.calls:
        out = F.scaled_dot_product_attention(
            q[call.queries].transpose(1, 2),
            k[call.keys].transpose(1, 2),
            v[call.keys].transpose(1, 2),
            attn_mask=call.mask,
            is_causal=call.mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (S * Lq, H, D)
    return torch.cat(outputs)[plan.restore][None], None


# no mask function goes with it: transformers then makes none, which is right for right-padded rows and for packs
AttentionInterface.register(NAME, packed_attention)
