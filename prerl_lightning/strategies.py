"""``fsdp2`` for Lightning: shards parameters, gradients and optimizer states over all ranks (torch's `fully_shard`).

Lightning's own ModelParallelStrategy leaves the sharding to each module and defaults to tensor parallelism inside a
node; this one shards the policy by the model's own blocks, on CPU (gloo) and CUDA, and writes checkpoints of one file,
or of a folder of shards (checkpoints.py), which load under every other strategy. Registered as ``fsdp2``. Lightning's
``fsdp`` is FSDP1, which refuses CPUs and is not what this library was written for.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import empty
from torch.optim import Optimizer

from prerl_lightning import checkpoints
from prerl_lightning.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2Strategy(ModelParallelStrategy):
    """Data parallel over all ranks, everything sharded.

    Args:
        reshard_after_forward: free a block's full weights after its forward pass, and gather them again for the
            backward pass; False: more memory, less traffic.
        cpu_offload: weights, gradients and optimizer lie in host memory, and the optimizer steps there; a block's
            weights are on the GPU while it computes.
        process_group_backend: default: nccl on CUDA, gloo on CPU, both with ``cpu_offload``.
        timeout: of collectives, in seconds.

    Mixed precision follows ``trainer.precision``: with ``bf16-mixed`` weights are gathered and multiplied in bfloat16,
    while shards, gradient reduction and optimizer are fp32.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: int = 1800,
    ) -> None:
        if cpu_offload and torch.cuda.is_available():  # norms of gradients are reduced where these lie
            process_group_backend = process_group_backend or "cuda:nccl,cpu:gloo"
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self.sharded_checkpoints = False

    @property
    def home(self) -> torch.device:
        """Of parameters, gradients and optimizer."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.precision not in PRECISIONS:
            raise InputError(f"trainer.precision: fsdp2 takes one of {', '.join(PRECISIONS)}, not {trainer.precision}.")
        policy = cast(Any, self.lightning_module).policy
        if policy is not None and not getattr(policy, "is_sharded", False):
            self.shard(policy)
        super().setup(trainer)

    def shard(self, policy: nn.Module, precision: str | None = None) -> None:
        """Shard each block that the model calls unsplittable, then what is left (embedding, norm, head).

        Args:
            policy: its parameters may be on the meta device, and stay there.
            precision: default: the Trainer's. Another one is for a comparison, between whose passes nothing may stay
                gathered.
        """
        policy.compute_device = self.root_device  # type: ignore[assignment]
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "reshard_after_forward": self.reshard_after_forward or precision is not None,
        }
        if (precision or self.precision_plugin.precision) == "bf16-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device_mesh.device_type == "cuda")
        blocks = set(getattr(policy.model, "_no_split_modules", None) or ())
        found = [m for m in policy.modules() if type(m).__name__ in blocks]
        if not found:
            raise InputError(f"fsdp2: {type(policy.model).__name__} does not name its blocks (_no_split_modules).")
        for block in found:
            fully_shard(block, **options)
        fully_shard(policy, **options)
        register_fsdp_forward_method(policy, "logits")
        policy.is_sharded = True  # type: ignore[assignment]

    def model_to_device(self) -> None:
        if not self.cpu_offload:  # else `fully_shard` has moved the buffers
            super().model_to_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.sharded_checkpoints:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return self.model.state_dict(keep_vars=True)  # tied weights are one object

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if not self.sharded_checkpoints:
            return super().optimizer_state(optimizer)
        return getattr(optimizer, "optimizer", optimizer).state_dict()  # numbered as under any other strategy

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.sharded_checkpoints:
            checkpoints.save_folder(checkpoint, Path(self.broadcast(filepath)))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return self._load_folder(path, weights_only is not False)
        return self._load_file(path, weights_only)

    def _load_folder(self, path: Path, weights_only: bool) -> dict[str, Any]:
        assert self.model is not None
        own, tree = self.model.state_dict(keep_vars=True), checkpoints.load(path, weights_only)
        like = {parameter.shape: parameter.detach() for parameter in self.model.parameters()}
        if not self.optimizers:
            tree.pop("optimizer_states", None)

        def make(place: str, tensor: Tensor) -> Tensor:
            if place.startswith("state_dict."):
                return own[place.removeprefix("state_dict.")].detach()
            if (alike := like.get(tensor.shape)) is not None:
                return torch.empty_like(alike, dtype=tensor.dtype)
            return empty(tensor.shape, dtype=tensor.dtype, device_mesh=self.device_mesh["data_parallel"])

        checkpoint = checkpoints.read(path, tree, make, collective=True)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            optimizer.load_state_dict(state)
        return checkpoint

    def _load_file(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """One of another strategy numbers its optimizer's parameters in the order of its groups, which Lightning takes
        for the model's order: the moments would go to other parameters."""
        optimizers, self.optimizers = self.optimizers, []
        checkpoint = super().load_checkpoint(path, weights_only)
        self.optimizers = optimizers
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        for optimizer, state in zip(optimizers, checkpoint["optimizer_states"] if optimizers else [], strict=True):
            assert self.model is not None
            set_optimizer_state_dict(self.model, optimizer, _by_name(state, optimizer, self.model), options=options)
        return checkpoint


def _by_name(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's saved state with the parameters' names instead of numbers, each by its place in its group, as
    torch's own `load_state_dict` has it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**saved, "params": [names[parameter] for parameter in own["params"]]}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    name_of = {
        number: name
        for saved, group in zip(state["param_groups"], groups, strict=True)
        for number, name in zip(saved["params"], group["params"], strict=True)
    }
    return {"state": {name_of[number]: each for number, each in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks, on CPU or CUDA")
