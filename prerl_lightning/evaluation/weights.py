"""Which weights an evaluation is of."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prerl_lightning.errors import InputError
from prerl_lightning.policy.lora import Lora
from prerl_lightning.policy.model import Policy, as_on_disk, empty_model, load_model
from prerl_lightning.resume import load


def checkpoint_weights(path: str | Path, model: str) -> Iterator[tuple[str, Tensor]]:
    """Of a training checkpoint, by their names in the folder of ``model``, tied ones once; adapters (LoRA) folded into
    the weights of ``model``.

    Raises:
        InputError: there is no such file, it is no checkpoint of ours, or its adapters are of another model.
    """
    if not Path(path).is_file():
        raise InputError(f"--ckpt_path: {path}: no such file.")
    checkpoint = load(str(path))
    state = checkpoint.get("state_dict", {})
    prefix = "policy.model."
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not found:
        raise InputError(f"--ckpt_path: {path} holds no weights of a policy: it is not one of ours.")
    if (adapters := checkpoint.get("lora")) is not None:
        return _folded(Policy(load_model(model)), adapters, found, str(path))
    once = {(t.data_ptr(), t.shape): name for name, t in reversed(found.items())}
    names = set(once.values())
    return as_on_disk(empty_model(model), ((name, tensor) for name, tensor in found.items() if name in names))


def _folded(
    policy: Policy, state: Mapping[str, Any], values: Mapping[str, Tensor], path: str
) -> Iterator[tuple[str, Tensor]]:
    names = sorted({name.rpartition(".")[0] for name in values})
    policy.adapt(Lora(state["rank"], state["alpha"], names))
    assert policy.adapters is not None
    policy.adapters.load_state_dict(state, path)
    policy.adapters.put(values)
    return policy.named_weights()


def fingerprint(path: str | Path) -> list[Any]:
    """Names, sizes and times of the weight files in a folder, or of a checkpoint; a hub id stands for itself."""
    source = Path(path).expanduser()
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) if source.is_dir() else []
    return [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files] or [str(path)]
