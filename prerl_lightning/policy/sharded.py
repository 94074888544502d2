"""A policy of which each rank holds no more than its shards, from the first byte on: built without memory for its
parameters, sharded (strategies.py), and filled from the safetensors files, of which a rank reads its own rows.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from prerl_lightning import ranks
from prerl_lightning.policy.lora import Lora, fingerprint

if TYPE_CHECKING:
    from prerl_lightning.policy.model import Policy

log = logging.getLogger(__name__)


class Sharding(Protocol):
    """What a strategy that shards gives, see `FSDP2Strategy`."""

    @property
    def home(self) -> torch.device: ...

    def shard(self, policy: nn.Module, precision: str | None = None) -> None: ...


def files_of(model: str) -> dict[str, str]:
    """Of each tensor in the safetensors files of a folder or hub id the file; empty: it has none that can be read."""
    found: dict[str, str] = {}
    try:
        # in the order in which transformers looks for them
        if (file := cached_file(model, "model.safetensors", _raise_exceptions_for_missing_entries=False)) is not None:
            files = [file]
        else:
            files = get_checkpoint_shard_files(model, cached_file(model, "model.safetensors.index.json"))[0]
        for file in files:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    except (OSError, SafetensorError):
        return {}
    return found


@torch.no_grad()
def fill(held: Mapping[str, Tensor], files: Mapping[str, str]) -> list[str]:
    """Each tensor of ``held``, whole or sharded along its first dimension, from its file, of which no more than its
    rows are read; returns the names of those whose rows are not all finite."""
    broken = []
    for name, tensor in held.items():
        local, row = ranks.own_rows(tensor)
        if not local.numel():
            continue
        # opened for each: what an open file has mapped counts as this process's memory
        with safe_open(files[name], "pt") as opened:
            piece = opened.get_slice(name)[row : row + len(local)] if tensor.ndim else opened.get_tensor(name)
        local.copy_(piece)
        if local.is_floating_point() and not local.isfinite().all():
            broken.append(name)
    return broken


def load(
    make: "Callable[[], Policy]",
    prepare: "Callable[[Policy], None]",
    model: str,
    sharding: Sharding,
    lora: Lora | None = None,
) -> "tuple[Policy, list[str]] | None":
    """The policy, and which of its weights are not finite; None where it has to be loaded whole. Collective.

    Args:
        make: it, with parameters on the meta device.
        prepare: compares it with the model itself, by passes in fp32.
        model: the folder or hub id that it is of.
        lora: the policy's.
    """
    exact, files = make(), files_of(model)
    exact_held = dict(exact.held())
    if any(reasons := ranks.gather([_why_whole(exact, exact_held, files)])):  # other nodes may have other files
        log.info("Each rank loads all of %s before it is sharded: %s.", model, next(filter(None, reasons)))
        return None
    sharding.shard(exact, "32-true")
    _materialise(exact, sharding.home)
    broken = fill(dict(exact.held()), files)
    if broken := sorted(set(ranks.gather(broken))):
        return exact, broken
    prepare(exact)
    policy = make()  # in the run's precision: FSDP2 knows one
    if lora is not None:
        policy.adapt(lora)
    resting = {name: p.dtype for name, p in policy.named_parameters(remove_duplicate=False)}
    sharding.shard(policy)
    state = exact.state_dict(keep_vars=True)
    cast: dict[int, Tensor] = {}
    for name, tensor in state.items():  # tied ones stay one
        if tensor.dtype != resting.get(name, tensor.dtype):
            cast[id(tensor)] = cast.get(id(tensor), nn.Parameter(tensor.detach().to(resting[name])))
        state[name] = cast.get(id(tensor), tensor)
    policy.load_state_dict(state, assign=True, strict=lora is None)  # no file has values of adapters
    if policy.adapters is not None:
        _materialise(policy, sharding.home)
        policy.adapters.begin(fingerprint(exact.model))
    policy.take_choices(exact)
    return policy, []


def _why_whole(policy: "Policy", held: Mapping[str, Tensor], files: Mapping[str, str]) -> str:
    """Why weights cannot be read by their names and rows; empty: they can."""
    if not files:
        return "its weights are not in safetensors files"
    if any(held.get(name) is not tensor for name, tensor in policy.as_stored(held)):
        return "its weights are stored in another form than they are held in"
    for name in (*held, *files):
        shape = None
        if name in files:
            with safe_open(files[name], "pt") as opened:
                shape = tuple(opened.get_slice(name).get_shape())
        if name not in held or shape != tuple(held[name].shape):
            return f"{name} is not stored as it is held"
    return ""


def _materialise(policy: nn.Module, device: torch.device) -> None:
    """Memory for each rank's shards; tied weights stay one."""
    made: dict[int, Tensor] = {}
    state = policy.state_dict(keep_vars=True)
    for name, held in state.items():
        if held.is_meta and id(held) not in made:
            made[id(held)] = nn.Parameter(torch.empty_like(held, device=device), held.requires_grad)
        state[name] = made.get(id(held), held)
    policy.load_state_dict(state, assign=True, strict=False)  # with adapters it holds these alone
