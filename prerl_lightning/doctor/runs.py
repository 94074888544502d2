"""Checks of a run as a whole: its memory by arithmetic, and its ranks."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from prerl_lightning.doctor.ranks_worker import STAGES
from prerl_lightning.doctor.subject import GIB, Result, Subject, result, skipped
from prerl_lightning.errors import InputError
from prerl_lightning.planning.host import available_memory
from prerl_lightning.planning.memory import Memory
from prerl_lightning.planning.parts import Asked
from prerl_lightning.policy.model import load_config

Row = dict[str, float]
# ---------------------------------------------------------------------- the budget


def budget(subject: Subject) -> Result:
    """What each rank's GPU, or this host, has to hold of the configured run, before anything is loaded."""
    cli = subject.configured
    if cli is None:
        return skipped("--config FILE asks whether that run fits into memory")
    asked = Asked.of(cli)
    trainer, engine = asked.trainer, asked.data.engine
    try:
        devices = _devices(trainer, subject.on_gpu)
    except InputError as error:
        return _refused(str(error))
    longest = engine.max_model_len(load_config(subject.model_name))
    if asked.data.max_prompt_tokens is not None:  # the prompts themselves are not read here
        new = max(s.max_new_tokens for s in asked.data.training_samplings)
        longest = min(longest, asked.data.max_prompt_tokens + new)
    world_size = len(devices) * trainer.num_nodes
    if devices[0].type == "cuda":
        memories = [torch.cuda.mem_get_info(device) for device in devices]
        room = min(left for left, _ in memories)
        tightest = devices[[left for left, _ in memories].index(room)]
        where = f"{tightest}{', which has the least free' if len(devices) > 1 else ''}"
        memory = Memory(asked.setup(world_size, longest, room, memories[0][1]))
        if not memory.problem:
            recomputed = ", activations recomputed" if memory.pack.checkpointing else ""
            where += f", with packs of {memory.pack.tokens:,} tokens{recomputed}"
    else:
        room = available_memory()
        where = "this host" if len(devices) == 1 else f"this host, for all {len(devices)} ranks"
        memory = Memory(asked.setup(world_size, longest, None, None))
    times = len(devices) if devices[0].type == "cpu" else 1
    rows = {phase: _row(parts, times, room) for phase, parts in memory.phases.items()}
    setup, most = memory.setup, times * memory.peak / GIB
    text = f"{world_size} rank{'s' if world_size > 1 else ''}, {setup.strategy}, {setup.precision}, "
    text += f"{setup.shape.parameters:,} parameters: {most:.1f} of {room / GIB:.1f} GiB on {where}"
    figures = {"ranks": world_size, "strategy": setup.strategy, "precision": setup.precision, **rows}
    if memory.problem:
        return _refused(memory.problem, (text, *table(rows)), figures)
    if not memory.fits(room):
        helps = "fewer trainer.devices; a smaller data.engine.init_args.kv_cache_mib or max_model_len; a smaller model."
        return _refused(f"Host memory is too small: {text}. What helps: {helps}", table(rows), figures)
    return Result("PASS", text, figures=figures, details=tuple(table(rows)))


def _refused(problem: str, details: Sequence[str] = (), figures: Mapping[str, Any] | None = None) -> Result:
    """An error's text, which ends in what helps."""
    seen, _, mend = problem.partition(" What helps: ")
    return Result("FAIL", seen, mend, dict(figures or {}), tuple(details))


def _devices(trainer: Any, gpus: bool) -> list[torch.device]:
    """Those of this node's ranks, as the configuration asks for them. Raises InputError where they are not there."""
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and gpus)
    if on_gpu and not gpus:
        raise InputError(
            f"trainer.accelerator: {trainer.accelerator}, and there is no GPU. What helps: a machine with GPUs, or "
            "--trainer.accelerator cpu and a model for it."
        )
    kind: Any = CUDAAccelerator if on_gpu else CPUAccelerator
    wanted = trainer.devices if trainer.devices != "auto" else kind.auto_device_count()
    try:
        found: list[torch.device] = kind.get_parallel_devices(kind.parse_devices(wanted))
    except Exception as error:  # Lightning has classes of its own
        raise InputError(
            f"trainer.devices: {' '.join(str(error).split())} What helps: --trainer.devices with no more than "
            f"{kind.auto_device_count()}; CUDA_VISIBLE_DEVICES says which of a machine's GPUs are seen."
        ) from error
    return found


COLUMNS = {  # of the parts
    "weights": ("weights",),
    "gradients": ("gradients",),
    "moments": ("moments",),
    "other": ("copies", "buckets", "gathered", "comparison", "checkpoint"),
    "engine": ("engine_weights", "kv_cache"),
    "pack": ("activations", "logits"),
    "reserve": ("reserved", "program"),
}


def _row(parts: Mapping[str, int], times: int, free: int) -> Row:
    row = {name: times * sum(parts.get(part, 0) for part in held) / GIB for name, held in COLUMNS.items()}
    return {name: round(size, 3) for name, size in {**row, "sum": sum(row.values()), "free": free / GIB}.items()}


