"""What the watchers that are on by default cost: of a step's time, and of memory; and text that thoughts are found in.

    python benchmarks/watchers.py steps configs/dsrl.yaml --steps 50
    python benchmarks/watchers.py steps configs/smollm2_add.yaml --steps 50
    python benchmarks/watchers.py text
    python benchmarks/watchers.py memory models/smollm2-135m

``steps``: both sides from one run, over steps 2 to the last: time/watchers and time/statistics over time/step; and, as
a bound on all else that happens between two steps, such as log rows and Lightning's loop, the median gap between steps
without a validation. Of steps 2 to 50 one has an alignment, as in a long run; DSRL's two, one at the end of a life.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]


def steps(config: str, n: int, extra: list[str]) -> dict:
    command = [sys.executable, "-m", "prerl_lightning.cli", "fit", "--config", str(ROOT / config)]
    command += [f"--trainer.max_steps={n}", "--export.enabled=false", *extra]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, check=True, cwd=folder)
        with next(Path(folder).glob("runs/*/version_0/metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))
    rows_of_steps = [r for r in rows if r.get("time/step")]

    def column(name: str, only: list[dict]) -> list[float]:
        return [float(r[name] or 0) for r in only]

    later = rows_of_steps[1:]
    whole = sum(column("time/step", later))
    watchers = sum(column("time/watchers", later)) + sum(column("time/statistics", later))
    validated = {int(r["step"]) for r in rows if r.get("val/length")}
    gaps = [
        float(after["time/since_start"]) - float(after["time/step"]) - float(before["time/since_start"])
        for before, after in zip(rows_of_steps, later, strict=False)
        if int(before["step"]) not in validated
    ]
    return {
        "config": config,
        "steps": len(later),
        "mean_step_seconds": round(whole / len(later), 3),
        "watchers_share": round(watchers / whole, 4),
        "alignment_share": round(sum(column("time/alignment", later)) / whole, 4),
        "statistics_share": round(sum(column("time/statistics", later)) / whole, 4),
        "median_gap_over_step": round(statistics.median(gaps) / (whole / len(later)), 4),
    }


def text() -> dict:
    """One core, on prose (the package's own sources and docs), whole and as answers of 9,000 characters, and on the
    embedded model's short answers; phrases, and SEAL's rule."""
    from prerl_lightning.metrics.seal import SealLabels
    from prerl_lightning.metrics.thoughts import ThoughtFinder, load_families

    counters = {"": ThoughtFinder(load_families()), ", SEAL": SealLabels()}
    files = [p for pattern in ("*.md", "prerl_lightning/**/*.py") for p in ROOT.glob(pattern)]
    prose = ("\n".join(p.read_text() for p in files) * 100)[:5_000_000]
    found = {}
    kinds = {
        "prose": [prose],
        "answers of 9,000 characters": [prose[i : i + 9000] for i in range(0, len(prose), 9000)],
        "answers of 25 characters": ["25+46=71 wait 71+17=88#88"] * 200_000,
    }
    for kind, texts in kinds.items():
        size = sum(len(t.encode()) for t in texts)
        for rule, counter in counters.items():
            start = time.perf_counter()
            for one in texts:
                counter.counts(one)
            found[f"{kind}{rule}, MB/s"] = round(size / 1e6 / (time.perf_counter() - start), 1)
    return found


def memory(model: str, sketch: int) -> dict:
    """Peak memory of one comparison of 4 responses of 200 tokens, in a process of its own; sketch -1: one backward
    pass alone, which training needs anyway."""
    import torch

    from prerl_lightning.metrics.alignment import GradientComparison
    from prerl_lightning.policy.model import Policy
    from prerl_lightning.types import Prompt, Response, Rollout

    policy = Policy.from_pretrained(model)
    ids = tuple(torch.randint(0, 1000, (200,), generator=torch.Generator().manual_seed(0)).tolist())
    rollout = Rollout.of(
        [Prompt(0, ids[:50], "", "")],
        [Response(ids, [-1.0] * 200, "", False)] * 4,
        group_ids=torch.zeros(4, dtype=torch.long),
        rewards=torch.tensor([1.0, 0, 1, 0], dtype=torch.float64),
        policy_version=0,
        temperature=1.0,
    )
    start = time.perf_counter()
    comparison = GradientComparison(policy, max(sketch, 0))
    if sketch < 0:
        comparison._gradient(ids[:50], ids, 1.0)
    else:
        comparison.responses(rollout, range(4), dict.fromkeys(range(4), 1.0), 1)
    seconds = time.perf_counter() - start
    return {
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "text", "memory", "memory_of_one"])
    parser.add_argument("which", nargs="?")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sketch", type=int, default=0)
    parser.add_argument("--out")
    own, extra = parser.parse_known_args()
    if own.what == "steps":
        found = steps(own.which, own.steps, extra)
    elif own.what == "text":
        found = text()
    elif own.what == "memory_of_one":
        print(json.dumps(memory(own.which, own.sketch)))
        return
    else:
        found = {}
        for name, sketch in (("one backward pass", -1), ("exact", 0), ("sketch of 65,537", 65_537)):
            command = [sys.executable, __file__, "memory_of_one", own.which, f"--sketch={sketch}"]
            found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result = {"machine": describe(), **found}
    print(json.dumps(result, indent=1))
    if own.out:
        Path(own.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
