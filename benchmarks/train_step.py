"""The train step alone: tokens/s, MFU and memory of forward, backward and optimizer at a shape, random weights.

    python benchmarks/train_step.py --shape qwen3-0.6b --responses 64 --tokens 2000
    python benchmarks/train_step.py --shape tiny --responses 16 --tokens 200        # a CPU can do this

GRPO with every response contributing, 8 a prompt of 150 tokens, lengths uniform within 50 % of --tokens, packs of up to
16,384 tokens in bf16 on a GPU (2,048 in fp32 on a CPU). To stand beside: prime-rl's trainer alone, Qwen3-0.6B on one
H100, packs of 16k: 11,896 tokens/s, 11.1 % MFU. Median of --repeats steps after one that is not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import describe
from transformers import AutoModelForCausalLM, Qwen3Config

from prerl_lightning.metrics.utilisation import peak_flops
from prerl_lightning.objectives import GRPO
from prerl_lightning.policy import probe
from prerl_lightning.policy.model import Policy
from prerl_lightning.types import Prompt, Response, Rollout

SIZES = {  # layers, hidden, intermediate, heads, key heads, head size, vocabulary
    "tiny": (4, 128, 384, 4, 2, 32, 512),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, 151936),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 128, 151936),
}
GROUP = 8


def policy_of(shape: str, checkpointing: bool, device: torch.device) -> Policy:
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = SIZES[shape]
    config = Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    torch.backends.cuda.enable_cudnn_sdp(False)  # as Policy.from_pretrained does
    policy = Policy(AutoModelForCausalLM.from_config(config))
    probe.prepare(policy)
    policy.checkpoint_activations(checkpointing)
    return policy.to(device)


def rollout_of(n: int, tokens: int, vocab: int) -> Rollout:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    lengths = torch.randint(tokens // 2, tokens * 3 // 2, (n,), generator=generator).tolist()
    return Rollout.of(
        [Prompt(i, tuple(ids(150)), "", "") for i in range(n // GROUP)],
        [Response(ids(length), [-1.0] * length, "", False) for length in lengths],
        group_ids=torch.arange(n // GROUP).repeat_interleave(GROUP),
        rewards=(torch.arange(n) % 2).double(),
        policy_version=0,
        temperature=1.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="qwen3-0.6b")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--no_share", dest="share", action="store_false", help="one pass over the prompt a response")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    pack = 16384 if on_gpu else 2048
    module = GRPO(share_prompts=args.share, max_tokens_per_microbatch=pack)
    module.policy = policy = policy_of(args.shape, args.checkpointing, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rollout = rollout_of(args.responses, args.tokens, SIZES[args.shape][-1])
    everything = torch.ones(len(rollout), dtype=torch.bool)
    seconds: list[float] = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            update = module.make_update(rollout)
            passes = update.backward([update.work(t) for t in module.terms], everything, on_policy=True)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        policy.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    sums = update.sums.reduced()
    median = statistics.median(seconds[1:])
    peak = peak_flops(device)
    name = args.shape + (", recomputed" if args.checkpointing else "") + ("" if args.share else ", prompts not shared")
    found = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "precision": "bf16-mixed" if on_gpu else "32-true",
        "attention": update.passes.kernel,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "response_tokens": int(rollout.lengths.sum()),
        "forwarded_tokens": int(sums["train/tokens"]),
        "passes": passes,
        "first_step_seconds": round(seconds[0], 3),
        "step_seconds": round(median, 3),
        "tokens_per_second": round(sums["train/tokens"] / median, 1),
        "tflops_per_second": round(sums["train/flops"] / median / 1e12, 3),
        "mfu": round(sums["train/flops"] / median / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if on_gpu else None,
        "machine": describe(),
    }
    print(json.dumps({name: found}, indent=1))
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    args.out.write_text(json.dumps(results | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
