"""Runs as one of two gloo processes (see test_sharded.py): gradients of sharded policies, each case as a vector."""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from prerl_lightning.objectives import GRPO, NSRPreRL
from prerl_lightning.objectives.passes import gathered
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.types import Rollout


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


def main(rank: int, out: Path, folders: dict[str, str], rollout) -> None:
    from test_update import attached

    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    check_gathered(rank, rollout)
    cases = itertools.product(folders, ("32-true", "bf16-mixed"), (False, True), (GRPO, NSRPreRL))
    for shape, precision, checkpointing, objective in cases:
        module = attached(objective, folders[shape], gradient_checkpointing=checkpointing)
        strategy = FSDP2Strategy()
        strategy._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        strategy.shard(module.policy, precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            found, own = gradient(module, rollout)
        name = f"{shape}-{precision}-{checkpointing}-{objective.__name__}"
        torch.save({"gradient": found, "own": own}, out / f"{name}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *torch.load(Path(sys.argv[2]) / "input", weights_only=False))
