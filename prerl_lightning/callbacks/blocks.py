"""What a person reads of a run in the terminal: one block at its start, one at its end."""

import logging
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

from prerl_lightning.callbacks.saving import RunCheckpoint
from prerl_lightning.callbacks.watcher import callbacks_of, run_folder
from prerl_lightning.compat import is_trial
from prerl_lightning.data.mixture import settings_of
from prerl_lightning.metrics.intervals import difference
from prerl_lightning.objectives.base import PolicyModule
from prerl_lightning.report import words
from prerl_lightning.report.reading import read_run
from prerl_lightning.report.runs import Run, chain, objective

log = logging.getLogger(__name__)

WIDTH, LABEL = 100, 12  # columns
STAGES = {
    "rollouts": ("rollout", "reward"),
    "training": ("forward_backward", "optimizer", "statistics"),
    "weights to the engine": ("update_weights",),
    "watching": ("watchers",),
}

Lines = Iterator[tuple[str, str]]


class Blocks(L.Callback):
    """Logs them, where the run has a folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: PolicyModule) -> None:  # type: ignore[override]
        folder = run_folder(trainer)  # collective
        if trainer.is_global_zero and not is_trial(trainer):
            self.folder = folder
            log.info("\n%s\n", block(opening(trainer, pl_module, folder)))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder is not None and (self.folder / "metrics.csv").is_file():
            best = next((c for c in callbacks_of(trainer, RunCheckpoint) if c.monitor and c.best_model_path), None)
            log.info("\n%s", block(closing(read_run(self.folder), self.folder, best)))  # with what it was resumed from


def opening(trainer: L.Trainer, host: PolicyModule, folder: Path | None) -> Lines:
    data, policy = host.data, host.live_policy
    size, trained = (sum(p.numel() for p in some) for some in (policy.parameters(), (p for _, p in policy.trained())))
    adapted = f", {words.count(trained)} of them trained" if trained < size else ""
    where = f"{trainer.world_size} ranks, {host.compute_device.type}" if trainer.world_size > 1 else host.compute_device
    yield "model", f"{host.model_name}, {words.count(size)} parameters{adapted}, {trainer.precision}, on {where}"
    begin = ["by" if host.endings.get(life, "") is None else "from" for life in range(len(host.lives))]
    lives = [f"{objective(n)}{f' {begin[i]} step {first}' if first else ''}" for i, (n, first) in enumerate(host.lives)]
    steps, epochs = trainer.max_steps, trainer.max_epochs or 0
    end = words.steps(steps) if steps > 0 else words.some(epochs, "epoch") if epochs > 0 else "no last step"
    resumed = f", resumed behind step {trainer.global_step}" if trainer.global_step else ""
    yield "objective", f"{', '.join(lives)}; {end}{resumed}"
    groups = f"{data.prompts_per_step} prompts x {data.sampling.group_size} responses a step"
    sets = ", ".join(type(settings_of(problems).problems).__name__ for problems in data.training_sets.values())
    yield "training", f"{sets}, {data.size_of('train'):,} problems; {groups}"
    said = [
        f"{type(settings_of(problems).problems).__name__}, {data.size_of(key):,} problems, {data.samples_of(key)[0]} "
        "responses each"
        for key, problems in data.held_out.items()
    ]
    yield "held out", "; ".join(said) or "nothing (data.val)"
    dtype = str(data.engine.weights_dtype).removeprefix("torch.")
    longest = max(s.max_new_tokens for s in data.training_samplings)
    yield "engine", f"{type(data.engine).__name__}, {dtype}, responses of up to {longest:,} tokens"
    if folder is not None:
        yield "folder", str(folder)
        yield "watch it", "prerl watch"


def closing(run: Run, folder: Path, best: RunCheckpoint | None) -> Lines:
    """
    Args:
        folder: as the user knows it.
        best: keeps it.
    """
    seconds = max(run.seconds.values(), default=0.0)
    before = ", with those that it was resumed behind" if run.info.get("resumed_from") else ""
    took = f"{words.duration(seconds)}, the start apart{before}"
    yield run.status()[0], f"{words.steps(run.steps)} of {chain(run)} in {took}"
    for label, text in words.moved(run):
        yield label, text + (noise(run) if label == "held out" else "")
    if shares := stages(run, seconds):
        yield "time", shares
    if best is not None:
        score = float(cast(Any, best.best_model_score))
        yield "best", f"{best.monitor} {score:.3f}: {best.best_model_path}"
    yield "folder", str(folder)
    model = folder / "model"
    if model.is_dir():
        yield "model", str(model)
    yield "next", f"prerl report {folder} -o report.html"
    if model.is_dir():
        own = bool(run.config_text) and run.accuracy is not None  # problems held out, whatever they are
        of = f"--config {folder / 'config.yaml'} --model {model}" if own else f"--model {model} --data SET"
        in_python = own and "__main__." in run.config_text  # of a script or cell, which no command can import
        yield "", f'prerl.evaluate("{model}", k=8, datamodule=...)' if in_python else f"prerl evaluate {of} --k 8"
        yield "", f"vllm serve {model}"


def noise(run: Run) -> str:
    """The change of accuracy with its 95 % interval, of the same problems first and last; or nothing."""
    if len(run.held_out) < 2:
        return ""
    lines = [run.held_out[end(run.held_out)] for end in (min, max)]
    if lines[0]["rows"] != lines[1]["rows"]:
        return ""
    first, last = (torch.tensor(line["score"], dtype=torch.float64) / line["k"] for line in lines)
    found = difference(first, last)
    small = "" if found["low"] > 0 or found["high"] < 0 else ", which may be noise"
    return (
        f" of {words.some(len(first), 'problem')}: {found['difference']:+.2f} "
        f"[{found['low']:+.2f}, {found['high']:+.2f}]{small}"
    )


def stages(run: Run, seconds: float) -> str:
    """Shares of the wall time."""
    if seconds <= 0:
        return ""
    known = {
        stage: sum(sum(run.column(f"time/{part}").values()) for part in parts) / seconds
        for stage, parts in STAGES.items()
    }
    known["start, validation, saving"] = max(0.0, 1 - sum(known.values()))
    return ", ".join(f"{stage} {share:.0%}" for stage, share in known.items() if share >= 0.005)


def block(lines: Iterable[tuple[str, str]]) -> str:
    """Label and text, wrapped at 100 columns where there are spaces."""
    made = []
    for label, text in lines:
        wrapped = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
        made += [f"{label if i == 0 else '':<{LABEL}}{line}" for i, line in enumerate(wrapped)]
    return "\n".join(made)
