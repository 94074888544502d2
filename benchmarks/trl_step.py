"""One GRPO step of TRL's GRPOTrainer against one of ours: same model, prompts, group size, lengths; one update a step.

    python benchmarks/trl_step.py MODEL_FOLDER --trl-python TRL_ENV/bin/python

TRL lives in an environment of its own (pip install trl, with a CPU build of torch). Each side runs in a process of
its own, which this one starts; it reports seconds a step from its second step on, by the clock and of CPU time (which
a busy host of a virtual machine distorts less), and its peak resident memory. The
prompts are two-digit sums behind twenty worked ones, the answers 24 tokens, learning rate 1e-6, fp32 weights. For
either side each precision and, for TRL, each generation mode is tried once; then the fastest of each run in turns, and
are compared. Before that both compute loss and gradient of one identical batch in fp32, with old log-probs that part
of the ratios are clipped against.
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


class Times:
    """Seconds a step, by the clock and of CPU time."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def begin(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.found.append((time.perf_counter() - self.started[0], time.process_time() - self.started[1]))

    def result(self) -> dict:
        """Without the first step."""
        return {"seconds": [a for a, _ in self.found[1:]], "cpu_seconds": [b for _, b in self.found[1:]]}


def trl_side(model: str, n_prompts: int, steps: int, options: dict) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback, Times):
        def on_step_begin(self, *args, **kwargs):
            self.begin()

        def on_step_end(self, *args, **kwargs):
            self.end()

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
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    print(json.dumps({**clock.result(), "peak_gb": peak()}))


def our_side(model: str, n_prompts: int, steps: int, options: dict) -> None:
    import csv

    from prerl_lightning.cli import main

    engine = {"dtype": "bfloat16", "max_model_len": 256, "kv_cache_mib": 128}
    engine["enforce_eager"] = options.pop("enforce_eager", None)
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"prompt": p, "answer": "0"}) for p in prompts(n_prompts * steps)]
        (Path(folder) / "prompts.jsonl").write_text("\n".join(rows))
        config = {
            "model": {"class_path": "GRPO", "init_args": {"model": model, "lr": 1e-6}},
            "data": {
                "train": {"class_path": "Files", "init_args": {"path": f"{folder}/prompts.jsonl"}},
                "reward": "trl_step.parity_reward",
                "prompts_per_step": n_prompts,
                "format": {"chat": False},
                "sampling": {"group_size": GROUP, "max_new_tokens": NEW_TOKENS},
                "engine": {"class_path": "VLLMEngine", "init_args": engine},
            },
            "trainer": {
                "max_steps": steps,
                "default_root_dir": folder,
                "callbacks": [{"class_path": "trl_step_clock.CPUClock"}],
                **options,
            },
            "export": {"enabled": False},
        }
        (Path(folder) / "run.yaml").write_text(json.dumps(config))
        main(["fit", "--config", f"{folder}/run.yaml", "--trainer.enable_checkpointing", "false"])
        with (Path(folder) / "run" / "version_0" / "metrics.csv").open() as lines:
            found = [r for r in csv.DictReader(lines) if r.get("time/step")]
    split = {
        k.removeprefix("time/"): statistics.median(float(r[k]) for r in found[1:]) for k in found[0] if "time/" in k
    }
    seconds, cpu_seconds = ([float(r[k]) for r in found[1:]] for k in ("time/step", "time/cpu"))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak(), "split": split}))


def trl_batch(model: str, folder: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    batch = torch.load(folder / "batch.pt")
    n, length = len(batch["responses"]), max(map(len, batch["responses"]))
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=n,
        num_generations=GROUP,
        max_completion_length=length,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    data = Dataset.from_dict({"prompt": prompts(n)})
    trainer = GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.0], args=config, train_dataset=data)
    trainer.current_gradient_accumulation_steps = 1

    def padded(rows, left=False):
        width = max(map(len, rows))
        fill = [[0] * (width - len(r)) for r in rows]
        return torch.tensor([f + list(r) if left else list(r) + f for r, f in zip(rows, fill, strict=True)])

    def ones(rows):
        return [[1] * len(r) for r in rows]

    loss = trainer._compute_loss(
        trainer.model.train(),
        {
            "prompt_ids": padded(batch["prompts"], left=True),
            "prompt_mask": padded(ones(batch["prompts"]), left=True),
            "completion_ids": padded(batch["responses"]),
            "completion_mask": padded(ones(batch["responses"])),
            "advantages": batch["advantages"].float(),
            "old_per_token_logps": padded([o.tolist() for o in batch["old"]]),
            "num_items_in_batch": torch.tensor(sum(map(len, batch["responses"]))),
        },
    )
    loss.backward()
    save_gradient(folder / "trl.pt", float(loss), trainer.model.named_parameters())


