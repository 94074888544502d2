"""Attention within packs: many sequences in one row of tokens, none seeing another.

Everything else in a transformer works token by token, so a pack needs no padding there. A segment may have a parent:
the responses of a group share one pass over their prompt, whose keys and values they all attend to. How a pack is
attended to is its plan's affair (`attend`), of which there are two kinds:

- `SDPAPlan`: a few calls of torch's scaled_dot_product_attention, each over segments of similar length, padded to the
  longest. Everywhere.
- `VarlenPlan`: one call of Flash Attention's kernel for sequences of any length (torch.nn.attention.varlen), without
  padding or masks. On NVIDIA GPUs in 16 bits, for head sizes for which `varlen_works` has seen it agree with the other.
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

log = logging.getLogger(__name__)

NAME = "prerl_packed"
Kernel = Literal["sdpa", "varlen"]
Record = TypeVar("Record")

# Segments go into one call as long as its padding stays below this share of its tokens, or this many tokens.
PADDING_SHARE, PADDING_TOKENS = 0.15, 256


def moved(record: Record, device: torch.device) -> Record:
    """A dataclass with all tensors in it, however deep, on ``device``."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
            return pinned.to(device, non_blocking=True)  # from pageable memory the host would wait for the device
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return moved(value, device) if is_dataclass(value) else value

    return cast(Record, replace(cast(Any, record), **{f.name: move(getattr(record, f.name)) for f in fields(record)}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``start + length`` of a pack: they attend to ``parent``, if any, and causally within."""

    start: int
    length: int
    parent: "Segment | None" = None


class AttentionPlan(ABC):
    """How one pack of T tokens is attended to."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """(T, H, D) queries, (T, H_kv, D) keys and (T, H_kv, D_v) values to (T, H, D_v); ``scaling`` of the scores,
        1 / sqrt(D) if None."""


def plan_attention(segments: Sequence[Segment], kernel: Kernel = "sdpa") -> AttentionPlan:
    """The plan for ``segments``, which cover a pack's tokens 0 to T without a gap, in order."""
    return _varlen_plan(segments) if kernel == "varlen" else _sdpa_plan(segments)


# ---------------------------------------------------------------------- padded calls


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


def takes_groups(device: str, dtype: torch.dtype, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries, where torch would else keep all scores: CUDA's
    is Flash Attention, of 16 bits and without a mask."""
    return mask is None and (device != "cuda" or dtype != torch.float32)


@dataclass(frozen=True)
class SDPAPlan(AttentionPlan):
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

    @property
    def parent_lengths(self) -> list[int]:
        lengths = dict(c.parent for c in self.calls if c.parent is not None)
        return [lengths[i] for i in range(len(lengths))]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        # On a CPU the backward pass of bf16 attention over short segments takes 2 to 8 times as long as that of fp32.
        upcast = query.device.type == "cpu" and query.dtype != torch.float64
        q, k, v = (x.to(torch.float32) if upcast else x for x in (query, key, value))
        sizes = [call.rows * call.width for call in self.calls]
        none = self.parents[:0]
        own_q = _Gather.apply(q, self.gather, self.restore, none).split(sizes)
        *own_k, parents_k = _Gather.apply(k, self.gather, self.restore, self.parents).split([*sizes, len(self.parents)])
        *own_v, parents_v = _Gather.apply(v, self.gather, self.restore, self.parents).split([*sizes, len(self.parents)])
        parents = list(zip(parents_k.split(self.parent_lengths), parents_v.split(self.parent_lengths), strict=True))
        outputs = []
        for call, qc, kc, vc in zip(self.calls, own_q, own_k, own_v, strict=True):
            qc, kc, vc = (x.unflatten(0, (call.rows, call.width)) for x in (qc, kc, vc))
            if call.parent is not None:
                shared_k, shared_v = (x.expand(call.rows, *x.shape) for x in parents[call.parent[0]])
                kc, vc = torch.cat([shared_k, kc], 1), torch.cat([shared_v, vc], 1)
            grouped = q.shape[1] != k.shape[1]
            if grouped and not takes_groups(q.device.type, q.dtype, call.mask):
                kc, vc = (x.repeat_interleave(q.shape[1] // k.shape[1], 2) for x in (kc, vc))
                grouped = False
            with torch.autocast(query.device.type, enabled=False) if upcast else nullcontext():
                out = F.scaled_dot_product_attention(
                    qc.transpose(1, 2),  # (S, H, width, D)
                    kc.transpose(1, 2),
                    vc.transpose(1, 2),
                    attn_mask=call.mask,
                    is_causal=call.mask is None,
                    scale=scaling,
                    enable_gqa=grouped,
                )
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # (S * width, H, D)
        return _Restore.apply(torch.cat(outputs), self.gather, self.padding, self.restore).to(query.dtype)


def _sdpa_plan(segments: Sequence[Segment]) -> SDPAPlan:
    calls, gather, real = [], [], []
    parents: dict[Segment, int] = {}
    for batch in _batches(segments):
        width, parent = batch[0].length, batch[0].parent
        step = np.arange(width)
        starts = np.array([s.start for s in batch])[:, None]
        lengths = np.array([s.length for s in batch])[:, None]
        gather.append((starts + np.minimum(step, lengths - 1)).ravel())
        real.append((step < lengths).ravel())
        if parent is None:
            calls.append(AttentionCall(len(batch), width))
        else:
            number = parents.setdefault(parent, len(parents))
            mask = torch.ones(width, parent.length + width, dtype=torch.bool).tril(parent.length)
            calls.append(AttentionCall(len(batch), width, (number, parent.length), mask))
    tokens, is_real = np.concatenate(gather), np.concatenate(real)
    rows = is_real.nonzero()[0]
    restore = np.empty(len(rows), dtype=np.int64)
    restore[tokens[rows]] = rows
    spans = [np.arange(p.start, p.start + p.length) for p in parents]
    parent_tokens = np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)
    indices = (tokens, (~is_real).nonzero()[0], restore, parent_tokens)
    return SDPAPlan(tuple(calls), *map(torch.from_numpy, indices))


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


# ---------------------------------------------------------------------- variable lengths


@dataclass(frozen=True)
class VarlenPlan(AttentionPlan):
    """One call for S segments, whose queries are the pack's tokens as they lie.

    Args:
        bounds: (S + 1,) int32, where each segment's queries begin, and T.
        key_bounds: (S + 1,) int32, likewise of keys: the parent's, then the segment's own.
        keys: (K,) the token of each key; None: as the queries, where no segment has a parent.
        longest: queries of the longest segment, and keys.
    """

    bounds: Tensor
    key_bounds: Tensor
    keys: Tensor | None
    longest: tuple[int, int]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):  # which does not know this kernel
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        if self.keys is not None:
            key, value = (_Repeat.apply(x, self.keys) for x in (key, value))
        options = _varlen_options(query.shape[1] != key.shape[1])
        bounds = (self.bounds, self.key_bounds, *self.longest)
        return cast(Tensor, varlen.varlen_attn(query, key, value, *bounds, scale=scaling, **options))


@lru_cache
def _varlen_options(grouped: bool) -> dict[str, Any]:
    """Causal (the last query sees the last key), in the words of the torch release."""
    known = inspect.signature(varlen.varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | ({"enable_gqa": True} if grouped and "enable_gqa" in known else {})


def _varlen_plan(segments: Sequence[Segment]) -> VarlenPlan:
    lengths = np.array([s.length for s in segments])
    key_lengths = lengths + [s.parent.length if s.parent is not None else 0 for s in segments]
    keys = None
    if any(s.parent is not None for s in segments):
        spans = [p for s in segments for p in (s.parent, s) if p is not None]
        keys = torch.from_numpy(np.concatenate([np.arange(p.start, p.start + p.length) for p in spans]))
    bounds, key_bounds = (
        torch.from_numpy(np.concatenate([[0], n.cumsum()]).astype(np.int32)) for n in (lengths, key_lengths)
    )
    return VarlenPlan(bounds, key_bounds, keys, (int(lengths.max()), int(key_lengths.max())))


@lru_cache
def varlen_works(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int, value_size: int
) -> bool:
    """Whether the kernel takes heads of these sizes on a CUDA ``device`` and gives what SDPA gives in fp32, forward and
    backward. Tried once, and said."""
    parent = Segment(0, 37)
    segments = [parent, Segment(37, 20, parent), Segment(57, 5, parent), Segment(62, 66)]
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, heads, size), (128, kv_heads, size), (128, kv_heads, value_size), (128, heads, value_size))
    *qkv, slope = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    found: list[list[Tensor]] = []
    reason = ""
    try:
        for kernel, kind in (("sdpa", torch.float32), ("varlen", dtype)):
            q, k, v = leaves = [x.to(kind).requires_grad_() for x in qkv]
            plan = moved(plan_attention(segments, cast(Kernel, kernel)), device)
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                out = plan.attend(q, k, v, None)
                gradients = torch.autograd.grad(out, leaves, slope.to(kind))
            found.append([x.detach().float() for x in (out, *gradients)])
        errors = [float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)]
        if not max(errors) < 0.03:  # bf16 rounds to 0.004
            reason = f"its results differ by {max(errors):.2g} of their norm"
    except Exception as error:  # torch, the driver and the kernel each raise their own
        reason = str(error).splitlines()[0][:200]
    if reason:
        log.warning("Packs are attended to in padded calls, which costs time: no variable-length kernel: %s", reason)
    else:
        log.info("Packs are attended to by Flash Attention's variable-length kernel.")
    return not reason


class _Repeat(torch.autograd.Function):
    """(T, ...) tokens to (K, ...) keys, many tokens several times; their gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.n_tokens = len(tokens)
        return tokens.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (keys,) = ctx.saved_tensors
        (gradient,) = gradients
        total = torch.zeros(ctx.n_tokens, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
        return total.index_add_(0, keys, gradient.float()).to(gradient.dtype), None


# ---------------------------------------------------------------------- transformers' interface


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
    return plan.attend(q, k, v, scaling)[None], None


# no mask function goes with it: transformers then makes none, which is right for right-padded rows and for packs
AttentionInterface.register(NAME, packed_attention)
