"""LoRA beside full fine-tuning: the same run twice, each in a process of its own, one behind the other.

    python benchmarks/lora.py configs/smollm2_add.yaml --lr 2e-4 --name smollm2 -- --trainer.max_steps 20

Of each run: held-out accuracy by step, the largest resident memory of its process (engine included), bytes of
last.ckpt and of what is exported, and seconds a step. Adds them to the results' file under the name. What stands
behind -- are further options of prerl fit, for both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe

from prerl_lightning.report.folders import below
from prerl_lightning.report.reading import read_run

ROOT = Path(__file__).parents[1]


def one(args: list[str], folder: Path) -> dict:
    command = [sys.executable, "-m", "prerl_lightning.cli", "fit", *args, f"--trainer.default_root_dir={folder}"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: status {status}")
    (run,) = (read_run(found) for found in below(folder))
    steps = run.column("time/step")
    warm = list(steps.values())[1:] or list(steps.values())

    def size(pattern: str) -> int:
        return sum(f.stat().st_size for f in folder.rglob(pattern))

    return {
        "held_out": run.column(str(run.accuracy)),
        "reward": run.column("reward/mean"),
        "peak_memory_bytes": used.ru_maxrss << 10,
        "checkpoint_bytes": size("last.ckpt"),
        "exported_bytes": {"model": size("model/*.safetensors"), "adapter": size("adapter/*.safetensors")},
        "seconds_a_step": sum(warm) / len(warm),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "worst_mismatch": max(run.column("mismatch/log_prob_difference").values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of the run with all weights")
    parser.add_argument("--name", required=True)
    parser.add_argument("--lr", help="with LoRA; default: that of configs/lora.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lora.json")
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    given, more = parser.parse_args(own[:cut]), own[cut + 1 :]
    full = [f"--config={given.config}"]
    lora = [
        *full,
        f"--config={ROOT / 'configs' / 'lora.yaml'}",
        *([f"--model.init_args.lr={given.lr}"] * bool(given.lr)),
    ]
    found = {"arguments": sys.argv[1:], "machine": describe()}
    for name, args in (("full", full), ("lora", lora)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = one([*args, *more], Path(folder))
        print(name, json.dumps(found[name]), flush=True)
    results = json.loads(given.out.read_text()) if given.out.is_file() else {}
    given.out.write_text(json.dumps(results | {given.name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
