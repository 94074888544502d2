"""Checks of the policy's passes: attention within packs, and gradients however the work is cut. On the first GPU or the
CPU."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.doctor.machine import available_memory
from prerl_lightning.doctor.subject import GIB, Result, Subject, result, skipped
from prerl_lightning.policy.attention import Kernel, varlen_works
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.packing import Family, MicroBatch, families, micro_batches
from prerl_lightning.training import default_precision
from prerl_lightning.types import Sequences


def waited(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds until the device has done it."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    found = call()
    wait()
    return found, time.perf_counter() - start


def random_ids(generator: torch.Generator, length: int, vocabulary: int) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


# ---------------------------------------------------------------------- attention

NEW_SHAPE = 20  # times a shape that was seen before
NEW_SHAPE_SECONDS = 0.2  # more are worth a word


def attention(subject: Subject) -> Result:
    """Packs have new shapes at every step, so a new shape must not cost much more than one that was seen."""
    device, shape = subject.device, subject.shape
    subject.policy(subject.tiny)  # its loading sets what is set of torch's attention
    bf16 = subject.on_gpu and default_precision("auto", None) == "bf16-mixed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim)
    kernel: Kernel = "varlen" if bf16 and varlen_works(device, dtype, *sizes) else "sdpa"
    wanted = 16_000 if subject.on_gpu else 2_000
    packs = [_long_pack(wanted, seed, kernel).to(device) for seed in (1, 2)]
    seconds = []
    for pack in (packs[0], packs[1], packs[1], packs[1]):
        seconds.append(_there_and_back(pack, sizes, device, dtype))
    first, new, again = seconds[0], seconds[1], min(seconds[2:])
    slow = new > NEW_SHAPE * again and new - again > NEW_SHAPE_SECONDS
    mend = (
        "Use the variable-length kernel (--trainer.precision bf16-mixed on a GPU of capability 8.0 or more), or "
        "model.init_args.attn_implementation: flash_attention_2."
    )
    return result(
        "{kernel} in {dtype}, {heads} heads of {size} on {kv_heads}; a pack of {tokens:,} tokens forward and backward: "
        "the first {first_s:.2f} s, a new shape {new_s:.3f} s, again {again_s:.3f} s",
        [mend if slow else ""],
        kernel=kernel,
        dtype=str(dtype).removeprefix("torch."),
        heads=sizes[0],
        size=sizes[2],
        kv_heads=sizes[1],
        tokens=packs[1].input_ids.numel(),
        first_s=first,
        new_s=new,
        again_s=again,
    )


def _long_pack(tokens: int, seed: int, kernel: Kernel) -> MicroBatch:
    """About so many tokens in one pack: prompts with four responses each, of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    mean, groups, each = 100, tokens // 500, 4
    lengths = torch.randint(mean // 2, mean * 3 // 2, (groups * each,), generator=generator).tolist()
    prompts = torch.randint(mean // 2, mean * 3 // 2, (groups,), generator=generator).tolist()
    contexts, responses = (Sequences.of([[3] * n for n in sizes]) for sizes in (prompts, lengths))
    context_of = [i // each for i in range(len(lengths))]
    made = families(contexts, context_of, responses, range(len(lengths)), True, 2 * tokens)
    (pack,) = micro_batches(made, responses, 2 * tokens, kernel=kernel)
    return pack


def _there_and_back(
    pack: MicroBatch, sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of a pack's attention and of its gradients."""
    assert pack.plan is not None
    plan, (heads, kv_heads, size, value_size), tokens = pack.plan, sizes, pack.input_ids.numel()
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size), (heads, value_size))
    q, k, v, slope = (torch.randn(tokens, *s, device=device, dtype=dtype) for s in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return waited(device, lambda: torch.autograd.grad(plan.attend(q, k, v, None), leaves, slope))[1]


# ---------------------------------------------------------------------- policy

EXACT = 1e-3  # relative distance of fp32 gradients, which sum in other orders
BF16_DISTANCE, BF16_COSINE = 0.3, 0.95


def policy(subject: Subject) -> Result:
    """The same log-probs and gradients however the work is cut; and what bf16 makes of them."""
    name = subject.model or subject.tiny
    free = torch.cuda.mem_get_info(subject.device)[0] if subject.on_gpu else available_memory()
    needed = 12 * subject.shape.parameters if subject.model else 0  # weights and two gradients
    if needed > free:
        return skipped(f"{name} needs {needed / GIB:.1f} GiB in fp32, {free / GIB:.1f} GiB are free")
    model = subject.policy(name)
    contexts, responses = _few(model)
    lengths = [len(responses[i]) for i in range(len(responses))]
    shared = [Family(contexts[0], (0, 1), tuple(lengths[:2]), True), Family(contexts[1], (2,), tuple(lengths[2:]))]
    alone = [Family(contexts[int(i == 2)], (i,), (n,)) for i, n in enumerate(lengths)]
    ways: dict[str, tuple[list[Family], bool, bool]] = {"padded": (alone, False, True)}
    ways |= {"packed": (alone, True, True)} if model.can_pack else {}
    ways |= {"shared prompt": (shared, True, True)} if model.can_share else {}
    best = list(ways)[-1]
    ways["head not chunked"] = (*ways[best][:2], False)

    def gradient(way: str, bf16: bool = False) -> list[Tensor]:
        made, packed, chunked = ways[way]
        return _gradient(model, made, responses, packed, chunked, subject.device, bf16)

    truth = gradient("padded")
    figures: dict[str, Any] = {way: compared(gradient(way), truth)[0] for way in list(ways)[1:]}
    distance, cosine = compared(gradient(best, bf16=True), truth)
    wrong = [way for way, value in figures.items() if not value < EXACT]
    lines = ", ".join(f"{way} {value:.1g}" for way, value in figures.items())
    mends = []
    if wrong:
        key = "attn_implementation: sdpa" if not model.can_pack else "packing: false, share_prompts: false"
        mends.append(f"{', '.join(wrong)}: please report it; until then model.init_args: chunked_head: false, {key}.")
    if not (distance < BF16_DISTANCE and cosine > BF16_COSINE):
        mends.append("Train with --trainer.precision 32-true, and please report it.")
    what = f"{Path(name).name}, gradients: relative distance to padded rows in fp32: {lines}; "
    return result(
        what + "bf16 autocast {bf16_distance:.3f} (cosine {bf16_cosine:.4f})",
        mends,
        bf16_distance=distance,
        bf16_cosine=cosine,
        **{way.replace(" ", "_"): value for way, value in figures.items()},
    )


def _few(model: Policy) -> tuple[Sequences, Sequences]:
    """Two prompts and three responses, fewer than 64 tokens in all."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.config.get_text_config().vocab_size
    return tuple(  # type: ignore[return-value]
        Sequences.of([random_ids(generator, n, vocabulary) for n in sizes]) for sizes in ((10, 4), (12, 5, 9))
    )


def _gradient(
    model: Policy,
    made: Sequence[Family],
    responses: Sequences,
    packed: bool,
    chunked: bool,
    device: torch.device,
    bf16: bool = False,
) -> list[Tensor]:
    """Of a weighted sum of all log-probs, as training takes it: by the chosen kernel, through the chunked head."""
    model.zero_grad(set_to_none=True)
    model.chunked_head = chunked
    slope = torch.randn(len(responses.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        kernel = model.attention_kernel(device)
        batches = micro_batches(made, responses, 64, packed=packed, kernel=kernel)
    for batch in (b.to(device) for b in batches):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            log_probs, _ = model(batch)
        (log_probs * slope[batch.source]).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def compared(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """|a - b| / |b|, and the cosine between them; sums in fp64."""
    apart = product = of_a = of_b = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double(), y.double()
        apart += float((x - y).square().sum())
        product += float((x * y).sum())
        of_a += float(x.square().sum())
        of_b += float(y.square().sum())
    return math.sqrt(apart / of_b), product / math.sqrt(of_a * of_b)
