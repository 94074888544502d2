"""The arithmetic of bytes: what a model takes in vLLM's cache, on disk, in training and for a pack. Pure.

The formulas are read off Llama-like decoders as transformers computes them, with attention that keeps no tokens x
tokens matrix (not ``eager``), and tests/test_budget.py holds them against what autograd keeps. Other decoders mostly
keep less; for a mixture of experts they are a bound. State-space layers and CPU offload are left out.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prerl_lightning.errors import InputError
from prerl_lightning.policy.head import block_elements, block_rows
from prerl_lightning.policy.lora import Adapters, Lora

Strategy = Literal["single", "ddp", "fsdp2"]

GIB = 1 << 30
MOST_TOKENS, STEP = 16384, 1024  # of a pack
LEAST_TOKENS = 8192  # of a pack, before activations are recomputed to make it larger
KEYS_PER_TOKEN = 2  # of a pack, at most: responses that share a prompt's pass have its keys and values each for itself
PADDING = 1.15  # rows for a token in padded attention calls
MARGIN = 1.1  # the allocator's fragments


@dataclass(frozen=True)
class ModelShape:
    """What the sizes follow from.

    Args:
        parameters: tied ones once.
        block_parameters: those of all layers; the rest is embedding, last norm and head.
        intermediate: width of the MLP; of a mixture of experts, of all that one token goes through.
        experts: that one token goes through; 0: no mixture.
        norms: of a layer, over the hidden size; ``qk_norm``: queries and keys have theirs too.
        whole_logits: all at once, by the model itself (``chunked_head: false``).
        adapters: parameters of LoRA's, which alone are trained; 0: all are.
        frozen_bytes: of the weights that are not.
        entropy: of the next token, with its gradient, is in the loss.
        idle_parameters: of experts that one token does not go through.
    """

    parameters: int
    block_parameters: int
    largest_block: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0
    norms: int = 2
    qk_norm: bool = False
    softcap: bool = False
    whole_logits: bool = False
    entropy: bool = False
    idle_parameters: int = 0
    adapters: int = 0
    frozen_bytes: int = 0

    @property
    def trained(self) -> int:
        """Parameters with gradients and moments."""
        return self.adapters or self.parameters

    @classmethod
    def of_config(cls, config: PretrainedConfig, lora: Lora | None = None) -> "ModelShape":
        """Of the language model, where there are more parts; built on the meta device. ValueError: no causal LM;
        InputError: it has not the layers that ``lora`` targets."""
        config = deepcopy(config.get_text_config())
        with torch.device("meta"):
            # as `policy.model.load_model` has it, whatever its files are in
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

        def known(*names: str, default: int = 0) -> int:  # the largest, where layers differ
            value: Any = next((v for v in (getattr(config, name, None) for name in names) if v), default)
            return max(value) if isinstance(value, list | tuple) else value

        layers, hidden = config.num_hidden_layers, config.hidden_size
        heads = known("num_attention_heads", default=1)  # of state-space layers none, left out as they are
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        norms = {n: p for n, p in blocks[-1].named_parameters() if n.endswith("norm.weight")}
        of_queries = [n for n in norms if any(k in n for k in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"))]
        dense = known("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", default=4 * hidden)
        experts, width = known("num_experts_per_tok"), known("moe_intermediate_size", default=dense)
        routed = (experts + known("n_shared_experts")) * width + known("shared_expert_intermediate_size")
        parameters = sum(p.numel() for p in model.parameters())
        adapters = sum(p.numel() for p in Adapters(model, lora).parameters().values()) if lora else 0
        return cls(
            *(parameters, sum(sizes), max(sizes)),
            *(layers, hidden, max(dense, routed) if experts else dense),
            *(heads, known("num_key_value_heads", default=heads), known("head_dim", default=hidden // heads)),
            *(config.vocab_size, model.get_output_embeddings().weight is model.get_input_embeddings().weight),
            experts=experts,
            norms=max(2, sum(p.shape == (hidden,) for n, p in norms.items() if n not in of_queries)),
            qk_norm=bool(of_queries),
            softcap=bool(getattr(config, "final_logit_softcapping", None)),
            adapters=adapters,
            frozen_bytes=sum(p.nbytes for p in model.parameters() if not p.requires_grad),
            idle_parameters=idle_parameters(model),
        )


def idle_parameters(model: PreTrainedModel) -> int:
    """Of a mixture's experts, those that one token does not go through, as many as there are parameters in them."""
    config = model.config.get_text_config()
    number = next(
        (n for k in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, k, 0))), 0
    )
    held = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if number else 0
    return held - held * getattr(config, "num_experts_per_tok", number) // number if held else 0


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: int = 2) -> int:
    """Of vLLM's cache; a bound where layers share keys or compress them."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype_bytes


def checkpoint_bytes(shape: ModelShape, copies: int = 0, weights_only: bool = False) -> int:
    """On disk: what is trained, in fp32, and 1 % for the rest; unless ``weights_only`` Adam's two moments too, and the
    ``copies`` that lives keep beside."""
    return shape.trained * 4 * (1 if weights_only else 3 + copies) * 101 // 100


@dataclass(frozen=True)
class TrainingBytes:
    """What a rank holds beside its pack. ``buckets``: DDP's second copy of the gradients; ``gathered``: what FSDP2 has
    whole at one time, a bound that is not measured."""

    weights: int
    gradients: int
    moments: int
    copies: int
    buckets: int
    gathered: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def training_bytes(
    shape: ModelShape, strategy: Strategy, world_size: int, precision: str, copies: int = 0
) -> TrainingBytes:
    """fp32 weights, gradients and two Adam moments of what is trained, and the frozen weights; ``copies``: of what is
    trained, that a life keeps beside, such as a KL reference.

    DDP has buckets unless made with ``gradient_as_bucket_view=True``, which neither Lightning nor torch does unasked.
    FSDP2 has whole: embedding and head and their gradients; of the layers one, its successor twice (as received, and
    cut into parameters), and the gradients of one, also in fp32.
    """
    sharing = world_size if strategy == "fsdp2" else 1
    own, frozen = 4 * shape.trained // sharing, shape.frozen_bytes // sharing
    size, ends = _size(precision), shape.parameters - shape.block_parameters
    gathered = 2 * size * ends + (4 * size + 4) * shape.largest_block if strategy == "fsdp2" else 0
    return TrainingBytes(own + frozen, own, 2 * own, own * copies, own * (strategy == "ddp"), gathered)


def recomputed_layers(shape: ModelShape, checkpointing: int) -> int:
    """How many: with True all, with a number n every n-th."""
    return -(-shape.layers // checkpointing) if checkpointing else 0


def activation_bytes_per_token(shape: ModelShape, precision: str, checkpointing: int, padded: bool = False) -> int:
    """What autograd keeps of an input token, head apart; of layers that ``checkpointing`` recomputes the input, and all
    of one.

    Under autocast the residual stream is fp32, and so is what norms keep; each linear layer keeps a 16-bit copy of its
    input for itself. Under FSDP2, which makes whole layers 16-bit, a bound. ``padded``: attention by padded calls, as
    in fp32, instead of the kernel for variable lengths (policy/attention.py).
    """
    layer = _layer_bytes(shape, precision, padded)
    ends = 8 * shape.hidden + 4 + 8 * shape.head_dim + 16  # last norm, rotary positions, ids
    recomputed = recomputed_layers(shape, checkpointing)
    inputs = max(0, recomputed - 1)  # that of the one being recomputed is in its own
    return ends + 4 * shape.hidden * inputs + layer * (shape.layers - inputs)


def _layer_bytes(shape: ModelShape, precision: str, padded: bool) -> int:
    size, hidden = _size(precision), shape.hidden
    wide = 4 if shape.experts else size  # autocast does not know the experts' products
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = shape.norms * (8 * hidden + 4)  # of each its input, and that normalised
    inputs = size * hidden * (5 if size == 2 else 2)  # of q, k, v, gate, up
    attention = 2 * size * (queries + KEYS_PER_TOKEN * (queries if padded else keys)) + 4 * shape.heads
    if padded:
        attention = int(PADDING * attention) + size * queries  # its output once more, without padding
    if shape.qk_norm:
        attention += (4 + size) * (queries + keys) + 4 * (shape.heads + shape.kv_heads)
    return norms + inputs + attention + 4 * wide * (shape.intermediate + hidden * shape.experts)


def weight_copy_bytes(shape: ModelShape, precision: str, checkpointing: int = False) -> int:
    """Autocast's 16-bit weights of linear layers. Lightning switches off autocast's cache of them, but autograd keeps
    each from a layer's forward to its backward pass. None in fp32, of what rests in 16 bits, nor under FSDP2, which
    gathers 16 bits."""
    inputs = max(0, recomputed_layers(shape, checkpointing) - 1)
    kept = min(shape.block_parameters, shape.largest_block * (shape.layers - inputs))
    rest_in_16_bits = 0 < shape.frozen_bytes < 4 * shape.parameters
    return 2 * kept if _size(precision) == 2 and not rest_in_16_bits else 0


def head_bytes(shape: ModelShape, tokens: int, on_cpu: bool = False) -> int:
    """The chunked head at its largest (policy/head.py). Either a block's logits and what is made of them; or, with few
    tokens, the gradient of a block's weights. Of the model's own logits a bound."""
    if shape.whole_logits:
        # in 16 bits, in fp32, scaled, their log-softmax, and gradients; what the entropy is made of, and its gradient
        return (35 if shape.entropy else 19) * tokens * shape.vocab
    rows = min(block_rows(tokens, on_cpu), shape.vocab)
    per_logit = (20 if shape.softcap else 8) + (4 if shape.entropy else 0)  # the gradient of the entropy
    block = max(per_logit * tokens, (per_logit - 2) * tokens + 8 * shape.hidden)
    return rows * block + 12 * tokens * shape.hidden


def pack_bytes(
    shape: ModelShape,
    tokens: int,
    precision: str,
    checkpointing: int,
    sharded: bool = False,
    padded: bool = False,
    on_cpu: bool = False,
) -> int:
    """The most that forward and backward passes of packs of 1 to ``tokens`` input tokens take beyond `training_bytes`;
    ``sharded``: under FSDP2; ``padded``: see `activation_bytes_per_token`; ``on_cpu``: by the head's smaller
    blocks."""
    layer = _layer_bytes(shape, precision, padded) if checkpointing else 0
    kept = activation_bytes_per_token(shape, precision, checkpointing, padded) - layer
    passing = layer + max(14 * shape.hidden, 2 * _size(precision) * shape.intermediate)  # and a layer's gradients
    # the fewer tokens, the larger a part of the head is in a block: at the first of these sizes the largest
    sizes = {min(tokens, max(1, block_elements(on_cpu) // min(block_rows(1, on_cpu), shape.vocab))), tokens}
    most = max(n * kept + max(n * passing, head_bytes(shape, n, on_cpu)) for n in sizes)
    if not (sharded or shape.adapters):  # at the end, of the embedding: as large as that, whatever the tokens
        most = max(most, 4 * shape.vocab * shape.hidden)
    return most + (0 if sharded else weight_copy_bytes(shape, precision, checkpointing))


def pass_bytes(shape: ModelShape, tokens: int, precision: str, checkpointing: int, **where: bool) -> int:
    """`pack_bytes`, whose further arguments are ``where``, with `MARGIN`, and as the device has attention."""
    if where.get("on_cpu") or _size(precision) == 4:  # the kernel for variable lengths takes 16 bits, on a GPU
        where["padded"] = True
    return int(MARGIN * pack_bytes(shape, tokens, precision, checkpointing, **where))


@dataclass(frozen=True)
class PackChoice:
    """Input tokens of a pack, whether its activations are recomputed, and the bytes this takes, `MARGIN` included."""

    tokens: int
    checkpointing: int
    bytes: int


def choose_pack(
    shape: ModelShape,
    free_bytes: int,
    longest: int,
    precision: str,
    checkpointing: int | None = None,
    max_tokens: int | None = None,
    sharded: bool = False,
    padded: bool = False,
) -> PackChoice:
    """The largest pack, up to 16,384 tokens, for a GPU with ``free_bytes`` left beside `training_bytes`; with gradient
    checkpointing where fewer than 8,192 tokens fit without. ``sharded`` and ``padded``: see `pack_bytes`.

    ``longest``: tokens of the longest prompt and response; a response is never split. InputError: it does not fit.
    ``checkpointing`` and ``max_tokens``: the user's own, or None. With both given nothing is chosen, and none refused.
    """
    most = max(MOST_TOKENS, -(-longest // STEP) * STEP)
    sizes = [max_tokens] if max_tokens else [n for n in range(most, 0, -STEP) if n >= longest]
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        prefer_more = checkpointing is None and not (recompute or max_tokens)
        for tokens in (n for n in sizes if n >= LEAST_TOKENS or not prefer_more):
            where = {"sharded": sharded, "padded": padded}
            needed = pass_bytes(shape, max(tokens, longest), precision, recompute, **where)
            choice = PackChoice(tokens, recompute, needed)
            if choice.bytes <= free_bytes or (max_tokens and checkpointing is not None):
                return choice
    mends = ["a shorter data.sampling.max_new_tokens"] if free_bytes > 0 else []
    mends += ["model.init_args.gradient_checkpointing: true"] if not choice.checkpointing else []
    mends += ["a smaller model.init_args.max_tokens_per_microbatch"] if (max_tokens or 0) > longest else []
    mends += ["--trainer.strategy fsdp2 with more GPUs", "a smaller model"]
    raise InputError(
        f"GPU memory: a pass over {max(choice.tokens, longest):,} tokens (the longest prompt and response have "
        f"{longest:,}) needs {choice.bytes / GIB:.1f} GiB, and beside weights, gradients and optimizer there are "
        f"{free_bytes / GIB:.1f} GiB. What helps: {'; '.join(mends)}."
    )


# ---------------------------------------------------------------------- a rank's GPU

RESERVED = 3 * GIB  # CUDA's and NCCL's own, and what an engine that sleeps keeps (its CUDA graphs)


@dataclass(frozen=True)
class RankBudget:
    """What the GPU of one rank holds of ``total`` bytes: in a rollout, in a training step, and where a watcher compares
    gradients between two steps (``watching``, its passes included; 0: none does)."""

    total: int
    engine: int
    engine_asleep: int
    held: TrainingBytes
    pack: PackChoice
    watching: int = 0

    @property
    def rollout(self) -> int:
        return RESERVED + self.engine + self.held.total - self.held.gradients - self.held.gathered

    @property
    def step(self) -> int:
        return RESERVED + self.engine_asleep + self.held.total + self.pack.bytes

    @property
    def comparison(self) -> int:
        return self.step - self.pack.bytes - self.held.gradients + self.watching if self.watching else 0

    @property
    def peak(self) -> int:
        return max(self.rollout, self.step, self.comparison)


def rank_budget(
    shape: ModelShape,
    total: int,
    engine: tuple[int, int],
    longest: int,
    strategy: Strategy = "single",
    world_size: int = 1,
    precision: str = "bf16-mixed",
    copies: int = 0,
    checkpointing: int | None = None,
    max_tokens: int | None = None,
    watching: int = 0,
) -> RankBudget:
    """The pack that fits, and all that lies beside it.

    Args:
        total: bytes that are free before anything of the run is loaded.
        engine: what the engine takes in a rollout, and while it sleeps.
        longest: tokens of the longest prompt and response.
        copies: see `training_bytes`.
        watching: what a watcher's gradients take (`objectives.memory.watching`).

    Raises:
        InputError: it does not fit, with what helps.
    """
    held = training_bytes(shape, strategy, world_size, precision, copies)
    sharded = strategy == "fsdp2"
    mends = ["a smaller data.engine.init_args.gpu_memory_utilization"] * (engine[0] > 0)
    free = total - RESERVED - engine[1] - held.total
    if free > 0:
        pack = choose_pack(shape, free, longest, precision, checkpointing, max_tokens, sharded)
        if watching:  # response by response
            watching += pass_bytes(shape, longest, precision, pack.checkpointing, sharded=sharded)
        budget = RankBudget(total, *engine, held, pack, watching)
        if budget.peak <= total:
            return budget
        if budget.rollout > total:
            needed, doing = budget.rollout, f"a rollout ({engine[0] / GIB:.1f} GiB for the engine)"
        else:
            needed, doing = budget.comparison, "comparing gradients"
            mends = ["alignment.every_n_steps: 0, or alignment.sketch: 499979"]
    else:
        needed, doing = total - free, "training, packs aside,"
    raise InputError(
        f"GPU memory: {doing} needs {needed / GIB:.1f} GiB a GPU, of which {held.total / GIB:.1f} for weights, "
        f"gradients and Adam's moments in fp32; {total / GIB:.1f} GiB are free. What helps: "
        f"{'; '.join([*mends, '--trainer.strategy fsdp2 with more GPUs', 'a smaller model'])}."
    )


def _size(precision: str) -> int:
    """Bytes of a number in matrix products."""
    return 2 if precision.endswith("mixed") else 4
