"""Does `Policy` compute what the model computes? Seen at load, by the model's own logits, and not looked up.

A few tokens go through the model as it stands, sequence by sequence, and then through `Policy`: side by side with
padding, and in packs. What differs is mended where it can be (a scale or a cap on the logits; padding instead of
packs), else the model is refused.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.policy import attention
from prerl_lightning.policy.packing import Family, MicroBatch, micro_batches
from prerl_lightning.types import Sequences

if TYPE_CHECKING:
    from prerl_lightning.policy.model import Policy

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # nats, in fp32; a state that leaks or a scale left out makes 0.1 and more

# under which model families put a scale on their logits, which some multiply by and some divide by, and a soft cap
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")


@dataclass(frozen=True)
class _WatchedPlan(attention.AttentionPlan):
    """Notes heads of queries and of keys, and their sizes."""

    plan: attention.AttentionPlan
    shapes: set[tuple[int, int, int, int]]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        self.shapes.add((query.shape[1], key.shape[1], query.shape[2], value.shape[2]))
        return self.plan.attend(query, key, value, scaling)


class Probe:
    """Three short responses, two of them behind one context, and what the model itself makes of them."""

    def __init__(self, policy: "Policy") -> None:
        self.policy = policy
        vocab = policy.model.config.get_text_config().vocab_size
        tokens = [(5 + 7 * i) % vocab for i in range(24)]
        self.contexts = Sequences.of([tokens[:5], tokens[5:6]])
        self.responses = Sequences.of([tokens[6:12], tokens[12:16], tokens[16:24]])
        self.families = [
            Family(self.contexts[0], (0, 1), (6, 4), shared=True),
            Family(self.contexts[1], (2,), (8,)),
        ]

    def own(self) -> Tensor:
        """(18,) log-probs by the model's own logits, one sequence at a time."""
        found = []
        for family in self.families:
            for number in family.numbers:
                response = torch.from_numpy(self.responses[number]).long()
                ids = torch.cat([torch.from_numpy(family.context).long(), response])
                logits = self.policy.logits(ids[None].to(self.policy.device))[0].cpu()
                log_probs = logits[len(family.context) - 1 : -1].double().log_softmax(-1)
                found.append(log_probs.gather(1, response[:, None])[:, 0])
        return torch.cat(found).float()

    def padded(self) -> Tensor:
        (batch,) = micro_batches(self.families, self.responses, 64, packed=False)
        return self._in_order(batch)

    def packed(self, shapes: set[tuple[int, int, int, int]] | None = None) -> Tensor:
        """With ``shapes``, which gets those of the attention's heads, two responses share one pass over the context."""
        made = self.families
        if shapes is None:
            made = [
                Family(f.context, (number,), (length,))
                for f in made
                for number, length in zip(f.numbers, f.lengths, strict=True)
            ]
        (batch,) = micro_batches(made, self.responses, 64)
        if shapes is not None:
            assert batch.plan is not None
            batch = replace(batch, plan=_WatchedPlan(batch.plan, shapes))
        return self._in_order(batch)

    def _in_order(self, batch: MicroBatch) -> Tensor:
        values = self.policy(batch.to(self.policy.device))[0].cpu()
        return torch.empty_like(values).index_copy_(0, batch.source, values)


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference in nats, where it is too large, else 0."""
    worst = float((a - b).abs().max()) if a.isfinite().all() and b.isfinite().all() else float("inf")
    return 0.0 if torch.allclose(a, b, rtol=1e-4, atol=TOLERANCE) else worst


@torch.no_grad()
def prepare(policy: "Policy") -> None:
    """Choose how ``policy`` computes its logits and whether it packs.

    Raises:
        InputError: it would not give what the model itself gives.
    """
    model, probe = policy.model, Probe(policy)
    name = type(model).__name__
    before = model.config._attn_implementation
    if before.startswith("flash_attention"):  # has no kernel on the CPU
        _set_attention(policy, "sdpa")
    try:
        versions = [p._version for p in model.parameters()]
        own, again = _tried(name, probe.own), _tried(name, probe.own)
        if versions != [p._version for p in model.parameters()]:
            raise InputError(f"model: a forward pass of {name} changes its weights, so it cannot be trained here.")
        if worst := far(own, again):
            raise InputError(
                f"model: {name} gives other logits each time (up to {worst:.2g} nats apart), with training switched "
                "off: something in it draws random numbers, so its log-probs are not those of its samples."
            )
        _choose_head(policy, probe, own)
        reason = _why_not_packed(policy, probe, own, before)
    finally:
        if before.startswith("flash_attention"):
            _set_attention(policy, before)
    if reason:
        policy.can_pack = policy.can_share = False
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        log.warning(
            "Responses are padded to the longest of a micro-batch instead of packed, which costs the passes over "
            "the padding, and one over the prompt for each response: %s: %s",
            *(name, reason),
        )


def _tried(name: str, forward: Callable[[], Tensor]) -> Tensor:
    try:
        return forward()
    except Exception as error:  # whatever a model's code stumbles over
        raise InputError(
            f"model: {name} cannot be trained here: a forward pass over a few tokens ends with {in_one_line(error)}"
        ) from error


def _choose_head(policy: "Policy", probe: Probe, own: Tensor) -> None:
    """The scale and the cap on the logits with which ``policy`` agrees with the model."""
    config = policy.model.config.get_text_config()
    scales = [1.0]
    for value in (getattr(config, name, None) for name in SCALES):
        if isinstance(value, int | float) and value > 0:
            scales += [float(value), 1 / value]
    caps = [None, *(float(c) for c in (getattr(config, name, None) for name in CAPS) if c)]
    found = []
    for scale, cap in product(dict.fromkeys(scales), caps) if policy.chunked_head else [(1.0, None)]:
        policy.logit_scale, policy.logit_softcap = scale, cap
        ours = _tried(type(policy.model).__name__, probe.padded)
        found.append((float((ours - own).abs().max()), far(ours, own), scale, cap))
    # the nearest: small logits, as of a model that is not trained yet, hardly show what a cap does to large ones
    _, nearest, policy.logit_scale, policy.logit_softcap = min(found, key=lambda f: f[0])
    if not nearest:
        return
    mend = (
        "The model changes its logits, or its last hidden states, in a way that is not known here. Give "
        "model.init_args.chunked_head: false: then its own logits are used, which takes memory for tokens x "
        "vocabulary."
        if policy.chunked_head
        else "The model is not causal, or keeps something between sequences."
    )
    raise InputError(
        f"model: {type(policy.model).__name__} would be trained wrongly: log-probs of padded sequences differ by up to "
        f"{nearest:.2g} nats from those by the model's own logits. {mend}"
    )


def _why_not_packed(policy: "Policy", probe: Probe, own: Tensor, implementation: str) -> str:
    """Switch to packs; else the reason why not."""
    config = policy.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = [name for name in WINDOWS if not kinds and getattr(config, name, None)]
    flash = implementation.startswith("flash_attention")
    if not flash and implementation != "sdpa":
        return f"its attention is {implementation}"
    if not flash and (kinds - {"full_attention"} or windows):
        return f"not all of its layers have full attention ({', '.join(sorted(kinds) or windows)})"
    try:
        policy.can_pack, policy.can_share = True, not flash
        if flash:
            # transformers cuts a row into sequences where its positions restart, in SDPA's masks too: what differs
            # there is a state (of a convolution, of a recurrence) that goes on
            together = probe.packed()
        else:
            policy.model.set_attn_implementation(attention.NAME)
            together = probe.packed(policy.head_shapes)
    except Exception as error:  # whatever a model's code stumbles over
        return in_one_line(error, 200)
    worst = far(together, own)
    return f"packed sequences come out differently, by up to {worst:.2g} nats" if worst else ""


def _set_attention(policy: "Policy", implementation: str) -> None:
    """Without transformers' check whether the kernel's package is there: it has passed that already."""
    config: Any = policy.model.config
    config._attn_implementation = implementation


def fix_rotary(policy: "Policy", longest: int | None) -> None:
    """Keep rotary frequencies from depending on the longest sequence of a micro-batch: they become those with which
    vLLM samples sequences of up to ``longest`` tokens (None: the model's own limit).

    Source: transformers' `dynamic_rope_update`; vLLM's Phi3LongRoPEScaledRotaryEmbedding and
    DynamicNTKScalingRotaryEmbedding.

    Raises:
        InputError: there is no such fixed choice.
    """
    name, config = type(policy.model).__name__, policy.model.config.get_text_config()
    for module in policy.model.modules():
        rotary: Any = module
        kind = getattr(rotary, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if not any(k == "longrope" or "dynamic" in str(k) for k in kinds):
            continue
        if isinstance(kind, dict):
            raise InputError(f"model: {name}: rotary frequencies of kind {kind} are not known here.")
        limit = config.max_position_embeddings
        if kind == "longrope":
            limit = config.rope_parameters["original_max_position_embeddings"]
        if (longest or config.max_position_embeddings) > limit:
            if kind != "longrope":
                raise InputError(
                    f"model: beyond {limit} tokens {name} has rotary frequencies that depend on the longest sequence "
                    f"of a batch, and vLLM samples with others. Give data.engine.init_args.max_model_len: {limit} or "
                    "less."
                )
            rotary(torch.zeros(1), torch.tensor([[limit]]))  # from now on it has the long factors
        rotary.rope_type = "fixed"
