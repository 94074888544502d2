"""Do the two spaces pull the same way? Gradients of log p(y) and log p(y given x), compared response by response.

arXiv 2604.14142 rests on their inner product not being negative. A gradient is that of the sum over the response's
tokens, with respect to all weights, at sampling temperature. Being a sum over tokens, it is also that of its parts: of
the tokens of one stretch of the response, or of one range of probability, each part compared by itself. Up to
EXACT_PARAMETERS weights a rank, gradients are compared as they are, which takes four copies of them, with parts six;
above that as sketches (metrics/sketch.py), which take no memory to speak of and have the error said there.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prerl_lightning import ranks
from prerl_lightning.metrics.sketch import SIZE, Sketch, local_piece
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import Family, micro_batches
from prerl_lightning.types import Rollout, Sequences

EXACT_PARAMETERS = 1 << 28
GROUPS = ("embedding", "first", "middle", "last", "head")
EDGES = (0.0, 0.5, 0.9, 0.99, 1.0)  # of the bins by p(y_t given x, y_<t)

Gradient = dict[str, Tensor]  # by parameter, or by layer group: its sketch


@dataclass(frozen=True)
class Products:
    """Of two gradients, a by log p(y given x) and b by log p(y): (groups,) float64 each, which add up to the whole."""

    aa: Tensor
    bb: Tensor
    ab: Tensor

    @property
    def inner_product(self) -> float:
        return float(self.ab.sum())

    @property
    def cosine(self) -> float:
        """NaN where a gradient is zero."""
        return float(self.ab.sum() / (self.aa.sum() * self.bb.sum()).sqrt())

    @property
    def by_group(self) -> dict[str, float]:
        """Cosine of each layer group that has weights of its own and a gradient, in both spaces."""
        norms = (self.aa * self.bb).sqrt()
        cosines = zip(GROUPS, self.ab.tolist(), norms.tolist(), strict=True)
        return {name: ab / norm for name, ab, norm in cosines if norm > 0}


@dataclass(frozen=True, eq=False)
class GradientPair:
    """Of the same tokens of a response: the gradients of log p(y given x) and of log p(y), and (tokens,) log-probs."""

    a: Gradient
    b: Gradient
    log_probs: Tensor
    marginal_log_probs: Tensor

    def extended(self, other: "GradientPair") -> "GradientPair":
        """With the tokens that follow; this one's gradients are added to in place."""
        _add(self.a, other.a)
        _add(self.b, other.b)
        log_probs = torch.cat([self.log_probs, other.log_probs])
        return GradientPair(self.a, self.b, log_probs, torch.cat([self.marginal_log_probs, other.marginal_log_probs]))


@dataclass(frozen=True)
class Part:
    """Some tokens of a response, and the products of their gradients."""

    tokens: int
    products: Products


@dataclass(frozen=True)
class ResponseAlignment:
    """Of one response: its number in the rollout, its products, its log-probs summed over tokens, and, where asked for,
    its parts by position (``1_of_4``) and by probability (``0.5_to_0.9``); one without tokens or gradient is left out.
    """

    number: int
    products: Products
    log_prob: float
    marginal_log_prob: float
    by_position: dict[str, Part] = field(default_factory=dict)
    by_probability: dict[str, Part] = field(default_factory=dict)


def positions(length: int, bins: int) -> dict[str, np.ndarray]:
    """(length,) bool each: which tokens of a response are in the first of so many equal stretches, and so on."""
    at = np.arange(length) * bins // max(1, length)
    return {f"{i + 1}_of_{bins}": at == i for i in range(bins)}


def probabilities(log_probs: Tensor) -> dict[str, np.ndarray]:
    """(T,) bool each: which of (T,) tokens are in each bin between EDGES."""
    at = np.searchsorted(EDGES[1:-1], log_probs.double().exp().numpy(), side="right")
    return {f"{low:g}_to_{high:g}": at == i for i, (low, high) in enumerate(pairwise(EDGES))}


def _add(total: Gradient, gradient: Gradient, weight: float = 1.0) -> None:
    for key, value in gradient.items():
        if key in total:
            total[key].add_(value, alpha=weight)
        else:
            total[key] = value * weight


def comparison_bytes(parameters: int, sketch: int | None, bins: int) -> int:
    """What `GradientComparison` holds at a time beside the weights, of a rank's number of them: see above."""
    exact = sketch == 0 or (sketch is None and parameters <= EXACT_PARAMETERS)
    return 4 * parameters * (6 if bins else 4) if exact else 0


