"""One GRPO step of TRL's GRPOTrainer against one of ours: same model, prompts, group size, lengths; one update a step.

    python benchmarks/trl_step.py MODEL_FOLDER --trl-python TRL_ENV/bin/python

TRL lives in an environment of its own (pip install trl, with a CPU build of torch). Each side runs in a process of
its own, which this one starts, in turns; it reports seconds a step from its second step on, and its peak resident
memory. The prompts are two-digit sums behind twenty worked ones, the answers 24 tokens, learning rate 1e-6, fp32
weights; for either side each precision and, for TRL, each generation mode is tried, and its fastest is compared.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trl_step.json"
GROUP, NEW_TOKENS = 8, 24


def prompts(n: int) -> list[str]:
    shots = "".join(f"{a}+{b}={a + b}\n" for a, b in [(11 + 4 * i, 79 - 3 * i) for i in range(20)])
    return [f"{shots}{10 + 7 * i % 89}+{12 + 5 * i % 87}=" for i in range(n)]


def trl_side(model: str, n_prompts: int, steps: int, options: dict) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.start)

    def reward(completions, **kwargs):
        return [float(len(c) % 2) for c in completions]  # every group mixed

    data = Dataset.from_dict({"prompt": prompts(n_prompts * steps)})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=n_prompts * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            max_steps=steps,
            learning_rate=1e-6,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            **options,
        )
        trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data)
        trainer.add_callback(Clock())
        trainer.train()
    print(json.dumps({"seconds": times[1:], "peak_gb": peak()}))


def our_side(model: str, n_prompts: int, steps: int, options: dict) -> None:
    import csv

    from prerl_lightning.cli import main

    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"prompt": p, "answer": "0"}) for p in prompts(n_prompts * steps)]
        (Path(folder) / "prompts.jsonl").write_text("\n".join(rows))
        config = {
            "model": {"class_path": "GRPO", "init_args": {"model": model, "lr": 1e-6, **options.pop("model", {})}},
            "data": {
                "train": {"class_path": "JSONLines", "init_args": {"path": f"{folder}/prompts.jsonl"}},
                "reward": "trl_step.parity_reward",
                "prompts_per_step": n_prompts,
                "format": {"chat": False},
                "sampling": {"group_size": GROUP, "max_new_tokens": NEW_TOKENS},
                "engine": {
                    "class_path": "VLLMEngine",
                    "init_args": {"dtype": "bfloat16", "max_model_len": 256, "kv_cache_mib": 128},
                },
            },
            "trainer": {"max_steps": steps, "default_root_dir": folder, **options},
            "export": {"enabled": False},
        }
        (Path(folder) / "run.yaml").write_text(json.dumps(config))
        main(["fit", "--config", f"{folder}/run.yaml", "--trainer.enable_checkpointing", "false"])
        with (Path(folder) / "run" / "version_0" / "metrics.csv").open() as lines:
            found = [r for r in csv.DictReader(lines) if r.get("time/step")]
    split = {
        k.removeprefix("time/"): statistics.median(float(r[k]) for r in found[1:]) for k in found[0] if "time/" in k
    }
    print(json.dumps({"seconds": [float(r["time/step"]) for r in found[1:]], "peak_gb": peak(), "split": split}))


def parity_reward(prompt, response, ground_truth, extra):
    return float(len(response) % 2)


def peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


SIDES = {
    "trl": {
        "fp32": {"bf16": False, "gradient_checkpointing": False},
        "bf16": {"bf16": True, "gradient_checkpointing": False},
        "bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
        "bf16, vLLM colocated": {"bf16": True, "gradient_checkpointing": False, "use_vllm": True},
    },
    "ours": {"fp32": {}, "bf16": {"precision": "bf16-mixed"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--trl-python")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of one process; the first is not counted")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side = trl_side if args.side == "trl" else our_side
        return side(args.model, args.prompts, args.steps, dict(SIDES[args.side][args.mode]))

    from machine import describe

    model = str(Path(args.model).resolve())
    found: dict = {}
    for turn in range(args.turns):
        for side, modes in SIDES.items():
            for mode in modes:
                key = f"{side}, {mode}"
                if found.get(key, {}).get("error"):
                    continue
                python = args.trl_python if side == "trl" else sys.executable
                command = [python, __file__, model, "--side", side, "--mode", mode]
                command += ["--prompts", str(args.prompts), "--steps", str(args.steps)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "benchmarks")
                row = found.setdefault(key, {"all_seconds": [], "peak_gb": 0.0})
                if done.returncode:
                    row["error"] = done.stderr.strip().splitlines()[-1][:300]
                    print(f"{key}: {row['error']}", flush=True)
                    continue
                result = json.loads(done.stdout.strip().splitlines()[-1])
                row["all_seconds"] += [round(s, 2) for s in result["seconds"]]
                row["seconds"] = round(statistics.median(row["all_seconds"]), 2)
                row["peak_gb"] = max(row["peak_gb"], result["peak_gb"])
                row |= {"split": result["split"]} if "split" in result else {}
                print(f"turn {turn + 1}, {key}: {row['seconds']} s a step, {row['peak_gb']} GB", flush=True)
    ran = {k: r for k, r in found.items() if "seconds" in r}
    fastest = {s: min((k for k in ran if k.startswith(s)), key=lambda k: ran[k]["seconds"]) for s in SIDES}
    a, b = ran[fastest["trl"]], ran[fastest["ours"]]
    summary = {"fastest": fastest, "speed_ratio": round(a["seconds"] / b["seconds"], 1)}
    summary["memory_ratio"] = round(b["peak_gb"] / a["peak_gb"], 2)
    print(summary)
    trl = subprocess.run([args.trl_python, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"summary": summary, "prompts": args.prompts, "trl": trl.stdout.strip(), "sides": found}
    RESULTS.write_text(json.dumps({**result, "machine": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
