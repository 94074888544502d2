"""What ranks do together, outside the hooks of DDP and FSDP2: all collective calls of this library.

Every rank has to make them. A group may be NCCL's alone, which takes no tensors on the CPU, even of one rank: vLLM
makes such a group on a single GPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def collective_device() -> torch.device:
    """Where tensors have to lie for the process group."""
    devices = [part.partition(":")[0] for part in str(dist.get_backend_config()).split(",")]
    return torch.device("cpu") if "cpu" in devices else torch.device(devices[0], torch.cuda.current_device())


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``tensor`` reduced over all ranks, on its device; the one given may change."""
    if world_size() == 1:
        return tensor
    there = tensor.to(collective_device())
    dist.all_reduce(there, op)
    return there.to(tensor.device)


def gather(rows: list[Any]) -> list[Any]:
    """Those of each rank, one behind the other. Tensors among them must be on the CPU."""
    if world_size() == 1:
        return rows
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def gather_state(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Each rank's ``tensor``, of any sizes: for torchmetrics, whose own function leaves it on the CPU."""
    return [part.to(tensor.device) for part in gather([tensor.cpu()])]


def held_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor in the type of ``parameter`` and where that lies, sharded as it is. Collective under FSDP2."""
    if isinstance(tensor, DTensor) and isinstance(parameter, DTensor):  # a checkpoint's of shards, on the same mesh
        return tensor.to(parameter.dtype)
    there = full(tensor).to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return there
    return distribute_tensor(there, parameter.device_mesh, parameter.placements)


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor that FSDP2 has sharded, and which row it begins with; another one as it is. Cut is
    as `torch.chunk` does it: the last ranks may have fewer rows or none."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of one that FSDP2 has sharded; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full(tensor: Tensor, whole: Tensor) -> None:
    """``whole`` into ``tensor``, which FSDP2 may have sharded."""
    local(tensor).copy_(local(held_as(whole, tensor)))
