"""Which weights an evaluation is of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from prerl_lightning.errors import InputError
from prerl_lightning.policy.model import as_on_disk, empty_model
from prerl_lightning.resume import load


def checkpoint_weights(path: str | Path, model: str) -> Iterator[tuple[str, Tensor]]:
    """Of a training checkpoint, by their names in the folder of ``model``, tied ones once.

    Raises:
        InputError: there is no such file, or it is no checkpoint of ours.
    """
    if not Path(path).is_file():
        raise InputError(f"--ckpt_path: {path}: no such file.")
    state = load(str(path)).get("state_dict", {})
    prefix = "policy.model."
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not found:
        raise InputError(f"--ckpt_path: {path} holds no weights of a policy: it is not one of ours.")
    once = {(t.data_ptr(), t.shape): name for name, t in reversed(found.items())}
    names = set(once.values())
    return as_on_disk(empty_model(model), ((name, tensor) for name, tensor in found.items() if name in names))


def fingerprint(path: str | Path) -> list[Any]:
    """Names, sizes and times of the weight files in a folder, or of a checkpoint; a hub id stands for itself."""
    source = Path(path).expanduser()
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) if source.is_dir() else []
    return [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files] or [str(path)]
