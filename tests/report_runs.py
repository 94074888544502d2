"""Run folders with made-up, deterministic contents, as the watchers of `prerl fit` write them."""

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

FAMILIES = ("transition", "reflection", "subgoal", "enumeration", "backtracking", "conclusion")
LAYERS = ("embedding", "first", "middle", "last", "head")
HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"> '
    "<!--<script> ]]> \u2028 \u202e wait & 'x' \U0001d465\U0001f642 then"
)


def accuracy(step: int, switch: int, speed: float) -> float:
    return round(0.36 + 0.4 * (1 - math.exp(-speed * max(0, step - 0.5 * switch) / 40)), 4)


def wave(step: int, seed: int, size: float) -> float:
    return size * math.sin(1.7 * step + 2.3 * seed)


def training_row(step: int, switch: int, speed: float, seed: int) -> dict[str, float]:
    life = 2 if step > switch > 0 else 1
    right = accuracy(step, switch, speed) + wave(step, seed, 0.03)
    row = {
        "life": life,
        "optim/step": step,
        "reward/mean": right,
        "reward/timeouts": 0,
        "reward/errors": 0,
        "rollout/response_length": 24 + wave(step, seed, 1) + 0.1 * step,
        "rollout/response_length/right": 23 + wave(step, seed, 1),
        "rollout/response_length/wrong": 27 + wave(step, seed, 1),
        "rollout/truncated": 0.01,
        "rollout/entropy": 0.5 * math.exp(-step / 60) + wave(step, seed, 0.01),
        "rollout/repetition": 0.02,
        "rollout/log_prob/right": -0.2,
        "rollout/log_prob/wrong": -0.4,
        "rollout/pass@1": right,
        "rollout/pass@8": min(1, right + 0.3),
        "rollout/groups_mixed": 0.6,
        "rollout/groups_all_right": 0.1 + step / 1000,
        "rollout/groups_all_wrong": 0.3 - step / 1000,
        "rollout/responses": 256,
        "rollout/tokens": 6144,
        "rollout/tokens_per_second": 9000 + wave(step, seed, 500),
        "train/tokens": 4000,
        "train/tokens_per_second": 5000 + wave(step, seed, 200),
        "optim/loss": 0.3 / step,
        "optim/grad_norm": 0.2 + wave(step, seed, 0.05),
        "optim/lr": 5e-5 if life == 1 else 3e-4,
        "mismatch/log_prob_difference": 3e-7,
        "mismatch/kl": 1e-8,
        "weights/change": 0.01 * step,
        "weights/relative_change": 0.001 * step,
        "time/rollout": 0.9,
        "time/reward": 0.01,
        "time/forward_backward": 0.8,
        "time/optimizer": 0.01,
        "time/update_weights": 0.03,
        "time/other": 0.01,
        "time/step": 1.76,
        "time/watchers": 0.05,
        "time/since_start": 2.0 * step + 3,
    }
    for i, family in enumerate(FAMILIES):
        grown = 0.2 * (1 + (i + 1) * step / 40)
        row |= {
            f"thoughts/{family}": grown,
            f"thoughts/{family}/right": grown * 0.8,
            f"thoughts/{family}/wrong": grown * 1.3,
            f"thoughts/{family}_per_1k": grown * 40,
            f"thoughts/{family}_per_1k/right": grown * 35,
            f"thoughts/{family}_per_1k/wrong": grown * 48,
            f"thoughts/{family}_ratio": grown / 0.2,
        }
    if step % 5 == 0:
        row |= {
            "time/alignment": 0.4,
            "rollout/marginal_log_prob/right": -1.9,
            "rollout/marginal_log_prob/wrong": -2.3,
            "alignment/cosine": 0.93 + wave(step, seed, 0.01),
            "alignment/cosine/positive": 0.94,
            "alignment/cosine/negative": 0.91,
            "alignment/inner_product": 3.1 + wave(step, seed, 0.2),
            "alignment/inner_product/positive": 4.0,
            "alignment/inner_product/negative": 2.2,
            "alignment/negative_share": 0.01,
            "alignment/policy_gradient/cosine": 0.88 + wave(step, seed, 0.02),
            "alignment/policy_gradient/inner_product": 0.2,
            **{f"alignment/layers/{name}": 0.7 + 0.05 * i for i, name in enumerate(LAYERS)},
        }
    return row


