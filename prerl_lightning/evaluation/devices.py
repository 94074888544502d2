"""The ranks of an evaluation: started by Lightning's launcher, or there already by torchrun or srun."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from prerl_lightning import ranks
from prerl_lightning.compat import observe_ranks
from prerl_lightning.errors import InputError, in_one_line
from prerl_lightning.rollout.engine import Place
from prerl_lightning.watchdog import watchdog


def ranks_on(devices: int | None) -> tuple[Place, Callable[[], None]]:
    """This process's place among the ranks, and what starts those that are not there yet and meets them all.

    Args:
        devices: ranks of this machine; None: those that torchrun or srun have started, else one. Behind a run on
            several ranks in the same script there are those.

    Raises:
        InputError: there are not so many devices, or other ranks than asked for.
    """
    if devices is not None and devices < 1:
        raise InputError(f"--devices: {devices} is below 1.")
    if ranks.world_size() > 1:
        return _place_of_before(), lambda: None
    here, nodes = _there()
    if here * nodes > 1 and devices not in (None, here):
        raise InputError(f"--devices: {devices}, and {here} ranks have been started on this machine. Leave it out.")
    here = devices or here
    if here * nodes == 1:
        return Place(), lambda: None
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # a rank may wait for long answers of another; the watchdog says who stands still
        strategy = DDPStrategy(timeout=timedelta(days=1))
        fabric = Fabric(accelerator=accelerator, strategy=strategy, devices=here, num_nodes=nodes)
    except Exception as error:  # Lightning raises many kinds
        raise InputError(f"--devices: {here} cannot be: {in_one_line(error)}") from error

    def launch() -> None:
        watchdog.mend = "The evaluation has ended; the same command goes on where it was."
        observe_ranks(watchdog.observe)
        fabric.launch()
        watchdog.share(fabric.strategy, here)

    return Place(fabric.global_rank, fabric.world_size, fabric.local_rank, fabric.device), launch


def _place_of_before() -> Place:
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Place(ranks.rank(), ranks.world_size(), local_rank, device)


def _there() -> tuple[int, int]:
    """Ranks a machine, and machines, that have been started."""
    for all_ranks, machines in (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")):
        if all_ranks in os.environ and machines in os.environ:
            nodes = int(os.environ[machines])
            return int(os.environ[all_ranks]) // nodes, nodes
    return 1, 1
