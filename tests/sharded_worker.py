"""Runs as one of two gloo processes (see test_sharded.py): gradients of sharded policies, each case as a vector."""

import itertools
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from prerl_lightning import checkpoints, ranks
from prerl_lightning.callbacks.saving import RunCheckpoint, export_policy
from prerl_lightning.errors import InputError
from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.optimizer import make_optimizer
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.objectives.settings import OptimizerSettings
from prerl_lightning.policy import attention, model
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy
from prerl_lightning.policy.probe import Probe
from prerl_lightning.policy.reference import Reference
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.types import Rollout

WAYS = ("own shards", "own shards, offloaded", "whole, recomputed")


def gradient(module, rollout):
    update = module.make_update(rollout)
    works = [update.work(term) for term in module.terms]
    update.backward(works, torch.ones(len(rollout), dtype=torch.bool), on_policy=True)
    parts = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.policy.parameters()]
    return torch.cat([g.flatten() for g in parts]).double(), sum(int(w.own.sum()) for w in works)


def check_gathered(rank: int, rollout) -> None:
    """Two halves, a prompt each, are the whole again on both ranks."""
    half = Rollout.of(
        rollout.prompts[rank : rank + 1],
        rollout.responses[2 * rank : 2 * rank + 2],
        group_ids=torch.zeros(2, dtype=torch.long),
        rewards=rollout.rewards[2 * rank : 2 * rank + 2],
        policy_version=0,
        temperature=rollout.temperature,
        timeouts=rank + 1,
        errors=rank,
        answered=2,
    )
    found = gathered(half)
    assert [(p.row, p.token_ids) for p in found.prompts] == [(p.row, p.token_ids) for p in rollout.prompts]
    for name in ("group_ids", "tokens", "log_probs", "lengths", "truncated", "rewards"):
        assert torch.equal(getattr(found, name), getattr(rollout, name)), name
    assert (found.timeouts, found.errors, found.answered) == (3, 1, 4)


def strategy_of(precision: str, **options) -> FSDP2Strategy:
    strategy = FSDP2Strategy(**options)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    if precision == "bf16-mixed":
        strategy.precision_plugin = MixedPrecision(precision, "cpu")
    return strategy


def from_own_shards(folder: str, strategy: FSDP2Strategy, **options) -> Policy:
    """And never the whole."""
    with patch.object(model, "load_model", None):
        return Policy.from_pretrained(folder, sharding=strategy, **options)


def check_loaded(folder: str, lora: Lora | None = None) -> None:
    """Bit for bit, buffers that are in no file among them."""
    whole = Policy.from_pretrained(folder, lora=lora)
    policy = from_own_shards(folder, strategy_of("bf16-mixed"), lora=lora)
    theirs = dict(whole.named_parameters())
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.requires_grad == theirs[name].requires_grad
        assert torch.equal(parameter.full_tensor(), theirs.pop(name)), name  # and types
    assert not theirs
    if lora is not None:
        assert policy.adapters.base == whole.adapters.base
        assert policy.state_dict().keys() == whole.state_dict().keys()
    theirs = dict(whole.named_buffers())
    for name, buffer in policy.named_buffers():
        assert torch.equal(buffer, theirs.pop(name)), name
    assert not theirs
    for name in ("logit_scale", "logit_softcap", "can_pack", "can_share", "head_shapes"):
        assert getattr(policy, name) == getattr(whole, name)
    assert policy.model.config._attn_implementation == whole.model.config._attn_implementation == attention.NAME
    assert policy.model.generation_config.to_dict() == whole.model.generation_config.to_dict()


