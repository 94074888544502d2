"""Runs as one rank of two (see test_ppo.py): PPO as second life, on ddp and fsdp2, and resumed on the other."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_step import fit

import prerl_lightning.strategies  # noqa: F401
from prerl_lightning.callbacks import PolicyReincarnation
from prerl_lightning.objectives import PPO, NSRPreRL

SWITCH, END = 1, 3


def lives(body, **options):
    options = {"lr": 1e-2, "value_lr": 1e-2, "value_body": body, "gae_lambda": 0.9} | options
    return [PolicyReincarnation(at_step=SWITCH, successor=PPO(**options), optimizer="reset")]


def run(model, body, folder, steps=END, ckpt_path=None, callbacks=None, **options):
    """The policy's weights behind it and, on the first rank, the value model's, as vectors. Each step is saved."""
    host = NSRPreRL(model=model, lr=1e-2) if isinstance(model, str) else model
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = lives(body) if callbacks is None else callbacks
    options = {"enable_checkpointing": True, "callbacks": [*callbacks, saver], **options}
    fit(host, steps, ckpt_path, **options)
    whole = torch.cat([w.flatten() for _, w in sorted(host.live_policy.named_weights())]).double()
    value = host.acting.life_state()["value"]["weights"]  # None but on the first rank
    return whole, torch.cat([torch.zeros(1) if w is None else w.flatten() for w in value.values()]).double()


def main(out: Path, model: str) -> None:
    rank, found = int(os.environ["RANK"]), {}
    for body, strategy in (("own", "ddp"), ("own", "fsdp2"), ("policy", "fsdp2")):
        found[f"{body} {strategy}"] = run(model, body, out / body / strategy, devices=2, strategy=strategy)
    for strategy, other in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        path, folder = out / "own" / other / "step=2.ckpt", out / "resumed" / strategy
        found[f"resumed {strategy}"] = run(model, "own", folder, ckpt_path=path, devices=2, strategy=strategy)
    if rank == 0:
        torch.save(found, out / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
