"""One rank of ``prerl doctor``'s ranks: ``python -m prerl_lightning.doctor.ranks_worker cuda|cpu``.

Started with the variables that Lightning's own launcher sets (LOCAL_RANK, NODE_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), it joins the group by Lightning's strategy. Writes a line of JSON in front of each stage, so that whoever
waits can tell where a rank stands, and one with what it found at the end. A wrong result is an exit status of 1.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

STAGES = (
    "importing packages",
    "joining the process group",
    "ranks.all_reduce",
    "ranks.gather",
    "ranks.gather_state",
    "a broadcast of objects",
    "a barrier",
    "a gloo group, as vLLM makes one",
    "all_reduce and all_gather of 64 MiB",
)
BYTES = 64 << 20


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def at(stage: int) -> None:
    tell(stage=stage)


def expect(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(f"{what} gave a wrong result")


def main(accelerator: str) -> None:
    at(0)
    import lightning as L
    import torch
    import torch.distributed as dist
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from prerl_lightning import ranks
    from prerl_lightning.rollout.engine import Place
    from prerl_lightning.rollout.host import ranks_in_environment

    size = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=size,
        strategy="ddp",
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    strategy: Any = trainer.strategy
    at(1)
    strategy.setup_environment()
    device, rank, everyone = strategy.root_device, ranks.rank(), list(range(size))
    expect(ranks.world_size() == size and rank == strategy.global_rank, "joining the group")
    at(2)
    total = size * (size + 1) / 2
    expect(float(ranks.all_reduce(torch.tensor([rank + 1.0]))) == total, STAGES[2])
    expect(float(ranks.all_reduce(torch.tensor([rank + 1.0], device=device))) == total, STAGES[2])
    expect(int(ranks.all_reduce(torch.tensor(rank), dist.ReduceOp.MAX)) == size - 1, STAGES[2])
    at(3)
    expect(ranks.gather([rank, "x"]) == [x for r in everyone for x in (r, "x")], STAGES[3])
    at(4)
    states = ranks.gather_state(torch.arange(rank + 1.0, device=device))
    expect([s.tolist() for s in states] == [list(range(r + 1)) for r in everyone], STAGES[4])
    at(5)
    expect(strategy.broadcast({"from": rank}) == {"from": 0}, STAGES[5])
    at(6)
    strategy.barrier()
    at(7)
    ones = torch.ones(1)
    dist.all_reduce(ones, group=dist.new_group(backend="gloo"))
    expect(float(ones) == size, STAGES[7])
    at(8)
    whole = torch.zeros(BYTES // 4, device=device)
    part = whole[: len(whole) // size].clone()
    whole = whole[: len(part) * size]

    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # before and from torch 2.13 on

    def rate(call: Callable[[], Any]) -> float:
        """GB/s: bytes of the whole tensor over seconds of a call."""
        seconds = []
        for _ in range(4):
            strategy.barrier()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return BYTES / 1e9 / min(seconds[1:])

    # of a single rank nothing travels, but NCCL has to work even so: vLLM makes such a group
    rates = rate(lambda: dist.all_reduce(whole)), rate(lambda: gather(whole, part))
    place = Place(rank, size, strategy.local_rank, device)
    with ranks_in_environment(place):
        alone = size == 1 and not device.index  # then vLLM takes the first GPU
        engine = 0 if alone else int(os.environ["LOCAL_RANK"])
    tell(
        found={
            "trainer": str(device),
            "engine": engine if device.type == "cpu" else f"cuda:{engine}",
            "backend": str(dist.get_backend_config()),
            "all_reduce_gb_s": round(rates[0], 3) if size > 1 else None,
            "all_gather_gb_s": round(rates[1], 3) if size > 1 else None,
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
