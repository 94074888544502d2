"""What the host computes for a step of the paper's size, beside the device: CPU seconds on one core.

    python benchmarks/host_work.py

128 prompts x 8 responses of 2,344 tokens on average, 2.4 million in all (arXiv 2604.14142's run), English prose for
text. The rollout made from its responses, its statistics, thoughts counted, gathered as from two ranks, packs of 16,384
tokens for GRPO or for NSR-PreRL. Apart stands what happens while the engine still samples: what vLLM hands over becomes
arrays; decoding and verifying are left out. The least of five turns; memory is that of what the rollout keeps.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from machine import describe

from prerl_lightning import ranks
from prerl_lightning.metrics.rollout import rollout_statistics
from prerl_lightning.metrics.thoughts import ThoughtFinder, load_families
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.policy.packing import families, micro_batches
from prerl_lightning.types import Prompt, Response, Rollout, Sequences

P, G, TOKENS, MAX_TOKENS = 128, 8, 2344, 16384
PARAGRAPH = (
    "Let us compute the sum of the first n terms of the sequence, which is \\frac{n(n+1)}{2} for every n, and then "
    "subtract the terms that were counted twice. The remaining angle of the triangle equals 78^\\circ since the three "
    "of them add up to 180^\\circ. Wait, the second factor is odd, and the product 12 \\cdot 13 = 156 is even, hence "
    "x \\ne 3 in both cases; for the larger of the two roots the value is y = 2x + 5 = 17 and for the other one it is "
    "y = 11, which lies outside the interval given in the problem. Therefore the number of pairs is 24. "
)  # 3 thoughts in 560 characters, some 50 in a response


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 2 * TOKENS - 100, P * G).tolist()
    # as vLLM gives them: lists of Python numbers
    ids = [generator.integers(0, 150_000, n).tolist() for n in lengths]
    log_probs = [(-generator.exponential(0.5, n)).tolist() for n in lengths]
    texts = [(PARAGRAPH * (4 * n // len(PARAGRAPH) + 1))[: 4 * n] for n in lengths]
    prompts = [Prompt(i, tuple(generator.integers(0, 150_000, 150).tolist()), "", "") for i in range(P)]
    rewards = torch.from_numpy(generator.integers(0, 2, P * G)).double()
    finder = ThoughtFinder(load_families())

    def records() -> list[Response]:
        return [
            Response(np.array(i, dtype=np.int32), np.array(p, dtype=np.float32), t, False)
            for i, p, t in zip(ids, log_probs, texts, strict=True)
        ]

    def rollout() -> Rollout:
        group_ids = torch.arange(P).repeat_interleave(G)
        return Rollout.of(prompts, made, group_ids=group_ids, rewards=rewards, policy_version=0, temperature=1.0)

    def gather() -> Rollout:
        plain = ranks.world_size, ranks.gather
        ranks.world_size, ranks.gather = (lambda: 2), (lambda rows: rows)
        try:
            return gathered(whole)
        finally:
            ranks.world_size, ranks.gather = plain

    def packs(contexts: Sequences, context_of: list[int], numbers: list[int], share: bool) -> int:
        found = families(contexts, context_of, whole.sequences, numbers, share, MAX_TOKENS)
        return len(micro_batches(found, whole.sequences, MAX_TOKENS, kernel="varlen"))

    made = records()
    whole = rollout()
    everyone, of_prompt = list(range(P * G)), whole.group_ids.tolist()
    negatives = [i for i in everyone if not rewards[i]]
    stages: dict[str, Callable[[], object]] = {
        "engine's lists to arrays": records,
        "rollout": rollout,
        "statistics": lambda: rollout_statistics(whole),
        "thoughts": lambda: [finder.counts(text) for text in whole.texts],
        "gathered": gather,
        "packs, GRPO": lambda: packs(whole.contexts, of_prompt, everyone, True),
        "packs, NSR-PreRL": lambda: packs(Sequences.of([(1,)]), [0] * len(whole), negatives, False),
    }
    seconds: dict[str, float] = {}
    for _ in range(5):
        for name, run in stages.items():
            start = time.process_time()
            run()
            spent = time.process_time() - start
            seconds[name] = min(spent, seconds.get(name, spent))
    apart = ("engine's lists to arrays", "packs, NSR-PreRL")
    of_step = {name: s for name, s in seconds.items() if name not in apart}
    bytes_kept = whole.tokens.nbytes + whole.log_probs.nbytes
    found = {
        "responses": P * G,
        "tokens": int(whole.lengths.sum()),
        "characters": sum(map(len, texts)),
        "cpu_seconds": {k: round(s, 3) for k, s in seconds.items()} | {"a GRPO step": round(sum(of_step.values()), 3)},
        "tokens_and_log_probs_mib": round(bytes_kept / 2**20, 1),
        "machine": describe(),
    }
    print(json.dumps(found, indent=1))
    (args.out or Path(__file__).parent / "results" / "host_work.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
