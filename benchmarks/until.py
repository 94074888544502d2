"""Where an `Until` would have ended the first life of runs that are over, by their metrics.csv: no model, no engine.

    python benchmarks/until.py "{metric: rollout/pass@8, worse_by: 0.1, window: 3}" runs/nsr_prerl

Held-out accuracy is measured at a few steps alone. What is left of it when the life ends is told from the training
reward: ``left`` is reward/mean of the three rollouts around that step, over the largest such mean of the whole run.
Prints JSON.
"""

import argparse
import json
from pathlib import Path

import yaml

from prerl_lightning.objectives.until import Ending, Until
from prerl_lightning.report.folders import below
from prerl_lightning.report.reading import read_run
from prerl_lightning.report.runs import Run


def replay(run: Run, until: Until) -> dict:
    ending, rewards = Ending(until), run.column("reward/mean")
    rows = {step: run.validation.get(step, {}) | row for step, row in run.training.items()}
    fired = ((step, ending.observe(row, step)) for step, row in rows.items())
    step, why = next(((step, why) for step, why in fired if why), (None, None))
    held_out = run.column(str(run.accuracy))
    found = {"run": run.name, "seed": run.seed, "ends_at": step, "why": why, "held_out": held_out}
    if step is None:
        return found
    # a rollout is sampled before its step: that of step s by the weights behind s - 1
    around = {s: [rewards[t] for t in (s, s + 1, s + 2) if t in rewards] for s in rewards}
    means = {s: sum(values) / len(values) for s, values in around.items() if len(values) > 1}
    return found | {"reward": means.get(step), "left": means.get(step, 0.0) / max(means.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("until", help="YAML, as in a configuration")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or above them")
    given = parser.parse_args()
    until = Until(**yaml.safe_load(given.until))
    runs = [read_run(folder) for above in given.runs for folder in below(above)]
    rows = sorted((replay(run, until) for run in runs), key=lambda row: (row["run"], row["seed"]))
    print(json.dumps({"until": vars(until), "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
