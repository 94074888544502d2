"""A checkpoint on disk: one file, or a folder of shards (fsdp2 with ``checkpoint.sharded``). Either has its name when
it is whole and on the disk, and has checksums.

A folder holds ``meta.pt``, the checkpoint with sharded tensors on the meta device, and by torch.distributed.checkpoint
a file a rank with the tensors, each by its place in the checkpoint: ``state_dict.policy.model...``.
"""

import fcntl
import logging
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BufferedWriter, BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from prerl_lightning.errors import RunError, in_one_line
from prerl_lightning.locks import lock

log = logging.getLogger(__name__)

META = "meta.pt"
Make = Callable[[str, Tensor], Tensor]


class NotWritten(RunError):
    """A checkpoint could not be written; those before it are as they were."""


def _not_written(path: Path, reason: BaseException, checkpoint: Any) -> NotWritten:
    needed, free = bytes_of(checkpoint), shutil.disk_usage(existing(path)).free
    return NotWritten(
        f"The checkpoint {path} could not be written ({reason}): {needed / 2**30:.2f} GiB are needed, "
        f"{free / 2**30:.2f} are free there. The checkpoints before it are as they were: make room, and "
        "--ckpt_path last goes on. With --checkpoint.when_full go_on runs train on without."
    )


def _reason(error: BaseException) -> BaseException:
    """Torch's writer makes a RuntimeError of a full disk."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint tensor by tensor into a file beside its place. Lightning's own makes a second copy in memory
    and a third in the temporary folder. Reads folders too. Remote paths are left to Lightning's.

    Attributes:
        raises: False: what went wrong is left in ``problem``, for rank 0, which alone writes, to tell the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raises, self.problem = True, ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path, self.problem = Path(path), ""
        new = _beside(path, "new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                lock(file)  # see sweep
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                _rename(new, path)
        except (OSError, RuntimeError) as error:
            remove(new)
            said = _not_written(path, _reason(error), checkpoint)
            self.problem = str(said)
            if self.raises:
                raise said from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        if not os.path.isdir(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read(Path(path), load(path, weights_only is not False))


# ---------------------------------------------------------------------- folders


class _Writer(dcp.FileSystemWriter):
    """What goes wrong in here torch tells all ranks."""

    def __init__(self, final: Path, meta: dict[str, Any]) -> None:
        super().__init__(_beside(final, "new"))
        self.final, self.meta = final, meta
        self.file: BufferedWriter | None = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            folder = Path(self.path)
            remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / META).open("wb")
            lock(self.file)  # see sweep

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise _reason(error) from None  # on the way to other ranks its context is lost

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        assert self.file is not None
        torch.save(self.meta, self.file)
        self.file.flush()
        os.fsync(self.file.fileno())
        _fsync(Path(self.path))
        _rename(Path(self.path), self.final)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            remove(Path(self.path))


def save_folder(checkpoint: dict[str, Any], path: Path, alone: bool = False) -> None:
    """Each rank its shards of what is sharded. Collective, unless ``alone``, with which every tensor becomes a shard.

    Raises:
        NotWritten: on all ranks.
    """
    meta, tensors = _split(checkpoint, Tensor if alone else DTensor)
    writer = _Writer(path, meta)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise _not_written(path, reason, checkpoint) from error
    finally:
        writer.close()


def _split(checkpoint: dict[str, Any], kind: type[Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checkpoint with tensors of a kind on the meta device, and these by their places; tied ones once."""
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, Tensor] = {}

    def split(place: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, kind) or not tensor.ndim:
            return tensor
        key = id(tensor) if isinstance(tensor, DTensor) else (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            tensors[place] = tensor.detach()
            seen[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return seen[key]

    return _mapped(checkpoint, split), tensors


def _mapped(tree: Any, change: Make, place: str = "") -> Any:
    """``tree`` with each tensor changed, which is given with its place."""
    if isinstance(tree, Tensor):
        return change(place, tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change, f"{place}.{key}" if place else str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change, f"{place}.{i}") for i, value in enumerate(tree))
    return tree


def load(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint: of a file with its tensors mapped, of a folder with those of the shards on the meta device."""
    file = Path(path) / META if os.path.isdir(path) else path
    return torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)


def read(path: Path, tree: dict[str, Any], make: Make | None = None, collective: bool = False) -> dict[str, Any]:
    """``tree``, of `load`, with all tensors of the shards, or those that ``tree`` still has.

    Args:
        make: what a tensor is read into, given its place and it: whole, or a DTensor, of which its own part is read.
        collective: called on all ranks, which fail together.
    """
    targets: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}

    def fill(place: str, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = make(place, tensor) if make else torch.empty_like(tensor, device="cpu")
            targets[place] = made[id(tensor)]
        return made[id(tensor)]

    filled = _mapped(tree, fill)
    if targets:
        _read(_Reader(path), targets, collective)
    return filled


class Stored:
    """A checkpoint whose tensors stay on disk until one is asked for; ``tree`` is what `load` gives."""

    def __init__(self, path: str | Path, tree: dict[str, Any]) -> None:
        self._places: dict[int, str] = {}
        self._reader = _Reader(path) if os.path.isdir(path) else None

        def note(place: str, tensor: Tensor) -> Tensor:
            self._places.setdefault(id(tensor), place)
            return tensor

        _mapped(tree, note)

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor of the tree, whole."""
        if not tensor.is_meta:
            return tensor
        whole = torch.empty_like(tensor, device="cpu")
        assert self._reader is not None
        _read(self._reader, {self._places[id(tensor)]: whole})
        return whole


def _read(reader: "_Reader", targets: dict[str, Tensor], collective: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(targets, storage_reader=reader, no_dist=not collective)
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise RunError(f"The checkpoint {reader.path} cannot be read (rank {rank}): {reason}") from error


class _Reader(dcp.FileSystemReader):
    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Without running code of the file's choice, as torch's own would."""
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = _Unpickler(file).load()
        assert self._metadata is not None
        return self._metadata


class _Unpickler(pickle.Unpickler):
    """Of what torch's writer puts into ``.metadata``."""

    NAMES = (
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in ("TensorStorageMetadata", "TensorProperties")),
        *(f"torch.distributed.checkpoint.metadata.{n}" for n in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
        *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"),
        *("pathlib.PosixPath", "collections.OrderedDict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self.NAMES or (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is none of a checkpoint's")


# ---------------------------------------------------------------------- damage, and what was left


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, which is read to its end; None: it is whole."""
    if not path.is_dir():
        return _damage_of(path)
    if problem := _damage_of(path / META) if (path / META).is_file() else f"a folder without {META}: no checkpoint":
        return problem
    try:
        for index, info in _Reader(path).read_metadata().storage_data.items():
            if Path(info.relative_path).name != info.relative_path:
                return f"damaged: it names the file {info.relative_path}"
            with (path / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                with zipfile.ZipFile(BytesIO(file.read(info.length))) as item:
                    if item.testzip():
                        return f"damaged: the checksum of {index.fqn} is not what it was written with"
    except _UNREADABLE as error:
        return f"not whole, or no checkpoint ({in_one_line(error, 80)})"
    return None


_UNREADABLE: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError, ValueError),
    *(pickle.UnpicklingError, AttributeError, TypeError, KeyError),
)


def _damage_of(file: Path) -> str | None:
    if not file.stat().st_size:
        return "empty"
    try:
        with zipfile.ZipFile(file) as opened:
            broken = opened.testzip()
    except _UNREADABLE as error:
        return f"cut off, or no checkpoint ({in_one_line(error, 80)})"
    return f"damaged: the checksum of {broken} is not what it was written with" if broken else None


def sweep(folder: Path) -> None:
    """Remove what a process that died was writing there. The lock of one that lives is held, on whatever machine."""
    for new in folder.glob("*.ckpt.new"):
        with suppress(OSError), (new / META if new.is_dir() else new).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(new)
            log.info("Removed %s, which a run that was killed had begun to write.", new)
    for old in folder.glob("*.ckpt.old"):  # between the two names of `_rename`
        if old.with_suffix("").exists():  # else it is the last that is whole
            remove(old)


def link(source: Path, name: Path) -> None:
    """``name`` becomes another name of ``source``, from one moment to the next."""
    new = _beside(name, "new")
    remove(new)
    if source.is_dir():
        new.mkdir()
        for file in source.iterdir():
            _link(file, new / file.name)
        _fsync(new)
    else:
        _link(source, new)
    _rename(new, name)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, name)


def _rename(new: Path, path: Path) -> None:
    """No folder takes another's place in one move: for a moment the one before it is ``.old``, and known as such to
    `sweep` and to `resume.newest`."""
    old = _beside(path, "old")
    if path.is_dir() or (new.is_dir() and path.exists()):
        remove(old)
        path.rename(old)
    new.replace(path)
    _fsync(path.parent)
    remove(old)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def remove(path: Path) -> None:
    """A file or a folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _fsync(folder: Path) -> None:
    """A new name in it is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """It, or the nearest above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def bytes_of(tree: Any) -> int:
    """Of all tensors in it, whole."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(bytes_of, parts))
