"""Which weights an evaluation is of."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.checkpoints import Stored, read
from prerl_lightning.errors import InputError
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy, as_on_disk, empty_model, load_model
from prerl_lightning.resume import load


def checkpoint_weights(path: str | Path, model: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Of a training checkpoint, by their names in the folder of ``model``, tied ones once, one layer in memory at a
    time; parameters in ``dtype``; adapters (LoRA) folded into the weights of ``model``.

    Raises:
        InputError: there is no such checkpoint, it is none of ours, or its adapters are of another model.
    """
    if not Path(path).exists():
        raise InputError(f"--ckpt_path: {path}: no such file.")
    tree = load(str(path))
    stored, prefix = Stored(path, tree), "policy.model."
    found = {k.removeprefix(prefix): t for k, t in tree.get("state_dict", {}).items() if k.startswith(prefix)}
    if not found:
        raise InputError(f"--ckpt_path: {path} holds no weights of a policy: it is not one of ours.")
    if "lora" in tree:
        adapters = read(Path(path), {"lora": tree["lora"]})["lora"]
        return _folded(Policy(load_model(model)), adapters, {n: stored.read(t) for n, t in found.items()}, path, dtype)
    lm = empty_model(model)
    once = set({(t.data_ptr() or id(t), t.shape): name for name, t in reversed(found.items())}.values())
    parameters = {id(found[name]) for name, _ in lm.named_parameters() if name in found}

    def made(held: Tensor) -> Tensor:
        tensor = stored.read(held)
        return tensor.to(dtype) if dtype and id(held) in parameters else tensor

    return as_on_disk(lm, ((name, found[name]) for name in found if name in once), made)


def _folded(
    policy: Policy, state: Mapping[str, Any], values: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    names = sorted({name.rpartition(".")[0] for name in values})
    policy.adapt(Lora(state["rank"], state["alpha"], names))
    assert policy.adapters is not None
    policy.adapters.load_state_dict(state, str(path))
    policy.adapters.put(values)
    return policy.named_weights(dtype)


def fingerprint(path: str | Path) -> list[Any]:
    """Names, sizes and times of the weight files in a folder, or of a checkpoint; a hub id stands for itself."""
    source = Path(path).expanduser()
    kinds = ("*.safetensors", "*.distcp", "*.pt")
    files = [source] if source.is_file() else sorted(f for kind in kinds for f in source.glob(kind))
    return [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files] or [str(path)]
