"""The embedded DSRL, killed, signalled or stopped where a schedule says, resumed, and compared with one left alone."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from prerl_lightning.report.reading import read_run

ROOT = Path(__file__).parents[2]
STEPS, SWITCH, VALIDATION = 12, 4, 4
SMALL = [
    f"--config={ROOT / 'configs' / 'dsrl.yaml'}",
    *("--data.prompts_per_step=4", "--data.sampling.group_size=4", "--data.sampling.max_new_tokens=64"),
    *("--data.val.init_args.size=16", "--data.val_samples=2", "--data.val_batch=4", "--data.engine.max_model_len=80"),
    *(f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={VALIDATION}"),
    f"--trainer.callbacks.init_args.at_step={SWITCH}",
    *("--checkpoint.every_n_train_steps=2", "--alignment.every_n_steps=4", "--samples.every_n_steps=4"),
]
OVERLAYS = {"": [], **{s: [f"--config={ROOT / 'configs' / 'strategy' / f'{s}.yaml'}"] for s in ("ddp", "fsdp2")}}
SECONDS = 600.0  # for anything


@dataclass(frozen=True)
class Fault:
    """Args:
    at: ``start-up``, or a place of places.py and its step, such as ``validation 4``.
    signals: sent one after the other.
    to: ``tree``: each process of the run; ``first``: the process that was started; ``rank 1``, or ``worker``.
    delay: seconds behind that place.
    launched: by Lightning's launcher, whatever `Run` says.
    """

    at: str
    signals: tuple[int, ...] = (signal.SIGKILL,)
    to: str = "tree"
    delay: float = 0.0
    arguments: tuple[str, ...] = ()
    launched: bool = False


class Run:
    """One run in ``folder``, in as many processes one after the other as its faults ask for."""

    def __init__(self, folder: Path, strategy: str = "", arguments=(), environment=None, starts=None) -> None:
        """``starts``: what to start each of its ranks with, as torchrun does; default: Python anew, for the first, and
        Lightning's launcher for the other."""
        self.folder, self.mark, self.ranks = folder, uuid.uuid4().hex, 2 if strategy else 1
        self.command = ["-m", "prerl_lightning.cli", "fit", *SMALL, *OVERLAYS[strategy], *arguments]
        self.starts, self.started = starts, []
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            **({"OMP_NUM_THREADS": "1"} if strategy else {}),
            "FAULTS": self.mark,
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **(environment or {}),
        }
        self.output = ""

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "dsrl"

    def start(self, *arguments: str, resume: bool = True, launched: bool = False, anew: bool = False):
        """Resumed from what is there, unless ``resume`` says otherwise."""
        if resume and list(self.runs.glob("*/checkpoints/last.ckpt")):
            arguments = ("--ckpt_path=last", *arguments)
        ranks = [{}]
        if self.starts is not None and not (launched or anew) and self.ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": self.mark}
            ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        self.started = []
        for rank, variables in enumerate(ranks):
            where = {"cwd": self.folder, "env": self.environment | variables, "start_new_session": True}
            where["output"] = self.folder / (f"out_{rank}.log" if rank else "out.log")
            starts = _anew if anew or self.starts is None else self.starts
            self.started.append(starts([*self.command, *arguments], **where))
        return self.started[0]

    def said(self) -> str:
        return (self.folder / "out.log").read_text(errors="replace")

    def end(self, process: subprocess.Popen) -> int:
        try:
            status = process.wait(SECONDS)
        finally:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.output = self.said()
        return status

    def whole(self) -> None:
        """To its end, without a fault."""
        status = self.end(self.start())
        assert status == 0, self.output

    def suffer(self, fault: Fault) -> int:
        """Its exit status. ``left``: processes that were there 15 s later."""
        place, _, step = fault.at.partition(" ")
        hold = self.folder / "places"
        shutil.rmtree(hold, ignore_errors=True)
        hold.mkdir()
        (hold / "hold").touch()
        arguments, anew = [], place == "start-up"  # in the midst of the imports
        if not anew:
            held = {"class_path": "places.Hold", "init_args": {"place": place, "step": int(step), "folder": str(hold)}}
            arguments = [f"--trainer.callbacks+={json.dumps(held)}"]
        process = self.start(*fault.arguments, *arguments, launched=fault.launched, anew=anew)
        try:
            end = time.monotonic() + SECONDS
            while arguments and len(list(hold.glob("rank-*"))) < self.ranks:
                assert process.poll() is None, self.said()
                assert time.monotonic() < end, self.said()
                time.sleep(0.02)
            time.sleep(fault.delay)
            for i, number in enumerate(fault.signals):
                time.sleep(0.3 if i else 0.0)
                late = False
                while not (pids := self._targets(fault.to, process)) and process.poll() is None:
                    time.sleep(0.1)  # for a rank that is yet to be started
                    late = True
                if pids and late:
                    time.sleep(fault.delay)  # one that does not run a line of ours yet is killed by any signal
                    pids = self._targets(fault.to, process)
                for pid in pids:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            (hold / "hold").unlink()
            process.wait(SECONDS)
            self.left = self.processes(wait=15.0)
        finally:
            status = self.end(process)
        return status

    def processes(self, wait: float = 0.0) -> list[int]:
        """Those of this run, whoever their parent is now, after waiting so long for them to end."""
        end = time.monotonic() + wait
        while True:
            found = [pid for pid in _pids() if f"FAULTS={self.mark}" in _environment(pid) or self._is_started(pid)]
            if not found or time.monotonic() >= end:
                return found
            time.sleep(0.2)

    def _is_started(self, pid: int) -> bool:
        """One that was forked has the variables of the process that it was forked from."""
        return any(process.pid == pid and process.poll() is None for process in self.started)

    def _targets(self, to: str, process: subprocess.Popen) -> list[int]:
        if to in ("first", "rank 0"):
            return [process.pid]
        if to == "rank 1" and len(self.started) == 2:
            return [self.started[1].pid]
        pids = self.processes()
        if to == "tree":
            return pids
        words = {pid: _words(pid) for pid in pids}
        if to == "worker":
            return [pid for pid in pids if "prerl_lightning.rewards.worker" in words[pid]][:1]
        wanted = f"LOCAL_RANK={to.removeprefix('rank ')}"
        return [pid for pid in pids if wanted in _environment(pid) and "prerl_lightning.cli" in words[pid]]

    def values(self) -> dict[tuple[str, int], float]:
        """All that was logged of its newest folder and of those it was resumed from, but for what a clock measures."""
        run = read_run(max(self.runs.glob("version_*"), key=lambda p: int(p.name.removeprefix("version_"))))
        timed = ("time/", "rollout/tokens_per_second", "train/tokens_per_second", "train/mfu")
        rows = [(step, row) for table in (run.training, run.validation) for step, row in table.items()]
        return {(k, step): v for step, row in rows for k, v in row.items() if not k.startswith(timed)}

    def checkpoint(self) -> dict:
        newest = max(self.runs.glob("version_*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        return torch.load(newest, map_location="cpu", weights_only=False)


def _anew(command, output, **options) -> subprocess.Popen:
    with output.open("wb") as log:
        options |= {"stdout": log, "stderr": subprocess.STDOUT, "preexec_fn": _hear}
        return subprocess.Popen([sys.executable, *command], **options)


def _hear() -> None:
    """What nohup and a shell's ``&`` had ignored, which a run respects."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def differences(one: Run, other: Run) -> tuple[int, int]:
    """Logged values, weights and moments that differ or are there once only; and how many were compared."""
    a, b = one.values(), other.values()
    keys = a.keys() | b.keys()
    differ = sum(not _same(a.get(k), b.get(k)) for k in keys)
    x, y = one.checkpoint(), other.checkpoint()
    tensors = [_tensors(c["state_dict"]) | _tensors(c["optimizer_states"]) for c in (x, y)]
    differ += sum(
        not (k in tensors[0] and k in tensors[1] and torch.equal(tensors[0][k], tensors[1][k]))
        for k in tensors[0].keys() | tensors[1].keys()
    )
    differ += x["global_step"] != y["global_step"]
    return differ, len(keys) + len(tensors[0]) + 1


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and (a == b or (math.isnan(a) and math.isnan(b)))


def _tensors(tree, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in _tensors(value, f"{prefix}/{key}").items()}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]


def _environment(pid: int) -> list[str]:
    return _read(pid, "environ")


def _words(pid: int) -> list[str]:
    return _read(pid, "cmdline")


def _read(pid: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []
