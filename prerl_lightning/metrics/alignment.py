"""Do the two spaces pull the same way? Gradients of log p(y) and log p(y given x), compared response by response.

arXiv 2604.14142 rests on their inner product not being negative. A gradient is that of the sum over the response's
tokens, with respect to all weights, at sampling temperature. Up to EXACT_PARAMETERS weights a rank, gradients are
compared as they are, which takes four copies of them; above that as sketches (metrics/sketch.py), which take no memory
to speak of and have the error said there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ResponseAlignment:
    """Of one response: its number in the rollout, its products, and its log-probs summed over tokens."""

    number: int
    products: Products
    log_prob: float
    marginal_log_prob: float


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
        device: that the policy computes on; None: where its weights lie.
    """

    def __init__(self, policy: Policy, sketch: int | None = None, device: torch.device | None = None) -> None:
        self.policy, self.groups = policy, layer_groups(policy)
        parameters = list(policy.parameters())
        self.device = device or parameters[0].device
        self.sharded = isinstance(parameters[0], DTensor)
        n_local = sum(local_piece(p)[0].numel() for p in parameters)
        self.sketch = sketch if sketch is not None else 0 if n_local <= EXACT_PARAMETERS else SIZE

    def responses(
        self, rollout: Rollout, numbers: Sequence[int], weights: Mapping[int, float], prefix_id: int
    ) -> tuple[list[ResponseAlignment], Products]:
        """Of each response; and of the two sums over them of weight * gradient, the policy gradients.

        Args:
            numbers: of the responses, each with at least one token.
            weights: by number, advantages.
            prefix_id: the token in front of y in log p(y).
        """
        found: list[ResponseAlignment] = []
        sums: tuple[Gradient, Gradient] = ({}, {})
        for number in numbers:
            ids = rollout.sequences[number]
            prompt = rollout.contexts[int(rollout.group_ids[number])]
            log_prob, a = self._gradient(prompt, ids, rollout.temperature)
            marginal, b = self._gradient((prefix_id,), ids, rollout.temperature)
            found.append(ResponseAlignment(number, self._products(a, b), log_prob, marginal))
            for total, gradient in zip(sums, (a, b), strict=True):
                for key, value in gradient.items():
                    if key in total:
                        total[key].add_(value, alpha=weights[number])
                    else:
                        total[key] = value * weights[number]
        return found, self._products(*sums)

    def _gradient(
        self, context: Sequence[int] | np.ndarray, ids: np.ndarray, temperature: float
    ) -> tuple[float, Gradient]:
        family = Family(np.asarray(context), (0,), (len(ids),))
        batch = micro_batches([family], Sequences.of([ids]), 1, packed=False)[0]
        self.policy.zero_grad(set_to_none=True)
        log_probs, _ = self.policy(batch.to(self.device), temperature)
        log_probs.sum().backward()
        found: Gradient = {}
        if not self.sketch:
            found = {name: local_piece(gradient)[0].float() for name, _, gradient in self._gradients()}
        else:
            sketches = {group: Sketch(self.sketch, self.device) for group in dict.fromkeys(self.groups.values())}
            start = 0
            for name, parameter, gradient in self._gradients():
                piece, offset = local_piece(gradient)
                sketches[self.groups[name]].add(piece, start + offset)
                start += parameter.numel()
            found = {group: sketch.sums for group, sketch in sketches.items()}
        self.policy.zero_grad(set_to_none=True)
        return float(log_probs.detach().sum()), found

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, parameter in self.policy.named_parameters():
            if parameter.grad is not None:
                yield name, parameter, parameter.grad

    def _products(self, a: Gradient, b: Gradient) -> Products:
        sums = torch.zeros(3, len(GROUPS), dtype=torch.float64)
        for i, (left, right) in enumerate(((a, a), (b, b), (a, b))):
            for key in left.keys() & right.keys():
                group = GROUPS.index(self.groups.get(key, key))
                sums[i, group] += dot(left[key], right[key])
        return Products(*(ranks.all_reduce(sums) if self.sharded else sums))
