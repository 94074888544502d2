"""``make soak``: 50 kills over one process, ddp and fsdp2, each run compared with one left alone; and 2,000 steps in
which memory, descriptors, threads and the time of a step stay flat. Half an hour; figures into benchmarks/results/.

    python tests/faults/soak.py kills --kills 50 --seed 0      # --only fsdp2: that third
    python tests/faults/soak.py steps --steps 2000
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from driver import ROOT, STEPS, VALIDATION, Fault, Run, differences

from prerl_lightning.callbacks.record import machine

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"


def drawn(chance: random.Random, strategy: str, before: int) -> Fault:
    """Somewhere behind ``before`` steps, to the whole tree, one rank, or a verifier."""
    place = chance.choice(["start-up", "step", "step", "update", "validation", "writing"])
    step = chance.randint(before, min(before + 3, STEPS - 1))
    if every := {"validation": VALIDATION, "writing": 2}.get(place):
        step = -(-max(step, before + 1) // every) * every  # that of ``before`` may be over
    elif place == "update":
        step = max(step, 1)
    to = chance.choice(["tree", "tree", "rank 0", "rank 1"] if strategy else ["tree", "first"])
    delay = chance.uniform(0, 8) if place == "start-up" else chance.uniform(0, 0.3)
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    return Fault(place if place == "start-up" else f"{place} {step}", (number,), to, delay)


def kills(number: int, seed: int, only: str | None) -> dict:
    found = _results().get("kills", {})
    with tempfile.TemporaryDirectory() as folder:
        for strategy, share in (("", number - 2 * (number // 3)), ("ddp", number // 3), ("fsdp2", number // 3)):
            name = strategy or "one process"
            if only not in (None, name):
                continue
            chance = random.Random(f"{seed} {name}")
            alone = Run(Path(folder) / name / "alone", strategy)
            alone.whole()
            told, made, runs = [], 0, 0
            differ, compared, left = 0, 0, 0
            while made < share:
                run = Run(Path(folder) / name / str(runs), strategy)
                runs, before = runs + 1, 0
                while made < share and before < STEPS - 4:
                    fault = drawn(chance, strategy, before)
                    status = run.suffer(fault)
                    made += 1
                    left += len(run.left)
                    told.append({"at": fault.at, "to": fault.to, "signal": fault.signals[0], "status": status})
                    print(name, made, told[-1], flush=True)
                    newest = run.checkpoint() if list(run.runs.glob("*/checkpoints/last.ckpt")) else None
                    before = newest["global_step"] if newest else 0
                run.whole()
                d, n = differences(alone, run)
                differ, compared = differ + d, compared + n
                print(name, f"run {runs}: {d} of {n} differ", flush=True)
            found[name] = {"kills": made, "runs": runs, "differ": differ, "compared": compared}
            found[name] |= {"left_running": left, "faults": told}
            _write("kills", found)
    return found


def steps(number: int) -> dict:
    """Of one process: by quarter of the run, behind the first 100 steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "", [f"--trainer.max_steps={number}", "--trainer.val_check_interval=200"])
        process, seen = run.start(), []
        while process.poll() is None:
            seen.append(_looks(process.pid))
            time.sleep(2.0)
        assert run.end(process) == 0, run.output
        took = [value for (name, step), value in _timed(run).items() if name == "time/step" and step > 100]
    quarters = [seen[i * len(seen) // 4 : (i + 1) * len(seen) // 4] for i in range(4)]
    found = {key: [max(look[key] for look in q if key in look) for q in quarters] for key in seen[len(seen) // 2]}
    n = len(took) // 4
    return {"steps": number, **found, "seconds": [statistics.median(took[i * n : (i + 1) * n]) for i in range(4)]}


def _results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def _write(part: str, found: dict) -> None:
    RESULTS.write_text(json.dumps({**_results(), part: found, "machine": machine()}, indent=1) + "\n")


def _looks(pid: int) -> dict:
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {
            "rss_mib": int(status["VmRSS"].split()[0]) >> 10,
            "threads": int(status["Threads"]),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        }
    except (OSError, KeyError):
        return {}


def _timed(run: Run) -> dict:
    from prerl_lightning.report.reading import read_run

    training = read_run(next(run.runs.glob("version_*"))).training
    return {(name, step): value for step, row in training.items() for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "steps"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", choices=["one process", "ddp", "fsdp2"])
    given = parser.parse_args()
    found = kills(given.kills, given.seed, given.only) if given.part == "kills" else steps(given.steps)
    _write(given.part, found)
    print(json.dumps({k: v if k != "faults" else ... for k, v in found.items()}, indent=1, default=str))


if __name__ == "__main__":
    main()