def check_refused(folder: str, out: Path, rank: int) -> None:
    """Of weights that are not finite in one rank's rows both say which; of others the loading of the whole does."""
    weights = load_file(f"{folder}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for spoiled, words in ((weights[name].clone(), "are not finite"), (weights[name][1:].clone(), "another shape")):
        spoiled[-1, 0] = float("nan")
        there = out / words.replace(" ", "_")
        if rank == 0:
            shutil.copytree(folder, there)
            save_file(weights | {name: spoiled}, there / "model.safetensors", {"format": "pt"})
        dist.barrier()
        with pytest.raises(InputError, match=f"{words}.*: {name}"):
            Policy.from_pretrained(str(there), sharding=strategy_of("32-true"))


def check_folder(folder: str, out: Path, rank: int) -> None:
    """Written by two ranks, and read by two, also what one process has written; a full disk of one is that of all."""
    policy = from_own_shards(folder, strategy_of("32-true"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    weights = {f"policy.{name}": tensor for name, tensor in policy.state_dict(keep_vars=True).items()}
    configuration = {"model": {"init_args": {"model": folder}}}
    checkpoint = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "configuration": configuration}
    reference = Reference(policy).state_dict(policy, sharded=True)
    checkpoint |= {"lives": {"reference": reference}}
    checkpoint |= {"loops": {}, "pytorch-lightning_version": "2.6", "global_step": 1}
    path = out / "checkpoints" / "step=1.ckpt"
    for _ in range(2):  # the second in the place of the first
        checkpoints.save_folder(checkpoint, path)
    assert os.listdir(path.parent) == [path.name]
    dist.barrier()  # else the other rank may have begun the next one
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, -1))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(checkpoints.NotWritten, match=r"step=1\.ckpt could not be written \(.*File too large"):
        checkpoints.save_folder(checkpoint, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    dist.barrier()
    assert os.listdir(path.parent) == [path.name]

    whole = checkpoints.read(path, checkpoints.load(path))
    if rank == 0:
        checkpoints.save_folder(whole, out / "alone.ckpt", alone=True)
        torch.save(whole, out / "whole.ckpt")
    export_policy(policy, out / "exported", torch.bfloat16, write=rank == 0)
    dist.barrier()
    strategy = strategy_of("32-true")
    for source in (path, out / "alone.ckpt"):
        again = from_own_shards(folder, strategy)
        strategy.model, optimizers = L.LightningModule(), [torch.optim.AdamW(again.parameters())]
        strategy.model.policy, strategy.optimizers = again, optimizers
        found = strategy.load_checkpoint(source)
        assert found["configuration"] == configuration
        anchored = Reference(again)
        anchored.load_state_dict(again, found["lives"]["reference"])
        assert all(torch.equal(anchored.shards[n], t.to_local()) for n, t in reference.items())
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter.full_tensor(), whole["state_dict"][f"policy.{name}"]), name
        state, expected = optimizers[0].state_dict(), whole["optimizer_states"][0]
        assert state["param_groups"] == expected["param_groups"]
        for number, moments in expected["state"].items():
            for name, moment in moments.items():
                assert torch.equal(ranks.full(state["state"][number][name]), moment), (number, name)


class Plain(L.LightningModule):
    """Trains a policy on the same few tokens again and again."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.policy = folder, None

    def configure_model(self) -> None:
        if self.policy is None:
            strategy = self.trainer.strategy
            sharding = strategy if isinstance(strategy, FSDP2Strategy) else None
            self.policy = Policy.from_pretrained(self.folder, sharding=sharding)

    def configure_optimizers(self):
        return make_optimizer(self.policy, OptimizerSettings(1e-2, torch.optim.AdamW, False, "constant", 0, 0.0))

    def train_dataloader(self):
        return DataLoader(range(8))

    def training_step(self, batch, batch_idx):
        self.policy.zero_grad()
        self.manual_backward(-Probe(self.policy).packed().mean())
        self.optimizers().step()


def fit(folder: str, out: Path, strategy: str, steps: int, ckpt_path: Path | None = None, sharded: bool = False):
    """(weights,) float64 after so many steps, a checkpoint at each."""
    module, checkpoint = Plain(folder), RunCheckpoint(1, str(out), save_top_k=-1, sharded=sharded)
    trainer = quiet_trainer(
        devices=2 if strategy == "fsdp2" else 1,
        strategy=strategy,
        max_steps=steps,
        callbacks=[checkpoint],
        enable_checkpointing=True,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return torch.cat([tensor.flatten() for _, tensor in sorted(module.policy.named_weights(torch.float64))])


def check_run(folder: str, out: Path, rank: int) -> None:
    """Resumed from a folder of shards, writing folders or files, as if never interrupted."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}
    whole = fit(folder, out / "run", "fsdp2", 3, sharded=True)
    names = ["last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert sorted(os.listdir(out / "run")) == names
    assert all((out / "run" / name / "meta.pt").is_file() for name in names)
    assert (out / "run" / "last.ckpt" / "meta.pt").samefile(out / "run" / "step=3.ckpt" / "meta.pt")
    for sharded in (True, False):
        again = out / f"resumed {sharded}"
        assert torch.equal(fit(folder, again, "fsdp2", 3, out / "run" / "step=1.ckpt", sharded), whole)
        assert (again / "step=3.ckpt").is_dir() == sharded
    if rank == 0:
        torch.save(whole, out / "weights.pt")


def main(rank: int, out: Path, folders: dict[str, str], rollout) -> None:
    from test_update import attached

    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    check_gathered(rank, rollout)
    for folder in folders.values():
        for lora in (None, Lora(rank=4), Lora(rank=4, base="bfloat16")):
            check_loaded(folder, lora)
    check_refused(folder, out, rank)
    check_folder(folders["llama-tied"], out, rank)
    check_run(folders["llama-tied"], out, rank)
    cases = itertools.product(folders, ("32-true", "bf16-mixed"), WAYS, (GRPO, NSRPreRL))
    for shape, precision, way, objective in cases:
        module, strategy = objective(model=folders[shape]), strategy_of(precision, cpu_offload="offloaded" in way)
        if "recomputed" in way:  # loaded whole, which needs no Trainer
            module = attached(objective, folders[shape], gradient_checkpointing=True)
            strategy.shard(module.policy)
        else:
            module.policy = from_own_shards(folders[shape], strategy)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            found, own = gradient(module, rollout)
        name = f"{shape}-{precision}-{way}-{objective.__name__}"
        torch.save({"gradient": found, "own": own}, out / f"{name}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *torch.load(Path(sys.argv[2]) / "input", weights_only=False))
