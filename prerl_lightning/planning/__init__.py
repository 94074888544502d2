"""``prerl plan``: what a run needs, before a machine is rented for it. By arithmetic, from the configuration and the
model's config.json alone: no weights, no data, no GPU.

    prerl plan --config my.yaml
    prerl plan --config my.yaml --gpu H100 --devices 8 --data.sampling.group_size 4
    prerl plan --config my.yaml --gpu A100 --response_tokens 900 --json

Memory by rank, phase and part; tokens, FLOPs and traffic of a step, about how long one takes, and what that assumes;
and where it does not fit, which options to lower first. Exit status 1: it does not fit.
"""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prerl_lightning import refusals
from prerl_lightning.errors import ArgumentParser, InputError

if TYPE_CHECKING:
    from prerl_lightning.planning.parts import Plan

GIB = 1 << 30
PROMPT = 512  # tokens, where nothing says

LABELS = {
    "program": "Python, torch, vLLM",
    "reserved": "CUDA, NCCL, reserve",
    "weights": "weights",
    "gradients": "gradients",
    "moments": "Adam's moments",
    "copies": "reference, values",
    "buckets": "DDP's buckets",
    "gathered": "gathered by FSDP2",
    "activations": "activations of a pack",
    "logits": "logits, a block",
    "comparison": "alignment's gradients",
    "checkpoint": "checkpoint, rank 0",
    "engine_weights": "engine: weights",
    "kv_cache": "engine: KV cache",
}


def _arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "prerl plan",
        description="What a run needs, from its configuration and the model's config.json alone.",
        epilog="All else is as for prerl fit: --config FILE, --KEY VALUE. Exit status: 0: it fits; 1: it does not; 2: "
        "wrong arguments.",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="ranks of all nodes; default: the configuration's")
    parser.add_argument("--gpu", metavar="CARD", help="such as H100, A100, L4; default: this host's CPU")
    parser.add_argument(
        "--response_tokens", type=int, metavar="N", help="of a response, on average; default: max_new_tokens"
    )
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        metavar="N",
        help=f"of the longest prompt; default: data.max_prompt_tokens, or what fits the engine, {PROMPT} at most",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object with bytes, and nothing else")
    return parser


def plan(args: Sequence[str]) -> None:
    """Run the command; exits with 1 where the run does not fit.

    Raises:
        InputError: the configuration, the card or the model is none that can be planned for.
    """
    own, rest = _arguments().parse_known_args(args)
    for key in ("devices", "response_tokens", "prompt_tokens"):
        if (value := getattr(own, key)) is not None and value < 1:
            raise InputError(f"prerl plan: --{key} {value}: give 1 or more.")
    logging.getLogger("prerl_lightning").setLevel(logging.WARNING)
    rest = refusals.checked(rest, vars(own))
    if not refusals.config_files(rest):
        raise InputError("prerl plan: give --config FILE.")
    from prerl_lightning.planning.parts import Asked, planned
    from prerl_lightning.planning.work import card

    if own.gpu:
        card(own.gpu)  # before the configuration is read
    run = Asked.of_arguments(rest, on_gpu=bool(own.gpu))
    found = planned(run, own.gpu, own.devices, own.prompt_tokens, own.response_tokens)
    print(json.dumps(as_json(found), indent=1) if own.json else "\n".join(lines(found)))
    if not found.fits:
        sys.stdout.flush()
        sys.exit(1)


def as_json(found: "Plan") -> dict[str, Any]:
    """All numbers of a plan, in bytes, tokens, FLOPs and seconds."""
    setup, step = found.setup, found.work
    return {
        "format": 1,
        "objective": found.objective,
        "model": found.model,
        "parameters": setup.shape.parameters,
        "ranks": setup.world_size,
        "strategy": setup.strategy,
        "precision": setup.precision,
        "device": found.device,
        "free_bytes": found.free,
        "fits": found.fits,
        "memory_bytes": found.memory.phases,
        "peak_bytes": found.memory.peak,
        "pack_tokens": found.memory.pack.tokens,
        "activations_recomputed": found.memory.pack.checkpointing,
        "longest_tokens": setup.longest,
        "kv_cache_tokens": setup.engine.kv_tokens,
        "host_bytes": dict(found.host),
        "checkpoint_file_bytes": found.checkpoint,
        "step": {
            **asdict(found.rollouts),
            "sampled_tokens": found.rollouts.sampled,
            "trained_tokens": step.tokens,
            "passes_of_a_rank": step.passes,
            "sampling_flops": step.sampling,
            "training_flops": step.training,
            "received_bytes": step.sent,
            "seconds": asdict(found.seconds) | {"step": found.seconds.step} if found.seconds else None,
        },
        "lower": [{"option": words, "peak_bytes": peak, "fits": fits} for words, peak, fits in found.lower],
        "assumes": found.assumes,
    }


