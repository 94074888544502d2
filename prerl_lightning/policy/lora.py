"""LoRA (arXiv 2106.09685): the base is frozen, and linear layers learn a product of two thin matrices beside it.

    y = W x + alpha / rank * B A x        A (rank, in) is drawn, B (out, rank) starts at zero

Computed here: peft cannot be imported without accelerate, whose presence changes how transformers loads models, and
its wrapper renames the base's weights. The folder that `Adapters.save` writes is peft's.

All that knows of a model's weights (engine, export, sketches) sees W + alpha / rank * B A, made when it is asked for.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from prerl_lightning import ranks
from prerl_lightning.errors import InputError, check_bounds, nearest

KEY = "model.init_args.lora"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of linear layers, which alone are trained; the model's own weights are frozen.

    Args:
        rank: of the product that is added to a layer's weight.
        alpha: the product is multiplied by alpha / rank.
        targets: names of linear layers, such as ``[q_proj, v_proj]``, or ``all-linear``: each but the output head.
        dropout: 0 alone: the log-probs of a sampled response must be those that it was sampled with.
        base: what linear layers and embeddings rest in: ``float32``, or ``bfloat16`` in half the memory, for
            ``trainer.precision: bf16-mixed``. The adapters are fp32.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | Literal["all-linear"] = "all-linear"
    dropout: float = 0.0
    base: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_bounds(self, KEY, {"rank": 1}, above={"alpha": 0})
        if self.dropout:
            raise InputError(
                f"{KEY}.dropout: {self.dropout}: the log-probs of a response would not be those that it was sampled "
                "with. Write 0, or leave it out."
            )


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. Its own ``weight`` and ``bias`` keep their names."""

    def __init__(self, linear: nn.Linear, lora: Lora) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.alpha / lora.rank
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.zeros(lora.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, lora.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """(out, in) fp32, sharded by rows as ``weight`` is; collective then."""
        a: Tensor = self.lora_A
        if isinstance(a, DTensor):
            a = a.redistribute(placements=[Replicate()] * a.device_mesh.ndim)
        with torch.autocast(a.device.type, enabled=False):
            return torch.addmm(self.weight.to(a.dtype), self.lora_B, a, alpha=self.scale)


def targeted(lm: PreTrainedModel, lora: Lora) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by name, in the model's order.

    Raises:
        InputError: a target names no linear layer, or the head.
    """
    head, kind = lm.get_output_embeddings(), type(lm).__name__
    linear = {name: m for name, m in lm.named_modules() if type(m) is nn.Linear and m is not head}
    if lora.targets == "all-linear":
        chosen = set(linear)
    else:
        chosen = set()
        for target in lora.targets:
            found = {name for name in linear if f".{name}".endswith(f".{target}")}
            if not found:
                known = dict.fromkeys(name.rpartition(".")[2] for name in linear)
                raise InputError(
                    f"{KEY}.targets: {target!r} names no linear layer of {kind} but the output head's, which takes no "
                    f"adapter.{nearest(target, known)} It has {', '.join(known) or 'none'}."
                )
            chosen |= found
    if not chosen:
        raise InputError(f"{KEY}.targets: {lora.targets} is no layer of {kind}. Name linear layers, or leave lora out.")
    return {name: layer for name, layer in linear.items() if name in chosen}


def fingerprint(lm: PreTrainedModel) -> str:
    """Of its weights, by 64 numbers of each: another training's differ. Collective under FSDP2."""
    digest = hashlib.sha256()
    for name, parameter in lm.named_parameters():
        flat = ranks.full(parameter.detach()).flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _in_fp32(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output.float()


class Adapters:
    """Of a model's linear layers, put in place when this is made: in fp32, all else frozen.

    Attributes:
        base: the `fingerprint` of the model without them; empty of a model without weights, until they `begin`.
        folded: those that were folded into the base, oldest first: of each layer A and B by name, full tensors on the
            CPU. The base of the folder and these make the present one.
    """

    def __init__(self, lm: PreTrainedModel, lora: Lora) -> None:
        self.lora = lora
        self.base = "" if lm.device.type == "meta" else fingerprint(lm)
        self.folded: list[dict[str, Tensor]] = []
        chosen = targeted(lm, lora)
        lm.requires_grad_(False)
        if lora.base == "bfloat16":
            for module in lm.modules():
                if isinstance(module, nn.Linear | nn.Embedding):  # what autocast takes in 16 bits
                    module.to(torch.bfloat16)
            # the residual stream stays as it is without
            lm.get_input_embeddings().register_forward_hook(_in_fp32)
        self.layers: dict[str, LoraLinear] = {}
        for name, linear in chosen.items():
            parent, _, own = name.rpartition(".")
            self.layers[name] = LoraLinear(linear, lora)
            setattr(lm.get_submodule(parent), own, self.layers[name])
        if self.base:
            self.begin(self.base)

    def begin(self, base: str) -> None:
        """Draw the first ones over a model of this `fingerprint`: those made on the meta device, once they have memory.
        Collective."""
        self.base = base
        seed = torch.tensor(torch.initial_seed() % 2**31)
        self.seed = int(ranks.all_reduce(seed, dist.ReduceOp.MIN))  # the same on all ranks
        self._draw()

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of each layer."""
        return {f"{n}.lora_{k}": getattr(layer, f"lora_{k}") for n, layer in self.layers.items() for k in "AB"}

    def merged(self, weight: Tensor) -> Tensor:
        """What the model computes with in place of its own parameter or buffer ``weight``: of a layer with an adapter a
        new tensor."""
        layer = next((layer for layer in self.layers.values() if layer.weight is weight), None)
        return weight.detach() if layer is None else layer.merged()

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + len(self.folded))
        for layer in self.layers.values():
            bound = 1 / math.sqrt(layer.in_features)  # peft's
            drawn = torch.rand(layer.lora_A.shape, generator=generator) * (2 * bound) - bound
            ranks.copy_full(layer.lora_A, drawn)
            ranks.copy_full(layer.lora_B, torch.zeros(layer.lora_B.shape))

    def values(self) -> dict[str, Tensor]:
        """Full tensors on the CPU. Collective under FSDP2."""
        return {name: ranks.full(p.detach()).cpu().clone() for name, p in self.parameters().items()}

    def put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters().items():
            ranks.copy_full(parameter, values[name])

    @torch.no_grad()
    def fold(self) -> None:
        """Into the base, and begin new ones: the model stays what it is. Collective under FSDP2."""
        self.folded.append(self.values())
        for layer in self.layers.values():
            layer.weight.copy_(layer.merged())
        self._draw()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All but the present adapters' values."""
        return {"rank": self.lora.rank, "alpha": self.lora.alpha, "base": self.base, "folded": self.folded}

    def load_state_dict(self, state: Mapping[str, Any], path: str = "it") -> None:
        """Make the base that the checkpoint at ``path`` was written over. Collective under FSDP2.

        Raises:
            InputError: that was another model's, its adapters are of another rank or alpha, or this process has folded
                more into it.
        """
        problem = ""
        if state["base"] != self.base:
            problem = "holds adapters of a base with other weights. Give the model that its run was started from"
        elif (there := (state["rank"], state["alpha"])) != (here := (self.lora.rank, self.lora.alpha)):
            problem = f"has adapters of (rank, alpha) {there}, {KEY} is of {here}. Write it as it was"
        elif len(state["folded"]) < len(self.folded):
            problem = "is of a life before the present one's `merge`. Load it in a new process"
        if problem:
            raise InputError(f"--ckpt_path: {path} {problem}.")
        present = self.values()  # under FSDP2 the checkpoint's already
        for values in state["folded"][len(self.folded) :]:
            self.put(values)
            self.fold()
        self.put(present)

    # ------------------------------------------------------------------ peft's folder

    def save(self, folder: Path, model: str, write: bool = True) -> None:
        """adapter_config.json and adapter_model.safetensors, over the weights of ``model``, a folder or hub id: what
        was folded is in them, as more rank. Called on all ranks."""
        parts = [*self.folded, self.values()]
        if not write:
            return
        tensors = {}
        for name in self.parameters():
            together = torch.cat([part[name] for part in parts], 0 if name.endswith("A") else 1)
            tensors[f"base_model.model.{name}.weight"] = together.contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": self.lora.rank * len(parts),
            "lora_alpha": self.lora.alpha * len(parts),
            "target_modules": sorted(self.layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