def our_batch(model: str, folder: Path) -> None:
    from dataclasses import replace

    import torch

    from prerl_lightning.objectives import GRPO
    from prerl_lightning.policy.model import load_tokenizer
    from prerl_lightning.types import Prompt, Response, Rollout

    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(model)
    lengths = torch.randint(4, NEW_TOKENS + 1, (4 * GROUP,), generator=generator).tolist()
    responses = [tuple(torch.randint(40_000, (n,), generator=generator).tolist()) for n in lengths]
    rollout = Rollout.of(
        [Prompt(i, tuple(tokenizer(p)["input_ids"]), p, "") for i, p in enumerate(prompts(4))],
        [Response(r, [-1.0] * len(r), "", False) for r in responses],
        group_ids=torch.arange(4).repeat_interleave(GROUP),
        rewards=torch.randint(2, (4 * GROUP,), generator=generator).double(),
        policy_version=0,
        temperature=1.0,
    )
    module = GRPO(model=model)
    module.configure_model()
    update = module.make_update(rollout)
    everything = torch.ones(len(responses), dtype=torch.bool)
    current = update.passes.log_probs("post-train", everything)
    old = current + 0.3 * torch.randn(len(current), generator=generator)
    work = replace(update.work(module.terms[0]), old=old)
    contexts = [rollout.prompts[int(g)].token_ids for g in rollout.group_ids]
    batch = {"prompts": contexts, "responses": responses, "advantages": work.advantages.float()}
    torch.save({**batch, "old": list(old.split(lengths))}, folder / "batch.pt")
    update.backward([work], everything, True)
    found = update.sums.reduced()
    print(f"{found['optim/clipped']:.0%} of the tokens clipped", file=sys.stderr)
    save_gradient(folder / "ours.pt", found["optim/loss"], module.live_policy.model.named_parameters())


def save_gradient(path: Path, loss: float, parameters) -> None:
    import torch

    torch.save({"loss": loss, "gradient": {name: p.grad for name, p in parameters}}, path)


def compare_batch(model: str, trl_python: str) -> dict:
    """Loss of either side, and the relative difference of the gradients."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        for side, python in (("ours", sys.executable), ("trl", trl_python)):
            run(python, model, side, "--batch", folder)
        ours, trl = (torch.load(f"{folder}/{side}.pt") for side in ("ours", "trl"))
    assert ours["gradient"].keys() == trl["gradient"].keys()
    a, b = (torch.cat([g.flatten().double() for g in side["gradient"].values()]) for side in (ours, trl))
    return {"ours": ours["loss"], "trl": trl["loss"], "gradient_difference": float((a - b).norm() / b.norm())}


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
    "ours": {
        "fp32": {"precision": "32-true"},
        "bf16": {"precision": "bf16-mixed"},
        "bf16, compiled engine": {"precision": "bf16-mixed", "enforce_eager": False},
    },
}


def run(python: str, model: str, side: str, *options: str) -> str:
    command = [python, __file__, model, "--side", side, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "benchmarks")
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--trl-python")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of one process; the first is not counted")
    parser.add_argument("--turn-steps", type=int, default=5, help="likewise, in the turns")
    parser.add_argument("--turns", type=int, default=3, help="of the fastest modes")
    parser.add_argument("--turns-only", action="store_true", help="take what modes measure from the results file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        return {"trl": trl_batch, "ours": our_batch}[args.side](args.model, args.batch)
    if args.side:
        side = {"trl": trl_side, "ours": our_side}[args.side]
        return side(args.model, args.prompts, args.steps, dict(SIDES[args.side][args.mode]))

    from machine import describe

    model = str(Path(args.model).resolve())
    batch = compare_batch(model, args.trl_python)
    print(batch, flush=True)
    found: dict = {}

    def measure(side: str, mode: str, steps: int) -> None:
        python = args.trl_python if side == "trl" else sys.executable
        row = found.setdefault(f"{side}, {mode}", {"all_seconds": [], "all_cpu_seconds": [], "peak_gb": 0.0})
        sizes = ("--prompts", str(args.prompts), "--steps", str(steps))
        try:
            result = json.loads(run(python, model, side, "--mode", mode, *sizes).splitlines()[-1])
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if "Error" in line] or ["no message"]
            row["error"] = lines[-1][:300]
            return print(f"{side}, {mode}: {row['error']}", flush=True)
        for kind in ("seconds", "cpu_seconds"):
            row[f"all_{kind}"] += [round(s, 2) for s in result[kind]]
            row[kind] = round(statistics.median(row[f"all_{kind}"]), 2)
        row["peak_gb"] = max(row["peak_gb"], result["peak_gb"])
        row |= {"split": result["split"]} if "split" in result else {}
        figures = f"{row['all_seconds']} s, {row['all_cpu_seconds']} CPU s, {row['peak_gb']} GB"
        print(f"{side}, {mode}: {figures}", flush=True)

    fastest = {}
    if args.turns_only:
        found = json.loads(RESULTS.read_text())["sides"]
    for side, modes in SIDES.items():
        for mode in modes:
            if f"{side}, {mode}" not in found:
                measure(side, mode, args.steps)
        ran = [m for m in modes if "seconds" in found[f"{side}, {m}"]]
        fastest[side] = min(ran, key=lambda m: found[f"{side}, {m}"]["seconds"])
    for mode in fastest.items():
        found[", ".join(mode)] |= {
            "all_seconds": [],
            "all_cpu_seconds": [],
            "peak_gb": 0.0,
        }  # only what alternates is compared
    for _ in range(args.turns):
        for side, mode in fastest.items():
            measure(side, mode, args.turn_steps)
    a, b = (found[f"{side}, {fastest[side]}"] for side in ("trl", "ours"))
    summary = {"fastest": fastest, "speed_ratio": round(a["seconds"] / b["seconds"], 1)}
    summary["cpu_ratio"] = round(a["cpu_seconds"] / b["cpu_seconds"], 1)
    summary["memory_ratio"] = round(b["peak_gb"] / a["peak_gb"], 2)
    print(summary)
    trl = subprocess.run([args.trl_python, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"summary": summary, "identical_batch": batch, "prompts": args.prompts, "trl": trl.stdout.strip()}
    RESULTS.write_text(json.dumps({**result, "sides": found, "machine": describe()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
