"""Runs `prerl fit` from start to end, configuration by configuration and seed by seed, and writes down the curves.

    python benchmarks/runs.py dsrl --seeds 0 1 2 3 4
    python benchmarks/runs.py smollm2_math -- --data.train.init_args.path math_train.parquet

Results go to benchmarks/results/runs.json, each run replacing its earlier one, and a table to standard output.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "runs.json"


def measure(config: str, seed: int, more: list[str]) -> dict:
    """Seconds are wall-clock from the command's start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "prerl_lightning.cli", "fit", "--config", f"configs/{config}.yaml", *more]
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1)
        first_step = None
        for line in process.stdout or ():
            if first_step is None and line.startswith("step 1/"):
                first_step = time.perf_counter() - start
        if process.wait() != 0:
            sys.exit(f"{config} with seed {seed} failed")
        seconds = time.perf_counter() - start
        metrics = next(Path(folder).glob("*/version_0/metrics.csv"))
        with metrics.open() as lines:
            rows = list(csv.DictReader(lines))
        endings = json.loads(metrics.with_name("run.json").read_text())["endings"]

    def column(name: str) -> list[float]:
        return [float(r[name]) for r in rows if r.get(name)]

    result = {
        "seconds": round(seconds, 1),
        "seconds_to_first_step": round(first_step or 0, 1),
        "median_step_seconds": round(statistics.median(column("time/step")), 3),
        "median_mismatch": float(f"{statistics.median(column('mismatch/log_prob_difference')):.2g}"),
        "reward": [round(x, 3) for x in column("reward/mean")],
    }
    for name in ("avg@8", "pass@8", "truncated", "thoughts/wait"):
        if held_out := [(r["step"], float(r[f"val/{name}"])) for r in rows if r.get(f"val/{name}")]:
            result[f"held_out_{name}"] = {step: round(value, 3) for step, value in held_out}
    return result | ({"endings": endings} if endings else {})


def main() -> None:
    args = sys.argv[1:]
    more = args[args.index("--") + 1 :] if "--" in args else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(args[: args.index("--")] if "--" in args else args)
    RESULTS.parent.mkdir(exist_ok=True)
    for config in options.configs:
        for seed in options.seeds:
            result = measure(config, seed, more)
            found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            found.setdefault(config, {}).update({f"seed {seed}": result, "machine": describe()})
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            curves = [result.get(f"held_out_{name}", {}).values() for name in ("avg@8", "thoughts/wait")]
            accuracy, waits = (" ".join(f"{value:.3f}" for value in curve) for curve in curves)
            print(f"| {config} | {seed} | {accuracy} | {waits} | {result['seconds']} s |", flush=True)


if __name__ == "__main__":
    main()
