"""Memory and descriptors of a process that runs `prerl.fit` several times, as a notebook does: after each run.

python benchmarks/several_runs.py --runs 6 --out benchmarks/results/several_runs.json
"""

import argparse
import gc
import json
import os
import tempfile
import threading
from pathlib import Path

from machine import describe

import prerl_lightning as prerl


def one(seed: int) -> dict:
    data = prerl.RolloutDataModule(
        train=prerl.CountdownProblems("train"),
        val=prerl.CountdownProblems("held_out", size=16),
        prompts_per_step=8,
        sampling=prerl.Sampling(group_size=4, max_new_tokens=128),
        val_samples=2,
    )
    prerl.fit(prerl.GRPO(model="embedded", lr=3e-4), data, max_steps=3, seed=seed)
    del data
    gc.collect()
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) >> 10,
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--out")
    own = parser.parse_args()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        after_each = [one(seed) for seed in range(own.runs)]
        os.chdir(before)
    found = {"machine": describe(), "after_each_run": after_each}
    print(json.dumps(found, indent=1))
    if own.out:
        Path(own.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
