"""Runs of a study: which there are, how each stands, and making those that are missing, side by side.

A run lies in ROOT/STUDY/ARM-seed-N-IDENTITY, in which ``prerl fit`` makes its version_N folders; run.log has what it
wrote. One of the same identity is taken from wherever it is below ROOT. While a run goes on its process holds a lock
(the file ``lock``, with its number), so that no other study, and no second start of this one, makes it again.
"""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from prerl_lightning.errors import InputError
from prerl_lightning.locks import lock as lock_file
from prerl_lightning.report.folders import versions
from prerl_lightning.report.reading import read_run
from prerl_lightning.report.runs import Run
from prerl_lightning.report.words import duration

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a run has to write its checkpoint when the study is stopped


@dataclass(frozen=True)
class Planned:
    """A run that a study needs. ``point``: the number of its tuning point; None: it is compared."""

    arm: str
    point: int | None
    seed: int
    arguments: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm}{'' if self.point is None else f', point {self.point + 1}'}, seed {self.seed}"


@dataclass(frozen=True)
class Status:
    """``state``: finished, unfinished (there is something to resume or to make again), or none."""

    state: str
    said: str
    run: Run | None = None

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def status(folder: Path) -> Status:
    """By the run's newest version, with the steps of those it was resumed from."""
    found = [v for name in sorted(folder.glob("*")) for v in versions(name, ["metrics.csv"])]
    if not found:
        begun = (folder / "run.log").exists()
        return Status("unfinished", last_words(folder)) if begun else Status("none", "not begun")
    run = read_run(found[-1])
    if run.info.get("status") != "finished":
        error = run.info.get("error") or last_words(folder)
        return Status("unfinished", f"ended at step {run.steps}: {error}", run)
    if run.max_steps and run.steps < run.max_steps:
        why = run.info.get("stopped")
        said = f"stopped at step {run.steps} of {run.max_steps}{f': {why}' if why else ''}"
        return Status("unfinished", said, run)
    return Status("finished", f"{run.steps} steps", run)


def last_words(folder: Path) -> str:
    """Of run.log: the error's line if there is one."""
    try:
        lines = (folder / "run.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no run.log"
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("prerl: error:")]
    return (errors or said or ["it wrote nothing"])[-1][:300]


@dataclass(frozen=True)
class Slot:
    """Where one run at a time goes: its part of the cores, or a GPU. None, and empty: as the study's own process."""

    cores: tuple[int, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def slots(jobs: int) -> list[Slot]:
    """Raises InputError: more jobs than GPUs, or than cores where there is none."""
    if jobs == 1:
        return [Slot()]
    gpus, cores = _gpus(), sorted(os.sched_getaffinity(0))
    if jobs > len(gpus or cores):
        raise InputError(f"jobs: {jobs} is more than the {len(gpus or cores)} {'GPUs' if gpus else 'cores'} there are.")
    if gpus:
        return [Slot(None, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:jobs]]
    shares = [tuple(cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs]) for i in range(jobs)]
    return [Slot(share, {"OMP_NUM_THREADS": str(len(share))}) for share in shares]


def _gpus() -> list[str]:
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.split() if asked.returncode == 0 else []


@dataclass
class _Going:
    run: Planned
    slot: Slot
    process: subprocess.Popen[bytes]
    lock: IO[str]
    since: float


def make(runs: Sequence[Planned], places: Sequence[Slot], ended: Callable[[Planned], None]) -> None:
    """All of them, each once, ``ended`` called behind each; one that fails is said and passed over. On ^C and SIGTERM
    the runs are interrupted, which write a checkpoint, and the signal goes on as KeyboardInterrupt or SystemExit."""
    waiting, free = deque(_begin_with_unfinished(runs)), list(places)
    going: list[_Going] = []
    elsewhere: set[Path] = set()
    done = 0
    with _signals():
        try:
            while waiting or going:
                for _ in range(len(waiting) if free else 0):
                    run = waiting.popleft()
                    lock = _locked(run.folder)
                    if lock is None:  # by a run that outlived its study, or of another study
                        waiting.append(run)
                        if run.folder not in elsewhere:
                            log.info("%s: going on in another process, which is waited for", run)
                            elsewhere.add(run.folder)
                    elif status(run.folder).finished:  # since it was listed
                        lock.close()
                        done += 1
                        ended(run)
                    else:
                        going.append(_start(run, free.pop(0), lock))
                        if not free:
                            break
                time.sleep(0.2)
                for one in [one for one in going if one.process.poll() is not None]:
                    going.remove(one)
                    free.append(one.slot)
                    one.lock.close()
                    done += 1
                    _say_end(one, done, len(runs))
                    ended(one.run)
        except BaseException:
            _stop(going)
            raise


def _begin_with_unfinished(runs: Sequence[Planned]) -> list[Planned]:
    """What was begun comes first: one more whole run is worth more than two halves."""
    return sorted(runs, key=lambda run: status(run.folder).state != "unfinished")


def _locked(folder: Path) -> IO[str] | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a")  # whose number stays where it is another's
    try:
        lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    return file


def _start(run: Planned, slot: Slot, lock: IO[str]) -> _Going:
    begun = any(run.folder.glob("**/last.ckpt"))
    command = [sys.executable, "-m", "prerl_lightning.cli", "fit", *run.arguments]
    command += [f"--trainer.default_root_dir={run.folder}", *(["--ckpt_path=last"] if begun else [])]
    log.info("%s: %s, %s", run, "resumed" if begun else "begins", run.folder)
    own_cores = os.sched_getaffinity(0)
    with (run.folder / "run.log").open("ab") as output:
        output.write(f"$ prerl {' '.join(command[3:])}\n".encode())
        output.flush()
        try:
            if slot.cores is not None:
                os.sched_setaffinity(0, slot.cores)  # a child has its parent's
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment},
                start_new_session=True,  # ^C is for the study, which then interrupts its runs
                pass_fds=[lock.fileno()],  # held as long as the run lives, also without its study
            )
        finally:
            os.sched_setaffinity(0, own_cores)
    lock.write(f"{process.pid}\n")
    lock.flush()
    return _Going(run, slot, process, lock, time.monotonic())


def _say_end(one: _Going, done: int, total: int) -> None:
    found, code = status(one.run.folder), one.process.returncode
    seconds = duration(time.monotonic() - one.since)
    if found.finished:
        log.info("%s: finished, %s in %s (%d of %d)", one.run, found.said, seconds, done, total)
    else:
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        log.warning("%s: FAILED (%s): %s. All it wrote: %s", one.run, how, found.said, one.run.folder / "run.log")


def _stop(going: Sequence[_Going]) -> None:
    if going:
        log.info("Stopping %d run%s; the same command goes on from here.", len(going), "s" if len(going) > 1 else "")
    for one in going:
        one.process.send_signal(signal.SIGINT)
    end = time.monotonic() + PATIENCE
    for one in going:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.1, end - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)  # with what it started
        one.process.wait()
        one.lock.close()


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM exits. SIGINT is heard where a shell's ``&`` had it ignored: what runs inherit of that would keep them
    from hearing `_stop`, and they would be killed without a checkpoint."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
