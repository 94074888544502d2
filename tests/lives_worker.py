"""Runs under 1 or 2 processes (see test_lives.py): DSRL in several ways on one strategy, the weights of each saved.

Real vLLM, one engine a process, shared by all runs. When they are done it says so, waits, and goes on with the runs of
other strategies whose folders it is told of.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from parity import parity_reward
from torch.optim import SGD
from trainers import quiet_trainer

import prerl_lightning.strategies  # noqa: F401
from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.alignment import GradientAlignment
from prerl_lightning.callbacks.health import RunHealth
from prerl_lightning.callbacks.record import RunRecord
from prerl_lightning.callbacks.samples import Samples
from prerl_lightning.callbacks.saving import ExportModel, RunCheckpoint
from prerl_lightning.callbacks.thoughts import Thoughts
from prerl_lightning.callbacks.weights import WeightChange
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.errors import RunError
from prerl_lightning.objectives import GRPO, MixedRL, NSRPreRL, PolicyModule
from prerl_lightning.objectives.until import Until
from prerl_lightning.rollout.engine import Sampling
from prerl_lightning.rollout.vllm_engine import VLLMEngine

SWITCH, END = 2, 4
ENGINE = VLLMEngine(max_model_len=64, kv_cache_mib=32)


class Drawn(L.Callback):
    """Each rank's prompts, step by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        with (self.folder / f"drawn_{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, [prompt.row for prompt in batch]]) + "\n")


def fit(
    folder: Path, strategy: str, model: PolicyModule, callbacks, steps=END, ckpt_path=None, **checkpoint
) -> PolicyModule:
    L.seed_everything(0)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=parity_reward,
        val=ArithmeticProblems("held_out", 5),
        sampling=Sampling(group_size=3, max_new_tokens=16),
        engine=ENGINE,
        prompts_per_step=4,
        val_samples=2,
    )
    checkpoint = {"every_n_train_steps": 1, "save_top_k": -1, **checkpoint}
    trainer = quiet_trainer(
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        max_steps=steps,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[*callbacks, Drawn(folder), RunCheckpoint(**checkpoint, dirpath=str(folder / "checkpoints"))],
        val_check_interval=2,
        log_every_n_steps=1,
        enable_checkpointing=True,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    weights = dict(model.live_policy.named_weights())
    if trainer.is_global_zero:
        torch.save({k: v.cpu() for k, v in weights.items()}, folder / "weights.pt")
    trainer.strategy.barrier()
    return model


def lives(optimizer="carry", kl=0.0):
    """kl in life 2: its reference is anchored at the switch, and has to survive a resume."""
    successor = GRPO(lr=2e-3, kl_coefficient=kl)
    return [PolicyReincarnation(at_step=SWITCH, successor=successor, optimizer=optimizer)]


def watchers(families: Path):
    alignment = GradientAlignment(every_n_steps=1, responses=4, likelihoods=6, bins=2)
    return [Thoughts(str(families), rule="seal"), alignment, WeightChange(1), Samples(1, 2, 2), RunRecord()]


def main(out: Path, model: str, strategy: str) -> None:
    def first() -> NSRPreRL:
        return NSRPreRL(model=model, lr=1e-3, mismatch_samples=2)

    whole = fit(out / "whole", strategy, first(), lives())
    assert type(whole.acting) is GRPO
    assert whole.acting.policy is whole.policy
    for step in (1, 2, 3):
        path = out / "whole" / "checkpoints" / f"step={step}.ckpt"
        resumed = fit(out / f"resumed_{step}", strategy, first(), lives(), ckpt_path=path)
        assert type(resumed.acting) is GRPO

    # one run of life 1 alone, saved at the switch, goes on as plain GRPO with the same optimizer state
    fit(out / "life_1", strategy, first(), [], steps=SWITCH)
    path = out / "life_1" / "checkpoints" / f"step={SWITCH}.ckpt"
    if os.environ.get("RANK", "0") == "0":
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["lives"]["schedule"] = [["GRPO", 0]]
        torch.save(checkpoint, path)
    fit(out / "sequential", strategy, GRPO(model=model, lr=2e-3), [], ckpt_path=path)

    # plain gradient descent, one step: the move is the gradient; cut as finely as can be where there are two ranks
    pieces = None if strategy == "auto" else 1
    descent = MixedRL(
        0.5, model=model, lr=0.1, optimizer=lambda p: SGD(p, lr=0.1), gradient_clip=0.0, micro_batch_size=pieces
    )
    fit(out / "gradient", strategy, descent, [], steps=1)

    fit(out / "reset", strategy, first(), lives("reset"))
    fit(out / "kl", strategy, first(), lives(kl=0.1))
    fit(out / "kl_resumed", strategy, first(), lives(kl=0.1), ckpt_path=out / "kl" / "checkpoints" / "step=3.ckpt")

    # everything that watches, at every step; in front of the lives, which may not matter
    families = out / "families.yaml"
    families.write_text("equals: ['=']\nplus: ['+']\n")

    # one of which ends the first life where it ends in the other runs
    def until_moved() -> PolicyReincarnation:
        until = Until("weights/change", mode="min", patience=1)
        return PolicyReincarnation(END - 1, GRPO(lr=2e-3), until=until)

    fit(out / "watched", strategy, first(), [*watchers(families), until_moved()])
    path = out / "watched" / "checkpoints" / "step=3.ckpt"
    fit(out / "watched_resumed", strategy, first(), [*watchers(families), until_moved()], ckpt_path=path)
    # a ruined policy: all ranks end together, and leave what was good
    later = PolicyReincarnation(at_step=1, successor=GRPO(lr=1e38))
    try:
        fit(out / "ruined", strategy, GRPO(model=model), [RunHealth(), RunRecord(), ExportModel(), later])
    except RunError as error:
        (out / "ruined" / f"error_{os.environ.get('RANK', '0')}").write_text(str(error))

    fit(out / "sketched", strategy, first(), [GradientAlignment(every_n_steps=1, sketch=8191)], steps=1)

    # checkpoints written in front of the validation of their step, as if the run had been killed between the two; and
    # the best of validations, at which none is due
    early = ModelCheckpoint(out / "early", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    best = {"monitor": "val/length", "every_n_train_steps": 100, "save_top_k": 1}
    fit(out / "odd", strategy, first(), [*lives(), early], steps=3, **best)
    for step in (2, 3):
        path = out / "early" / f"step={step}.ckpt"
        fit(out / f"owed_{step}", strategy, first(), [*lives(), RunRecord(), ExportModel()], 3, path, **best)

    (out / f"done_{os.environ.get('RANK', '0')}").touch()
    while not (out / "others").exists():
        assert multiprocessing.parent_process().is_alive()
        time.sleep(0.1)
    for other in map(Path, (out / "others").read_text().split()):
        path = other / "whole" / "checkpoints" / "step=1.ckpt"
        fit(out / f"from_{other.name}", strategy, first(), lives(), ckpt_path=path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