def table(rows: Mapping[str, Row]) -> list[str]:
    columns = list(next(iter(rows.values())))
    lines = [f"{'GiB':<10}" + "".join(f"{name:>10}" for name in columns)]
    return lines + [f"{name:<10}" + "".join(f"{row[c]:>10.2f}" for c in columns) for name, row in rows.items()]


# ---------------------------------------------------------------------- ranks

LIMIT = 60.0  # seconds without a step forward of any rank
IMPORTS = 300.0  # seconds for what depends on the disk and the load alone: it has taken 60 beside other work


def ranks(subject: Subject) -> Result:
    """As many processes as GPUs, or two on a CPU, through every kind of collective call that this library makes."""
    size = torch.cuda.device_count() if subject.on_gpu else 2
    kind = "cuda" if subject.on_gpu else "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(size)}
    shared = {**subject.environment, **shared} | ({} if subject.on_gpu else {"OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-m", "prerl_lightning.doctor.ranks_worker", kind]
    found, problem = together([command] * size, shared, subject.folder, LIMIT, IMPORTS)
    if problem:
        return result("{problem}", [_NCCL if subject.on_gpu else _GLOO], problem=problem, ranks=size)
    pairs = [(f["trainer"], f["engine"]) for f in found]
    wrong = [f"rank {i} trains on {own}, vLLM is given {other}" for i, (own, other) in enumerate(pairs) if own != other]
    wrong = wrong if subject.on_gpu else []  # CPUs have no numbers
    figures = {
        key: min((f[key] for f in found if f[key]), default=None) for key in ("all_reduce_gb_s", "all_gather_gb_s")
    }
    places = ", ".join(own for own, _ in pairs) if subject.on_gpu else "cpu"
    text = f"{size} rank{'s' if size > 1 else ''} ({found[0]['backend']}) on {places}"
    text += ", each with its engine there" if subject.on_gpu and not wrong else ""
    if size > 1:
        text += "; 64 MiB: all_reduce {all_reduce_gb_s:.2f} GB/s, all_gather {all_gather_gb_s:.2f} GB/s"
    mends = ["This is a fault of the library: please report it."] if wrong else []
    return result(text, mends, wrong, **figures, ranks=size, backend=found[0]["backend"], devices=pairs)


_NCCL = (
    "See what NCCL says: NCCL_DEBUG=INFO PRERL_DEBUG=1 prerl doctor. What often helps: NCCL_P2P_DISABLE=1 (GPUs that "
    "cannot reach each other, behind IOMMU or in virtual machines), docker run --shm-size=8g, "
    "NCCL_SOCKET_IFNAME=lo and GLOO_SOCKET_IFNAME=lo (a host name that leads nowhere)."
)
_GLOO = "GLOO_SOCKET_IFNAME=lo where the host's name leads nowhere; PRERL_DEBUG=1 prerl doctor shows what ranks say."


def together(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: Path, limit: float, imports: float
) -> tuple[list[dict[str, Any]], str]:
    """Run one process a rank, and end them all where one fails, or none comes further for ``limit`` seconds.

    Args:
        environment: of all ranks.
        imports: seconds that stand in for ``limit`` while a rank is at its first stage.

    Returns:
        what each found, and the problem, naming the rank; one of the two is empty.
    """
    files = [(folder / f"rank_{i}.out", folder / f"rank_{i}.err") for i in range(len(commands))]
    processes = []
    for rank, (command, (out, err)) in enumerate(zip(commands, files, strict=True)):  # as Lightning's own launcher does
        env = {**environment, "LOCAL_RANK": str(rank)}
        with out.open("w") as output, err.open("w") as noise:
            processes.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=noise))
    written, last, allowed = 0, time.monotonic(), limit
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            size = sum(out.stat().st_size for out, _ in files)
            written, last = (size, time.monotonic()) if size != written else (written, last)
            allowed = limit if all(out.read_bytes().count(b"\n") > 1 for out, _ in files) else max(limit, imports)
            if time.monotonic() > last + allowed:
                break
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [[line for file in pair for line in file.read_text(errors="replace").splitlines()] for pair in files]
    for rank, lines in enumerate(said):
        sys.stderr.write("".join(f"rank {rank}: {line}\n" for line in lines))  # seen with PRERL_DEBUG
    told = [[json.loads(line) for line in lines if line.startswith('{"')] for lines in said]
    stages = [max((line["stage"] for line in lines if "stage" in line), default=0) for lines in told]
    if failed:
        rank = failed[0]
        errors = [line for line in said[rank] if "rror" in line] or [f"exit status {processes[rank].returncode}"]
        return [], f"rank {rank} failed at {STAGES[stages[rank]]}: {errors[-1].strip()}"
    found = [line["found"] for lines in told for line in lines if "found" in line]
    if late and len(found) < len(commands):  # else they have done all, and stand at their exit
        behind = [rank for rank in late if stages[rank] == min(stages[r] for r in late)]
        names = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
        waiting = {STAGES[stages[r]] for r in range(len(stages)) if r not in behind}
        rest = f"; the others wait at {', '.join(sorted(waiting))}" if waiting else ": all of them"
        return [], f"{names} did not come within {allowed:.0f} s: the last seen is {STAGES[stages[behind[0]]]}{rest}"
    return found, ""
