"""A model as a Hugging Face folder, written without a second copy of it in memory."""

import json
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

FILE_BYTES = 4 << 30  # what is in memory at a time


def write(lm: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """``weights``, by their names on disk, of which ``lm`` has the configuration; what it held before is replaced.

    Files have up to 4 GiB, and a larger tensor one of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("model*.safetensors*"):
        if re.fullmatch(r"model(-\d{5}(-of-\d{5})?)?\.safetensors(\.index\.json)?", file.name):
            file.unlink()
    config = deepcopy(lm.config)
    config.architectures = [type(lm).__name__.removeprefix("FSDP")]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.save_pretrained(folder)
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        parts.append(list(held))
        save_file(held, folder / f"model-{len(parts):05}.safetensors", {"format": "pt"})
        held.clear()

    for name, tensor in weights:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        held[name] = tensor if alone else tensor.contiguous().clone()
        total += tensor.nbytes
    flush()
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
        where = {name: file for part, file in zip(parts, names, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for i, name in enumerate(names):
        (folder / f"model-{i + 1:05}.safetensors").rename(folder / name)
