"""The process that vLLM runs in, kept as it was.

vLLM replaces torch.set_num_threads and two more by no-ops, seeds and advances the global random state, and reads its
place among the ranks from variables that nobody may have set. On a CPU it also keeps oneDNN's kernels for the life of
the process by a layer's shape alone, while the packing they read depends on the number of threads, too: a later engine
that packs by another number computes other values (2 nats off, silently). So the first engine's number is all engines'.
"""

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from prerl_lightning.rollout.engine import Place


@cache
def _threads() -> int:
    """Of every engine in this process."""
    return torch.get_num_threads()


@contextmanager
def state_kept() -> Iterator[None]:
    """Leave torch.set_num_threads, the threads and all global random states as they were; and within leave the
    Trainer's autocast, in which an engine in float32 would compute in bf16, and adapters be rounded as they are merged.

    The no-ops that vLLM puts in place of torch.accelerator.synchronize and empty_cache stay: it does so only where
    there is no accelerator, and needs them itself at exit.
    """
    set_num_threads = torch.set_num_threads
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    if threads != _threads():
        set_num_threads(_threads())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if affinity is not None and os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def ranks_in_environment(place: Place) -> Iterator[None]:
    """vLLM reads its place among the ranks, and its GPU, from torchrun's variables, which Lightning's own launcher and
    SLURM do not set. Only within: with LOCAL_RANK set, Lightning would take the next fit of this process for one that
    it has launched."""
    ranks: dict[str, str] = {}
    if place.world_size > 1 or place.device.index:
        local = place.local_rank if place.device.index is None else place.device.index
        ranks = {"RANK": str(place.rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(place.world_size)}
        if place.world_size == 1 and "MASTER_PORT" not in os.environ:  # a group of its own alone
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    before = {key: os.environ.get(key) for key in ranks}
    os.environ.update(ranks)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            os.environ.update({key: value} if value is not None else {})
