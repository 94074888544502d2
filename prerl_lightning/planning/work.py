"""What a step computes and moves, and about how long that takes on a GPU that is known: arithmetic with assumptions.

Of a rollout every response is as long as is said, and every one contributes: what a step takes at most. Tokens are cut
into passes by the functions that cut those of a run.
"""

import math
from dataclasses import dataclass

import numpy as np

from prerl_lightning.budget import KEYS_PER_TOKEN, ModelShape, Strategy, kv_bytes_per_token
from prerl_lightning.errors import InputError, nearest
from prerl_lightning.metrics.utilisation import PEAK_FLOPS, TrainingFlops
from prerl_lightning.objectives.objective import BaseObjective
from prerl_lightning.policy.packing import Family, families
from prerl_lightning.rollout.engine import EngineSizes
from prerl_lightning.types import Sequences

# what is reached of the card's figures
TRAINING, PREFILL, BANDWIDTH, LINK = 0.4, 0.5, 0.6, 0.6
NODE = 8  # GPUs
BETWEEN_NODES = 50e9  # bytes a second and GPU: 400 Gb/s


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Args:
        name: the driver's, as in `PEAK_FLOPS`.
        gib: that are free on an empty one: a little less than is sold.
        bandwidth: of its memory, bytes a second.
        link: to the other GPUs of a node, bytes a second and direction.
    """

    name: str
    gib: float
    bandwidth: float
    link: float

    @property
    def flops(self) -> float:
        return PEAK_FLOPS[self.name]

    @property
    def sequences(self) -> int:
        """vLLM 0.32 decodes so many at a time, where max_num_seqs does not say."""
        return 1024 if self.gib >= 70 and "A100" not in self.name else 256


CARDS = {
    "B200": Card("NVIDIA B200", 178.0, 8.0e12, 900e9),
    "H200": Card("NVIDIA H200", 139.0, 4.8e12, 450e9),
    "H100": Card("NVIDIA H100 80GB HBM3", 78.5, 3.35e12, 450e9),
    "H100-PCIe": Card("NVIDIA H100 PCIe", 78.5, 2.0e12, 64e9),
    "A100": Card("NVIDIA A100-SXM4-80GB", 78.5, 2.0e12, 300e9),
    "A100-40": Card("NVIDIA A100-SXM4-40GB", 39.0, 1.55e12, 300e9),
    "L40S": Card("NVIDIA L40S", 44.0, 0.86e12, 32e9),
    "A40": Card("NVIDIA A40", 44.0, 0.70e12, 32e9),
    "A10": Card("NVIDIA A10", 21.8, 0.60e12, 32e9),
    "L4": Card("NVIDIA L4", 21.8, 0.30e12, 32e9),
    "RTX3090": Card("NVIDIA GeForce RTX 3090", 23.3, 0.94e12, 32e9),
    "RTX4090": Card("NVIDIA GeForce RTX 4090", 23.3, 1.0e12, 32e9),
    "RTX5090": Card("NVIDIA GeForce RTX 5090", 31.0, 1.8e12, 64e9),
}


def card(name: str) -> Card:
    """Raises InputError for one that is not known."""
    known = {key.lower(): key for key in CARDS}
    if (key := known.get(name.lower().replace(" ", ""))) is None:
        raise InputError(f"prerl plan: --gpu {name}: not known.{nearest(name, CARDS)} There are {', '.join(CARDS)}.")
    return CARDS[key]


@dataclass(frozen=True)
class Rollouts:
    """Sizes of a step's rollout.

    Args:
        prompts: of all ranks; each of ``prompt`` tokens, with ``group`` responses of ``response`` tokens.
    """

    prompts: int
    prompt: int
    group: int
    response: int

    @property
    def sampled(self) -> int:
        return self.prompts * self.group * self.response


@dataclass(frozen=True)
class Work:
    """Of one step, all ranks together.

    Args:
        tokens: input tokens that are trained on, as often as they are; ``once``: of one pass over the rollout.
        passes: of a rank that have a backward pass.
        sampling: FLOPs; ``training``: those of the model alone, as train/mfu counts them.
        recomputed: of which FLOPs are done once more, for gradient checkpointing.
        sent: bytes that a rank receives from others, weights for the engine included.
    """

    tokens: int
    once: int
    passes: int
    sampling: float
    training: float
    recomputed: float
    sent: float


def _families(life: BaseObjective, rollouts: Rollouts, space: str, max_tokens: int, keys: bool) -> list[Family]:
    """Of one prompt."""
    n, batching = rollouts.group, life.batching
    share = batching.packing and batching.share_prompts and batching.micro_batch_size is None and space != "pre-train"
    context = np.zeros(1 if space == "pre-train" else rollouts.prompt, dtype=np.int64)
    responses = Sequences.of([np.zeros(rollouts.response, dtype=np.int64)] * n)
    most_keys = KEYS_PER_TOKEN * max_tokens if keys else None
    return families(Sequences.of([context]), [0] * n, responses, range(n), share, max_tokens, most_keys)


def _attended(family: Family) -> int:
    """Tokens that the family's input tokens attend to, themselves included."""

    def up_to(tokens: int) -> int:
        return tokens * (tokens + 1) // 2

    context = len(family.context)
    ends = [up_to(context + length - 1) for length in family.lengths]
    return up_to(context) + sum(end - up_to(context) for end in ends) if family.shared else sum(ends)