def layer_groups(policy: Policy) -> dict[str, str]:
    """Parameter name -> one of GROUPS: the blocks in thirds, and what is in front of and behind them. Tied weights are
    ``embedding``."""
    names = [name for name, _ in policy.named_parameters()]
    block = {name: int(m.group(1)) for name in names if (m := re.search(r"\.(\d+)\.", name))}
    n_blocks = max(block.values(), default=0) + 1
    input_embedding = policy.model.get_input_embeddings().weight
    found = {}
    for name, parameter in policy.named_parameters():
        if name in block:
            found[name] = GROUPS[1 + 3 * block[name] // n_blocks]
        else:
            early = parameter is input_embedding or "embed" in name or "wte" in name or "wpe" in name
            found[name] = "embedding" if early else "head"
    return found


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape. Piece by piece: fp32 sums over many millions lose up to 1 % on a
    CPU."""
    pieces = zip(a.flatten().split(1 << 16), b.flatten().split(1 << 16), strict=True)
    return float(torch.stack([torch.dot(x, y) for x, y in pieces]).double().sum()) if a.numel() else 0.0


class GradientComparison:
    """Compares gradients of ``policy``; its ``grad`` fields are used and left empty.

    Collective under FSDP2: all ranks measure the same responses together.

    Args:
        sketch: buckets of a sketch of each layer group's gradient; 0: exact.
        device: that the policy computes on; None: its own.
    """

    def __init__(self, policy: Policy, sketch: int | None = None, device: torch.device | None = None) -> None:
        self.policy, self.groups = policy, layer_groups(policy)
        parameters = list(policy.parameters())
        self.device = device or policy.device
        self.sharded = isinstance(parameters[0], DTensor)
        n_local = sum(local_piece(p)[0].numel() for p in parameters if p.requires_grad)
        self.sketch = sketch if sketch is not None else 0 if n_local <= EXACT_PARAMETERS else SIZE

    def responses(
        self, rollout: Rollout, numbers: Sequence[int], weights: Mapping[int, float], prefix_id: int, bins: int = 0
    ) -> tuple[list[ResponseAlignment], Products]:
        """Of each response; and of the two sums over them of weight * gradient, the policy gradients.

        Args:
            numbers: of the responses, each with at least one token.
            weights: by number, advantages.
            prefix_id: the token in front of y in log p(y).
            bins: also of so many stretches of each response, and of its tokens by probability; 0: not.
        """
        sums: tuple[Gradient, Gradient] = ({}, {})
        found = [self._response(rollout, number, prefix_id, bins, sums, weights[number]) for number in numbers]
        return found, Products(*self._sums(*sums))

    def _response(
        self,
        rollout: Rollout,
        number: int,
        prefix_id: int,
        bins: int,
        sums: tuple[Gradient, Gradient],
        weight: float,
    ) -> ResponseAlignment:
        """Its gradients are added to ``sums``, and gone when the next one's are made."""
        ids = rollout.sequences[number]
        prompt = rollout.contexts[int(rollout.group_ids[number])]
        pair = partial(self.pair, prompt, prefix_id, ids, rollout.temperature)
        parts: tuple[dict[str, Part], dict[str, Part]] = ({}, {})
        whole: GradientPair | None = None
        for name, tokens in positions(len(ids), max(1, bins)).items():
            if tokens.any():
                stretch = pair(tokens)
                parts[0][name] = Part(int(tokens.sum()), self.products(stretch))
                whole = whole.extended(stretch) if whole else stretch
                del stretch
        assert whole is not None
        if bins:
            for name, tokens in probabilities(whole.log_probs).items():
                if tokens.any():
                    parts[1][name] = Part(int(tokens.sum()), self.products(pair(tokens)))
        of_whole = self.products(whole) if bins else parts[0].pop("1_of_1").products
        for total, gradient in zip(sums, (whole.a, whole.b), strict=True):
            _add(total, gradient, weight)
        log_prob, marginal = float(whole.log_probs.sum()), float(whole.marginal_log_probs.sum())
        able = [{k: p for k, p in some.items() if math.isfinite(p.products.cosine)} for some in parts]
        return ResponseAlignment(number, of_whole, log_prob, marginal, *able)

    def pair(
        self,
        prompt: Sequence[int] | np.ndarray,
        prefix_id: int,
        ids: np.ndarray,
        temperature: float,
        tokens: np.ndarray | None = None,
    ) -> GradientPair:
        """Both gradients of one response, or of some of its tokens: (len(ids),) bool, at least one; None: all."""
        log_probs, a = self._gradient(prompt, ids, temperature, tokens)
        marginal, b = self._gradient((prefix_id,), ids, temperature, tokens)
        return GradientPair(a, b, log_probs, marginal)

    def products(self, pair: GradientPair) -> Products:
        return Products(*self._sums(pair.a, pair.b))

    def _gradient(
        self, context: Sequence[int] | np.ndarray, ids: np.ndarray, temperature: float, tokens: np.ndarray | None = None
    ) -> tuple[Tensor, Gradient]:
        chosen = np.arange(len(ids)) if tokens is None else np.flatnonzero(tokens)
        ids = ids[: chosen[-1] + 1]  # what follows them has no part in their log-probs
        family = Family(np.asarray(context), (0,), (len(ids),))
        batch = micro_batches([family], Sequences.of([ids]), 1, packed=False)[0]
        some = torch.from_numpy(chosen)
        batch = replace(batch, **{k: getattr(batch, k)[some] for k in ("predictors", "targets", "sequence", "source")})
        self.policy.zero_grad(set_to_none=True)
        log_probs, _ = self.policy(batch.to(self.device), temperature)
        log_probs.sum().backward()
        found: Gradient = {}
        if not self.sketch:
            found = {name: local_piece(gradient)[0].float() for name, _, gradient in self._gradients()}
        else:
            home = next(self.policy.parameters()).device
            sketches = {group: Sketch(self.sketch, home) for group in dict.fromkeys(self.groups.values())}
            start = 0
            for name, parameter, gradient in self._gradients():
                piece, offset = local_piece(gradient)
                sketches[self.groups[name]].add(piece, start + offset)
                start += parameter.numel()
            found = {group: sketch.sums for group, sketch in sketches.items()}
        self.policy.zero_grad(set_to_none=True)
        return log_probs.detach().cpu(), found

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, parameter in self.policy.named_parameters():
            if parameter.grad is not None:
                yield name, parameter, parameter.grad

    def _sums(self, a: Gradient, b: Gradient) -> Tensor:
        """(3, groups): of a with itself, of b with itself, of a with b."""
        sums = torch.zeros(3, len(GROUPS), dtype=torch.float64)
        for i, (left, right) in enumerate(((a, a), (b, b), (a, b))):
            for key in left.keys() & right.keys():
                group = GROUPS.index(self.groups.get(key, key))
                sums[i, group] += dot(left[key], right[key])
        return ranks.all_reduce(sums) if self.sharded else sums
