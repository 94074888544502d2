"""Short runs with LoRA (see test_lora.py), in this process or, as a script, as one of two ranks under ddp and fsdp2."""

import sys
from pathlib import Path

import lightning as L
import torch
from parity import parity_reward
from plain_engine import PlainEngine
from trainers import quiet_trainer

import prerl_lightning.strategies  # noqa: F401
from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.callbacks.saving import RunCheckpoint, export
from prerl_lightning.data.module import RolloutDataModule
from prerl_lightning.data.tasks.sums import ArithmeticProblems
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.policy.lora import Lora
from prerl_lightning.rewards.pool import Verification
from prerl_lightning.rollout.engine import Sampling

LORA = Lora(rank=4, alpha=8)
MERGED, END = 2, 4


def fit(model, engine, folder=None, steps=END, callbacks=(), ckpt_path=None, **trainer):
    L.seed_everything(0, verbose=False)
    data = RolloutDataModule(
        train=ArithmeticProblems("train", 64),
        reward=parity_reward,
        verification=Verification(workers=0),
        sampling=Sampling(group_size=3, max_new_tokens=5),
        engine=engine,
        prompts_per_step=4,
    )
    callbacks = list(callbacks)
    if folder is not None:
        callbacks.append(RunCheckpoint(every_n_train_steps=1, save_top_k=-1, dirpath=str(folder)))
    trainer = quiet_trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=folder is not None, **trainer)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def two_lives(model, folder, ckpt_path=None, lora=LORA, kl=0.0, **trainer):
    """NSR-PreRL, and then GRPO with its adapters folded in; the first life's module."""
    first = NSRPreRL(model=model, lr=1e-2, lora=lora, kl_coefficient=kl)
    second = PolicyReincarnation(MERGED, GRPO(lr=1e-2, kl_coefficient=kl), optimizer="reset", merge=lora is not None)
    fit(first, PlainEngine(), folder, callbacks=[second], ckpt_path=ckpt_path, **trainer)
    return first


def weights(module):
    return dict(module.live_policy.named_weights(torch.float32))


def main(rank: int, out: Path, model: str) -> None:
    resumed = {"ddp": "fsdp2", "fsdp2": "ddp"}  # each from the other's, behind the merge
    for strategy, other in [*((strategy, None) for strategy in resumed), *resumed.items()]:
        ckpt_path = out / other / "step=3.ckpt" if other else None
        folder = out / (f"{strategy}_resumed" if other else strategy)
        module = two_lives(model, folder, ckpt_path, kl=0.1, strategy=strategy, devices=2)
        found = weights(module)
        if rank == 0:
            torch.save(found, folder / "weights.pt")
        export(module, folder / "model", torch.float32, write=rank == 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
