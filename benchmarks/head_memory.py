"""Peak memory of one forward and backward pass with the body alone, the chunked head, and all logits at once.

    python benchmarks/head_memory.py

A random-weight Qwen3-0.6B shape with 4 layers (hidden 1024, vocabulary 151,936), 4,096 response tokens in one pack,
gradients already there, as from the second micro-batch on. Each variant in a process of its own; peak resident memory
by the kernel's count. The body's loss is the sum of its last hidden states.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "head_memory.json"
VARIANTS = ("start", "body", "chunked head", "all logits")


def run(variant: str, tokens: int, bf16: bool, untied: bool) -> None:
    import time

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from prerl_lightning.policy import probe
    from prerl_lightning.policy.model import Policy
    from prerl_lightning.policy.packing import Family, micro_batches

    config = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=not untied,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(Qwen3ForCausalLM(config), chunked_head=variant == "chunked head")
    probe.prepare(policy)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = tuple(torch.randint(config.vocab_size, (512,)).tolist())
    (batch,) = micro_batches([Family((1,), ((i, ids),)) for i in range(tokens // 512)], tokens)
    start = time.perf_counter()
    if variant != "start":
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            if variant == "body":
                body = policy.model.base_model
                out = body(batch.input_ids, position_ids=batch.positions, plan=batch.plan, use_cache=False)
                loss = out.last_hidden_state.float().sum() * 1e-6
            else:
                loss = policy(batch)[0].mean()
        loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_gb": round(peak, 2), "seconds": round(time.perf_counter() - start, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--untied", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return run(args.variant, args.tokens, args.bf16, args.untied)
    from machine import describe

    found: dict = {}
    for kind in ("fp32, tied", "bf16, tied", "fp32, untied", "bf16, untied"):
        options = [f"--{word}" for word in ("bf16", "untied") if word in kind.split(", ")]
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant, "--tokens", str(args.tokens), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{kind}, {variant}"] = result = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"| {kind} | {variant} | {result['peak_gb']} GB | {result['seconds']} s |", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"tokens": args.tokens, "variants": found, "machine": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