def validation_row(step: int, switch: int, speed: float, seed: int) -> dict[str, float]:
    right = accuracy(step, switch, speed) + 0.01 * seed
    row = {"val/step": step, "val/length": 24, "val/truncated": 0.002, "val/no_answer": 0.002}
    for name, value in (("avg@8", right), ("pass@8", min(1, right + 0.3)), ("maj@8", right + 0.1), ("greedy", right)):
        row |= {f"val/{name}": value, f"val/{name}/low": value - 0.06, f"val/{name}/high": value + 0.06}
    for i, family in enumerate(FAMILIES):
        row[f"val/thoughts/{family}"] = 0.2 * (1 + (i + 1) * step / 40)
        row[f"val/thoughts/{family}_ratio"] = 1 + (i + 1) * step / 40
    return row


def sample(step: int, number: int, switch: int, text: str | None = None) -> dict[str, Any]:
    a, b = 10 + (7 * step + number) % 80, 10 + (3 * step + 5 * number) % 80
    right = (step + number) % 3 > 0
    said = a + b if right else a + b + 1
    response = text or f"\U0001f642 {a}+{b}={a + b - 10} wait {a}+{b}={said}#{said}"
    before = {"step": step - 10, "response": f"{a}+{b}={a + b - 10}#{a + b - 10}", "reward": 0.0}
    at = response.find("wait")
    return {
        "step": step,
        "life": 2 if step > switch > 0 else 1,
        "objective": "GRPO" if step > switch > 0 else "NSRPreRL",
        "kind": ("best", "worst", "held_out")[number % 3],
        "row": 100 + number,
        "prompt": f"{a}+{b}=?\n",
        "response": response,
        "ground_truth": str(a + b),
        "reward": float(right),
        "truncated": number == 5,
        "tokens": len(response),
        "thoughts": [[at, at + 4, "reflection" if number % 2 else "transition"]] if at >= 0 else [],
        "previous": before if step > 10 else None,
    }


def info(seed: int, switch: int, steps: int, **changes: Any) -> dict[str, Any]:
    first, second = ("NSRPreRL", "GRPO") if switch else ("GRPO", "")
    return {
        "format": 1,
        "command": ["prerl", "fit", "--config", "configs/dsrl.yaml", "--seed_everything", str(seed)],
        "started": "2026-11-21T12:00:00+00:00",
        "ended": "2026-11-21T12:02:00+00:00",
        "status": "finished",
        "error": None,
        "resumed_from": None,
        "lives": [[first, 0], [second, switch]] if switch else [[first, 0]],
        "model": "embedded",
        "parameters": 857344,
        "world_size": 1,
        "strategy": "SingleDeviceStrategy",
        "precision": "32-true",
        "max_steps": steps,
        "seed": seed,
        "thoughts": {family: ["wait"] for family in FAMILIES},
        "machine": {"cpu": "Testium", "cores": 2, "memory_gib": 23.4, "gpus": [], "system": "Linux"},
        "versions": {"prerl-lightning": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "vllm": "0.32.0"},
    } | changes