def lines(found: "Plan") -> list[str]:
    """Of the one screen, within 100 columns."""
    setup, memory, step = found.setup, found.memory, found.work
    ranks = f"{setup.world_size} x {found.device}" if setup.world_size > 1 else found.device
    yes = "fits" if found.fits else "DOES NOT FIT"
    recomputed = ", activations recomputed" if memory.pack.checkpointing else ""
    text = [
        f"{_end(found.objective, 40)} on {_end(found.model, 30)}: {setup.shape.parameters:,} parameters",
        f"{ranks}, {setup.strategy}, {setup.precision}",
        "",
        *table(memory.phases),
        "",
        f"It {yes}: {_bytes(memory.peak)} a rank, {_bytes(found.free)} {found.free_where}.",
        f"Packs of {memory.pack.tokens:,} tokens{recomputed}.",
        f"The KV cache holds {setup.engine.kv_tokens:,} tokens, {setup.engine.kv_tokens / setup.longest:.1f} of the "
        f"longest responses with their prompts ({setup.longest:,}).",
    ]
    text += [f"Host memory: {_bytes(size)} a node {_HOST[key]}." for key, size in found.host.items() if size]
    text.append(f"A checkpoint takes {_bytes(found.checkpoint)} of disk.")
    if found.lower:
        text += ["", "Lower first, one after the other:"]
        text += [f"  {words:<60} {_bytes(peak):>12}{', fits' * fits}" for words, peak, fits in found.lower]
    if not found.fits and not any(fits for *_, fits in found.lower):
        text.append("  and even so it does not fit: take a smaller model, shorter responses or a larger device")
    r = found.rollouts
    text += [
        "",
        f"A step: {r.prompts:,} prompts x {r.group} responses",
        f"  tokens: {_count(r.sampled)} sampled, {_count(step.tokens)} trained on in {step.passes:,} passes a rank",
        f"  FLOPs: {step.sampling:.2g} sampling, {step.training:.2g} training"
        + (f"; a rank receives {_bytes(step.sent)}" if step.sent else ""),
    ]
    if found.seconds:
        s = found.seconds
        sampling = f"{s.sampling:.0f} sampling {s.at_a_time} at a time"
        text.append(f"  seconds: about {s.step:.0f} ({sampling}, {s.training:.0f} training)")
    return [*text, "", "Assumed:", *(f"  {line}" for line in found.assumes)]


_HOST = {
    "loading": "while each rank loads the model in fp32",
    "checkpoint": "where rank 0 is, for a checkpoint",
}


def table(phases: Mapping[str, Mapping[str, int]]) -> list[str]:
    """GiB, or MiB of a small run, by part (rows) and phase (columns)."""
    small = max(sum(sizes.values()) for sizes in phases.values()) < 10 * GIB

    def row(label: str, cells: Iterable[str]) -> str:
        return f"{label:<24}" + "".join(f"{cell:>12}" for cell in cells)

    def cell(size: int) -> str:
        return f"{size / (1 << 20):,.0f}" if small else f"{size / GIB:.2f}"

    found = [row(f"{'MiB' if small else 'GiB'} a rank", phases)]
    for part in (part for part in LABELS if any(part in sizes for sizes in phases.values())):
        found.append(row(LABELS[part], (cell(sizes[part]) if part in sizes else "-" for sizes in phases.values())))
    return [*found, row("together", (cell(sum(sizes.values())) for sizes in phases.values()))]


def _bytes(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens:,.0f}"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"
