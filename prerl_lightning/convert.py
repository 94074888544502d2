"""``prerl convert`` and ``prerl export``: checkpoints in other forms, without a Trainer, an engine or a GPU.

prerl convert runs/dsrl/version_0/checkpoints/last.ckpt whole.ckpt
prerl export runs/dsrl/version_0/checkpoints/last.ckpt my_model --dtype bfloat16
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prerl_lightning.errors import ArgumentParser, InputError

if TYPE_CHECKING:  # --help and refusals need no torch
    from torch import Tensor

    from prerl_lightning.checkpoints import Make


def convert(args: Sequence[str]) -> None:
    """A folder of shards as one file, a file as a folder of one shard. Tensors are read one at a time."""
    parser = ArgumentParser(
        "prerl convert",
        description="A sharded checkpoint as one file, which needs the room twice while it is made; or one file as a "
        "folder. Runs resume from either under every strategy.",
    )
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    own = parser.parse_args(args)
    out = _free(own.out)
    path = _given(own.checkpoint)
    from prerl_lightning import checkpoints
    from prerl_lightning.resume import load

    tree = load(str(path))
    if not path.is_dir():
        return checkpoints.save_folder(tree, out, alone=True)
    with tempfile.NamedTemporaryFile(dir=checkpoints.existing(out)) as file:
        made = _mapped_by(file, checkpoints.bytes_of(tree))
        checkpoints.WholeFileIO().save_checkpoint(checkpoints.read(path, tree, made), out)


def _mapped_by(file: Any, size: int) -> "Make":
    """What tensors are read into: memory that is a file's, which the kernel may write out."""
    import numpy as np
    import torch

    file.truncate(max(size, 1))
    room, end = np.memmap(file, np.uint8, "r+"), 0

    def make(_: str, tensor: "Tensor") -> "Tensor":
        nonlocal end
        start, end = end, end + tensor.nbytes
        return torch.from_numpy(room[start:end]).view(tensor.dtype).view(tensor.shape)

    return make


def export(args: Sequence[str]) -> None:
    """The weights of a checkpoint, of whatever form, as a Hugging Face folder with its tokenizer."""
    parser = ArgumentParser("prerl export", description="The weights of a checkpoint as a Hugging Face folder.")
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--model", help="that the run began with; default: by the checkpoint's configuration")
    own = parser.parse_args(args)
    out = _free(own.out)
    path = _given(own.checkpoint)
    import torch

    from prerl_lightning import checkpoints
    from prerl_lightning.evaluation.weights import checkpoint_weights
    from prerl_lightning.policy import files
    from prerl_lightning.policy.model import empty_model, load_tokenizer
    from prerl_lightning.resume import load

    dtype = getattr(torch, own.dtype)
    configuration = load(str(path)).get("configuration") or {}
    model = own.model or (configuration.get("model", {}).get("init_args") or {}).get("model")
    if not model:
        raise InputError(f"prerl export: {path} does not say which model its run began with. Give --model.")
    tokenizer, lm = load_tokenizer(model), empty_model(model)
    new = out.with_name(f"{out.name}.new")
    checkpoints.remove(new)
    files.write(lm, checkpoint_weights(path, model, dtype), new, dtype)
    tokenizer.save_pretrained(new)
    new.rename(out)


def _given(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if not path.exists():
        raise InputError(f"There is no checkpoint {path}.")
    from prerl_lightning.resume import check_whole

    check_whole(path)
    return path


def _free(out: str) -> Path:
    if (path := Path(out)).exists():
        raise InputError(f"{path} is there already. Name another, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