def step_tokens(life: BaseObjective, rollouts: Rollouts, max_tokens: int, on_gpu: bool) -> int:
    """Input tokens of one pass over a rollout, all terms together."""
    each = [_families(life, rollouts, term.space, max_tokens, on_gpu) for term in life.terms]
    return rollouts.prompts * sum(family.n_tokens for made in each for family in made)


def work(
    life: BaseObjective,
    shape: ModelShape,
    rollouts: Rollouts,
    strategy: Strategy,
    world_size: int,
    precision: str,
    max_tokens: int,
    recompute: int,
    on_gpu: bool,
) -> Work:
    """Of a step in this life, in packs of ``max_tokens``."""
    flops, steps = TrainingFlops(shape), life.batching
    tokens, passes, training = 0, 0, 0.0
    more = (steps.steps > 1) + (life.loss.kl_coefficient > 0)  # forward passes: old log-probs, the reference's
    for term in life.terms:
        made = _families(life, rollouts, term.space, max_tokens, on_gpu)
        size = rollouts.prompts * sum(family.n_tokens for family in made)
        attended = rollouts.prompts * sum(map(_attended, made))
        tokens += size
        passes += steps.steps * math.ceil(size / (world_size * steps.minibatches * max_tokens))
        forward = flops.forward(size, attended, rollouts.sampled)
        training += steps.epochs * flops.training(size, attended, rollouts.sampled) + more * forward
    sampled, prompts = rollouts.sampled, rollouts.prompts * rollouts.prompt
    context = rollouts.prompts * rollouts.group * rollouts.response * (rollouts.prompt + rollouts.response / 2)
    sampling = flops.forward(prompts + sampled, context + prompts * rollouts.prompt / 2, sampled)
    size, others = (2 if precision.endswith("mixed") else 4), (world_size - 1) / world_size
    if strategy == "fsdp2":  # weights for each forward and backward pass, and fp32 gradients; the engine's weights
        sent = others * shape.parameters * (passes * (2 * size + 4) + 2)
    else:  # gradients there and back
        sent = others * shape.parameters * 8.0 * steps.steps
    return Work(
        *(tokens * steps.epochs, tokens, passes, sampling, training),
        recomputed=training / 3 / recompute if recompute else 0.0,
        sent=sent,
    )


@dataclass(frozen=True)
class Seconds:
    sampling: float
    training: float
    at_a_time: int

    @property
    def step(self) -> float:
        return self.sampling + self.training


def seconds(
    gpu: Card, found: Work, shape: ModelShape, rollouts: Rollouts, world_size: int, engine: EngineSizes
) -> Seconds:
    """Of a step on so many of this card; what verifiers, the optimizer and the engine's update take is not in it."""
    own = rollouts.prompts * rollouts.group / world_size
    length, token = rollouts.prompt + rollouts.response, kv_bytes_per_token(shape)
    at_a_time = max(1, int(min(own, engine.sequences or gpu.sequences, engine.kv_tokens // length or own)))
    read = engine.weights + at_a_time * token * (rollouts.prompt + rollouts.response / 2)
    decoding = 2.0 * (TrainingFlops(shape).body + TrainingFlops(shape).head) * at_a_time
    each = max(read / (BANDWIDTH * gpu.bandwidth), decoding / (PREFILL * gpu.flops))
    prefill = 2.0 * TrainingFlops(shape).body * rollouts.prompts * rollouts.prompt / world_size
    sampling = math.ceil(own / at_a_time) * rollouts.response * each + prefill / (PREFILL * gpu.flops)
    computing = (found.training + found.recomputed) / (world_size * TRAINING * gpu.flops)
    link = LINK * gpu.link if world_size <= NODE else BETWEEN_NODES * LINK
    return Seconds(sampling, max(computing, found.sent / link), at_a_time)
