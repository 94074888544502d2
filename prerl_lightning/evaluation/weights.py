"""Which weights an evaluation is of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prerl_lightning.checkpoints import Stored
from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import as_on_disk, empty_model
from prerl_lightning.resume import load


def checkpoint_weights(path: str | Path, model: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Of a training checkpoint, by their names in the folder of ``model``, tied ones once, one layer in memory at a
    time; parameters in ``dtype``.

    Raises:
        InputError: there is no such checkpoint, or it is none of ours.
    """
    if not Path(path).exists():
        raise InputError(f"--ckpt_path: {path}: no such file.")
    tree = load(str(path))
    stored, lm, prefix = Stored(path, tree), empty_model(model), "policy.model."
    found = {k.removeprefix(prefix): t for k, t in tree.get("state_dict", {}).items() if k.startswith(prefix)}
    if not found:
        raise InputError(f"--ckpt_path: {path} holds no weights of a policy: it is not one of ours.")
    once = {(t.data_ptr() or id(t), t.shape): name for name, t in reversed(found.items())}
    parameters = {id(found[name]) for name, _ in lm.named_parameters() if name in found}

    def made(held: Tensor) -> Tensor:
        tensor = stored.read(held)
        return tensor.to(dtype) if dtype and id(held) in parameters else tensor

    return as_on_disk(lm, ((name, found[name]) for name in found if name in set(once.values())), made)


def fingerprint(path: str | Path) -> list[Any]:
    """Names, sizes and times of the weight files in a folder, or of a checkpoint; a hub id stands for itself."""
    source = Path(path).expanduser()
    kinds = ("*.safetensors", "*.distcp", "*.pt")
    files = [source] if source.is_file() else sorted(f for kind in kinds for f in source.glob(kind))
    return [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files] or [str(path)]
