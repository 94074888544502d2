"""What `prerl plan` computes against peaks of resident memory: GRPO, two steps and a checkpoint, on this CPU.

    python benchmarks/plan.py embedded smollm2 qwen
    python benchmarks/plan.py embedded smollm2 qwen --again    # the plans alone, beside the peaks measured before

Each run is `prerl fit` with two gloo ranks under ddp and fsdp2 (and in one process), whose peaks are the kernel's
(VmHWM), by rank and by phase; the plan is of the same configuration. ``qwen`` is Qwen2.5-Coder-0.5B's config.json with
random weights and so few of its 24 layers that two ranks stay below 10 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import yaml

RESULTS = Path(__file__).parent / "results" / "plan.json"
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN |= {"vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
WAYS = {"single": (1, "auto"), "ddp": (2, "ddp"), "fsdp2": (2, "fsdp2")}
COIN = "def toss(prompt, response, ground_truth, extra):\n    return float(len(response) % 2)\n"  # some have a gradient
LAYERS = {"single": 8, "ddp": 2, "fsdp2": 4}  # of qwen


class Peaks(L.Callback):
    """Writes this rank's peaks, in bytes, by phase."""

    def __init__(self, folder: str) -> None:
        self.folder, self.peaks = Path(folder), dict[str, int]()

    def _end(self, phase: str) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.peaks[phase] = max(self.peaks.get(phase, 0), int(status["VmHWM"].split()[0]) << 10)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def setup(self, *_: Any, **__: Any) -> None:
        self._end("start")

    def on_train_start(self, *_: Any) -> None:
        self._end("validation")

    def on_train_batch_end(self, *_: Any) -> None:
        self._end("steps")

    def teardown(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._end("end")
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(self.peaks))


def configuration(model: str, way: str, folder: Path, given: str, weights: bool) -> dict[str, Any]:
    """A run's."""
    devices, strategy = WAYS[way]
    data: dict[str, Any] = {
        "train": {"class_path": "CountdownProblems", "init_args": {"split": "train", "size": 256}},
        "prompts_per_step": 32,
        "sampling": {"group_size": 8, "max_new_tokens": 128},
        "engine": {"class_path": "VLLMEngine", "init_args": {"max_model_len": 144}},
    }
    options: dict[str, Any] = {"model": "embedded", "lr": 1e-6}
    more: dict[str, Any] = {}
    if model != "embedded":
        options = {"model": given, "lr": 1e-6, "max_tokens_per_microbatch": 256}
        data["train"] = {"class_path": "TwoDigitSums", "init_args": {"split": "train", "size": 64}}
        (folder / "coin.py").write_text(COIN)
        data |= {"reward": "coin.toss", "prompts_per_step": 4}
        data["sampling"] = {"group_size": 4, "max_new_tokens": 48}
        data["engine"]["init_args"] = {"max_model_len": 256, "kv_cache_mib": 64}
        more = {"alignment": {"every_n_steps": 0}, "export": {"enabled": False}} if way != "single" else {}
    if model == "qwen":
        options["model"] = qwen(folder / "model", LAYERS[way], given, weights)
        data["engine"]["init_args"]["dtype"] = "bfloat16"
    return {
        "model": {"class_path": "GRPO", "init_args": options},
        "data": data,
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": strategy,
            "precision": "32-true",
            "max_steps": 2,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "plan.Peaks", "init_args": {"folder": str(folder)}}],
        },
    } | more


def qwen(folder: Path, layers: int, tokenizer: str, weights: bool) -> str:
    """A model folder with random weights, and ``tokenizer``'s tokens."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(num_hidden_layers=layers, **QWEN)
    config.save_pretrained(folder)
    if weights:
        with torch.no_grad():
            Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=("embedded", "smollm2", "qwen"))
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--again", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    from machine import describe

    found = json.loads(args.out.read_text()) if args.out.is_file() else {"machine": describe()}
    for model in args.models:
        for way in args.way or WAYS:
            name = f"{model}, {way}"
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "run.yaml"
                given = str(Path(args.model).resolve())
                file.write_text(yaml.safe_dump(configuration(model, way, Path(folder), given, not args.again)))
                peaks = found[name]["peaks_gib"] if args.again else measured(file)
                row = {"peaks_gib": peaks} | planned(file, peaks)
            found[name] = row
            print(f"| {name} | {row['peak_gib']} | {row['planned_gib']} | {row['off_percent']:+.1f} % |", flush=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


def _prerl(folder: Path, *args: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "prerl_lightning.cli", *args]
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def measured(file: Path) -> list[dict[str, float]]:
    """GiB by phase, of each rank."""
    _prerl(file.parent, "fit", "--config", str(file))
    found = [json.loads(rank.read_text()) for rank in sorted(file.parent.glob("rank_*.json"))]
    return [{phase: round(size / 2**30, 3) for phase, size in peaks.items()} for peaks in found]


def planned(file: Path, peaks: list[dict[str, float]]) -> dict[str, Any]:
    plan = json.loads(_prerl(file.parent, "plan", "--json", "--config", str(file)))
    peak = max(max(of_rank.values()) for of_rank in peaks)
    phases = {phase: round(sum(parts.values()) / 2**30, 3) for phase, parts in plan["memory_bytes"].items()}
    program = max(parts["program"] for parts in plan["memory_bytes"].values()) / 2**30
    computed = max(phases.values())
    return {
        "peak_gib": peak,
        "planned_gib": computed,
        "off_percent": round(100 * (computed / peak - 1), 1),
        "off_percent_besides_the_program": round(100 * ((computed - program) / (peak - program) - 1), 1),
        "phases_gib": phases,
    }


if __name__ == "__main__":
    main()
