"""Answers a second of each verifier in two worker processes, and what 10,000 hostile strings cost.

    python benchmarks/verifiers.py [--math MATH_TRAIN.parquet]

The ordinary answers are MATH's ground truths in a boxed sentence of some length (without the file: sums), each verified
against its own problem's and against the next one's. The first thousand are not counted: imports and caches. A rollout
is eight answers a problem, half of them right, the others of two kinds, and nothing that was seen before.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from machine import describe

from prerl_lightning.data.readers import Files
from prerl_lightning.rewards import boxed_reward, gsm8k_reward
from prerl_lightning.rewards.pool import Item, RewardPool, Verification
from prerl_lightning.rewards.symbolic import math_verify_reward

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_rewards_more import hostile

RESULTS = Path(__file__).parent / "results" / "verifiers.json"
REASONING = "First we look at the sum, then we check it once more. " * 20


def ordinary(math: str | None) -> list[Item]:
    if math is None:
        truths = [str(i * 7919 % 1000) for i in range(7500)]
    else:
        problems = Files(math)
        problems.load()
        truths = [p.ground_truth for p in problems if p.ground_truth.strip()]
    answers = [pair[i % 2] for i, pair in enumerate(zip(truths, truths[1:] + truths[:1], strict=True))]
    return [
        Item("", f"{REASONING}$\\boxed{{{a}}}$", t, {}, i) for i, (a, t) in enumerate(zip(answers, truths, strict=True))
    ]


def rollout(items: list[Item]) -> list[Item]:
    """Eight answers to each of the last thousand problems, none of which was verified before."""
    texts = [f"{REASONING}$\\boxed{{{i.ground_truth}}}$" for i in items]
    kinds = [(p, p, p, p, p - 1, p - 1, p - 1, p - 2) for p in range(len(items) - 1000, len(items))]
    return [Item("", texts[k], items[group[0]].ground_truth, {}, group[0]) for group in kinds for k in group]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--math")
    args = parser.parse_args()
    items = ordinary(args.math)
    found: dict = {"machine": describe(), "answers": len(items)}
    for reward in (boxed_reward, gsm8k_reward, math_verify_reward):
        pool = RewardPool(reward, Verification(workers=2, timeout=5, max_failed=1))
        pool.verify(items[:1000])
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            verdicts = pool.verify(items)
            seconds.append(time.perf_counter() - start)
        pool.close()
        pool = RewardPool(reward, Verification(workers=2, timeout=5, max_failed=1))
        pool.verify(items[:100])
        start = time.perf_counter()
        pool.verify(rollout(items))
        in_a_rollout = round(8000 / (time.perf_counter() - start))
        pool.close()
        row = {
            "answers_per_second": round(len(items) / sorted(seconds)[2]),
            "first_pass_answers_per_second": round(len(items) / seconds[0]),
            "rollout_answers_per_second": in_a_rollout,
            "failures": dict(Counter(v.failure for v in verdicts if v.failure)),
        }
        pool = RewardPool(reward, Verification(workers=2, timeout=1, max_failed=1))
        start = time.perf_counter()
        verdicts = pool.verify([Item("", text, "7", {}, i) for i, text in enumerate(hostile(10_000))])
        row["hostile_seconds"] = round(time.perf_counter() - start, 1)
        row["hostile_failures"] = dict(Counter(v.failure for v in verdicts if v.failure))
        pool.close()
        found[reward.__name__] = row
        print(reward.__name__, row, flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