def config(seed: int, switch: int, steps: int, lr: float = 5e-5) -> str:
    reincarnation = f"""
  callbacks:
  - class_path: prerl_lightning.callbacks.PolicyReincarnation
    init_args:
      at_step: {switch}
      successor: {{class_path: prerl_lightning.objectives.GRPO, init_args: {{lr: 0.0003}}}}
      optimizer: carry"""
    return f"""seed_everything: {seed}
trainer:
  max_steps: {steps}
  logger: null{reincarnation if switch else ""}
model:
  class_path: prerl_lightning.objectives.{"NSRPreRL" if switch else "GRPO"}
  init_args: {{model: embedded, lr: {lr}}}
data:
  train: {{class_path: prerl_lightning.data.tasks.sums.ArithmeticProblems, init_args: {{split: train, size: 4096}}}}
  val: {{class_path: prerl_lightning.data.tasks.sums.ArithmeticProblems, init_args: {{split: held_out, size: 128}}}}
  prompts_per_step: 32
  sampling: {{group_size: 8, max_new_tokens: 64}}
  seed: null
"""


def write_metrics(folder: Path, rows: list[dict[str, float]], end: str = "") -> None:
    header = sorted({name for row in rows for name in row} | {"epoch", "step"})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows({"epoch": 0, "step": 0} | row for row in rows)
        file.write(end)


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    switch: int = 10,
    seed: int = 0,
    speed: float = 1.0,
    lr: float = 5e-5,
    every: int = 10,
    samples: int = 6,
    hostile: bool = False,
    files: tuple[str, ...] = ("config.yaml", "run.json", "samples.jsonl", "alignment.jsonl"),
    first: int = 1,
    end: str = "",
    **changes: Any,
) -> Path:
    """A run that ended, at RUNS/NAME/version_N; ``changes`` are of run.json, ``end`` is appended to metrics.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [] if first > 1 else [validation_row(0, switch, speed, seed)]
    for step in range(first, steps + 1):
        rows.append(training_row(step, switch, speed, seed))
        if step % every == 0:
            rows.append(validation_row(step, switch, speed, seed))
    write_metrics(folder, rows, end)
    if "config.yaml" in files:
        (folder / "config.yaml").write_text(config(seed, switch, steps, lr))
    if "run.json" in files:
        name = folder.parent.name if folder.name.startswith("version_") else folder.name
        (folder / "run.json").write_text(json.dumps({"name": name} | info(seed, switch, steps, **changes)))
    if "samples.jsonl" in files:
        shown = [sample(s, n, switch) for s in range(first, steps + 1) if s == 1 or s % 20 == 0 for n in range(samples)]
        if hostile:
            shown.append(sample(steps, 6, switch, HOSTILE))
            shown[-1]["prompt"] = shown[-1]["ground_truth"] = HOSTILE
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in shown))
    if "alignment.jsonl" in files:
        measured: dict[str, Any] = {
            "tokens": 24,
            "inner_product": 3.0,
            "norm_conditional": 1.0,
            "norm_marginal": 3.3,
        }
        measured |= {"log_prob": -5.0, "marginal_log_prob": -40.0, "layers": {"embedding": 0.9}}
        lines = [
            {"step": s, "row": n, "reward": n % 2, "advantage": n % 2 - 0.5, "cosine": 0.9 + n / 200}
            | measured
            | {key: sample(s, n, switch)[key] for key in ("life", "objective")}
            for s in range(first, steps + 1)
            if s % 5 == 0
            for n in range(8)
        ]
        (folder / "alignment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grow_old(folder: Path, seconds: float, name: str = "metrics.csv") -> None:
    """Makes a file look as if nothing had been written for so long."""
    path = folder / name
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def curve_run(folder, switch: int, seed: int, curve: dict[int, float], seconds: float) -> None:
    """A run with this held-out accuracy; 100 responses and so many seconds a step."""
    write_run(folder, steps=max(curve), switch=switch, seed=seed)
    rows = [{"val/step": s, "val/avg@8": v} for s, v in curve.items()]
    steps = range(1, max(curve) + 1)
    rows += [{"optim/step": s, "rollout/responses": 100, "time/since_start": seconds * s} for s in steps]
    write_metrics(folder, rows)


def rows(html: str) -> list[list[str]]:
    return [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[hd][ >].*?</t[hd]>", row)]
            for row in re.findall(r"<tr>.*?</tr>", html)[1:]]  # fmt: skip


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", html)
