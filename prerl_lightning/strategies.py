"""``fsdp2`` for Lightning: shards parameters, gradients and optimizer states over all ranks (torch's `fully_shard`).

Lightning's own ModelParallelStrategy leaves the sharding to each module and defaults to tensor parallelism inside a
node; this one shards the policy by the model's own blocks, on CPU (gloo) and CUDA, and writes one-file checkpoints,
which load under every other strategy. Registered as ``fsdp2``. Lightning's ``fsdp`` is FSDP1, which refuses CPUs and
is not what this library was written for.
"""

from datetime import timedelta
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from prerl_lightning.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed")


class FSDP2Strategy(ModelParallelStrategy):
    """Data parallel over all ranks, everything sharded.

    Args:
        reshard_after_forward: free a block's full weights after its forward pass, and gather them again for the
            backward pass; False: more memory, less traffic.
        cpu_offload: refused: weights and gradients would lie in host memory, where clipping, the output head and the
            engine's update look for them on the GPU.
        process_group_backend: default: nccl on CUDA, gloo on CPU.
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
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    def setup_environment(self) -> None:
        if self.cpu_offload:
            raise InputError(
                "trainer.strategy: fsdp2's cpu_offload is not supported: clipping, the output head and the engine's "
                "update take weights and gradients from the GPU. What helps where memory is short: "
                "model.init_args.gradient_checkpointing: true, more GPUs, a smaller model."
            )
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        if trainer.precision not in PRECISIONS:
            raise InputError(f"trainer.precision: fsdp2 takes one of {', '.join(PRECISIONS)}, not {trainer.precision}.")
        policy = cast(Any, self.lightning_module).policy
        if policy is not None and not getattr(policy, "is_sharded", False):
            self.shard(policy, trainer.precision)
        super().setup(trainer)

    def shard(self, policy: nn.Module, precision: str) -> None:
        """Shard each block that the model calls unsplittable, then what is left (embedding, norm, head)."""
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "reshard_after_forward": self.reshard_after_forward,
        }
        if precision == "bf16-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        blocks = set(getattr(policy.model, "_no_split_modules", None) or ())
        found = [m for m in policy.modules() if type(m).__name__ in blocks]
        if not found:
            raise InputError(f"fsdp2: {type(policy.model).__name__} does not name its blocks (_no_split_modules).")
        for block in found:
            fully_shard(block, **options)
        fully_shard(policy, **options)
        policy.is_sharded = True  # type: ignore[assignment]


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks, on CPU or CUDA")
