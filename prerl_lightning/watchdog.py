"""Which rank died or stands still, and where: what the ranks of one machine tell each other in a table of shared
memory, and the threads that look at it. Between machines torch's own time limits hold.

A rank that waits in a collective call stands as still as the one it waits for. What tells them apart: a stopped process
gives no sign of life, which a thread gives for all others; and of those that live, one is behind in step or phase.
"""

import logging
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prerl_lightning.signals import ENDING, signals

log = logging.getLogger(__name__)

# in a step's order; an evaluation has batches instead of steps
PHASES = ("start-up", "checkpoint", "validation", "weights", "rollout", "update", "measurements", "evaluation")
ROW = struct.Struct("qdqqq")
BEAT = 1.0  # seconds between signs of life
STALE = 10.0  # seconds without one: stopped
GRACE = 5.0  # seconds for a process to end by itself when a rank is gone
MEND = "The run has ended; --ckpt_path last goes on."


class Row(NamedTuple):
    """``pid`` 0: not there yet, or done. ``seen``: monotonic seconds of the last sign of life; ``moves``: counted."""

    pid: int
    seen: float
    moves: int
    step: int
    phase: int

    @property
    def where(self) -> str:
        phase = PHASES[self.phase]
        unit = "batch" if phase == "evaluation" else "step"
        return f"the {phase} of {unit} {self.step}" if self.phase else phase


class Watchdog:
    """Of this process.

    Attributes:
        children: the rank processes that it has started.
        on_end: told why, before the process is ended from here.
        mend: what is said behind it.
    """

    def __init__(self) -> None:
        self.children: Sequence[subprocess.Popen] = ()
        self.on_end: Callable[[str], None] = _nothing
        self.mend = MEND
        self.warn_after, self.end_after = 120.0, 600.0
        self._table: mmap.mmap | None = None
        self._local_rank, self._first_rank, self._ranks = 0, 0, 1
        self._moves, self._step, self._phase = 0, 0, 0
        self._finishing = False

    # ------------------------------------------------------------------ what a rank tells

    def mark(self, phase: str, step: int) -> None:
        """``phase``: of PHASES."""
        self._phase, self._step = PHASES.index(phase), step
        self.move()
        self._tell()

    def move(self) -> None:
        """Something was done: a forward pass, a token of each sequence, a verdict."""
        self._moves += 1

    def share(self, strategy: Any, ranks: int) -> None:
        """`open` for the ranks of a Lightning strategy, so many a machine. Collective."""
        name = strategy.broadcast(f"prerl-ranks-{uuid.uuid4().hex}")
        path = Path(tempfile.gettempdir()) / f"{name}-{strategy.node_rank}"
        self.open(path, strategy.local_rank, ranks, strategy.barrier, strategy.node_rank * ranks)

    def open(self, path: Path, local_rank: int, ranks: int, barrier: Callable[[], None], first_rank: int = 0) -> None:
        """Share a table with the other ranks of this machine. Collective.

        Args:
            path: of a file that exists until all have it.
            first_rank: the global rank of this machine's first.
        """
        size = ROW.size * ranks
        if local_rank == 0:
            path.write_bytes(bytes(size))
        barrier()
        with path.open("r+b") as file:
            self._table = mmap.mmap(file.fileno(), size)
        barrier()
        if local_rank == 0:
            path.unlink()
        self._local_rank, self._first_rank, self._ranks, self._finishing = local_rank, first_rank, ranks, False
        self._tell()
        barrier()
        threading.Thread(target=self._watch, args=(self._table,), daemon=True, name="prerl-watchdog").start()

    def close(self) -> None:
        """This rank is through."""
        self.mend, self.on_end = MEND, _nothing  # which holds the run
        if self._table is not None:
            self._table[self._place(self._local_rank)] = bytes(ROW.size)
            self._table = None

    def _tell(self) -> None:
        if self._table is not None:
            row = (os.getpid(), time.monotonic(), self._moves, self._step, self._phase)
            self._table[self._place(self._local_rank)] = ROW.pack(*row)

    def _place(self, local_rank: int) -> slice:
        return slice(local_rank * ROW.size, (local_rank + 1) * ROW.size)

    def _rows(self) -> dict[int, Row]:
        """By local rank, of those that are there."""
        table = self._table
        rows = {} if table is None else {i: Row(*ROW.unpack(table[self._place(i)])) for i in range(self._ranks)}
        return {i: row for i, row in rows.items() if row.pid}

    # ------------------------------------------------------------------ who stands still

    def _watch(self, table: mmap.mmap) -> None:
        moved: dict[int, tuple[tuple[int, ...], float]] = {}  # by local rank: what it last told, since when
        gone: dict[int, float] = {}  # since when
        warned, before = False, time.monotonic()
        while self._table is table:
            self._tell()
            time.sleep(BEAT)
            rows, now = self._rows(), time.monotonic()
            if now - before > STALE:  # it was this process that stood still, as a job that is suspended does
                moved.clear()
            before = now
            for i, row in rows.items():
                if i not in moved or moved[i][0] != row[2:]:
                    moved[i] = (row[2:], now)
                if not _exists(row.pid):
                    gone.setdefault(i, now)
            # one rank of a machine looks after the others
            if self._finishing or any(i < self._local_rank and now - row.seen < STALE for i, row in rows.items()):
                continue
            if any(now - since > GRACE for since in gone.values()):  # no collective call has failed of it
                self._end(self._gone(min(gone), rows[min(gone)]))
            still = min((now - moved[i][1] for i in rows), default=0.0)
            if still < self.warn_after or not self.warn_after:
                warned = False
                continue
            # a slow disk shows no moves, and is no reason to end a run
            saving = all(PHASES[row.phase] == "checkpoint" and now - row.seen < STALE for row in rows.values())
            end_after = 0.0 if saving else self.end_after
            if not warned:
                warned = True
                end = f" The run ends in {end_after:.0f} s (watchdog.end_after)." if end_after else ""
                log.warning("%s%s", self._still(rows, now, still), end)
            elif end_after and still > self.warn_after + end_after:
                self._end(self._still(rows, now, still))

    def _still(self, rows: dict[int, Row], now: float, seconds: float) -> str:
        stopped = [i for i, row in rows.items() if now - row.seen > STALE]
        behind = min((row.step, row.phase) for row in rows.values())
        who = stopped or [i for i, row in rows.items() if (row.step, row.phase) == behind]
        sign = ", without a sign of life: stopped?" if stopped else "."
        if len(who) == len(rows):
            return f"No rank has moved for {seconds:.0f} s: all are in {rows[who[0]].where}{sign}"
        said = "; ".join(f"{self._name(i, rows[i].pid)} is in {rows[i].where}" for i in who)
        return f"No rank has moved for {seconds:.0f} s: {said}{sign} The others wait for it."

    def _name(self, local_rank: int, pid: int) -> str:
        return f"rank {self._first_rank + local_rank} (pid {pid})"

    # ------------------------------------------------------------------ who is gone

    def observe(self, children: Sequence[subprocess.Popen]) -> None:
        """Of rank processes that this one has started: the first that ends with a status ends this one too, unless
        that does so by itself, which is sooner and says more."""
        self.children, self._finishing = children, False
        signals.at_once.append(self.kill)
        threading.Thread(target=self._observe, daemon=True, name="prerl-ranks").start()

    def _observe(self) -> None:
        while not self._finishing:
            if (found := self._dead_child()) is not None:
                time.sleep(GRACE)
                if not self._finishing:
                    self._end(self._ended(*found), _status(found[1].returncode))
            time.sleep(BEAT / 2)

    def _dead_child(self) -> tuple[int, subprocess.Popen] | None:
        return next(((i, child) for i, child in enumerate(self.children, start=1) if child.poll()), None)

    def _ended(self, local_rank: int, child: subprocess.Popen) -> str:
        status = child.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if status - 128 in ENDING:
            how = f"was ended by {signal.Signals(status - 128).name}"
        row = self._rows().get(local_rank)
        return f"{self._name(local_rank, child.pid)} {how} in {row.where if row else 'start-up'}."

    def _gone(self, local_rank: int, row: Row) -> str:
        return f"{self._name(local_rank, row.pid)} is gone; it was in {row.where}."

    def lost(self, seconds: float = GRACE) -> str | None:
        """Which other rank died, for one whose collective call has failed; waits so long for it to be seen."""
        end = time.monotonic() + seconds
        while self.children or self._table is not None:
            if (found := self._dead_child()) is not None:
                return self._ended(*found)
            for i, row in self._rows().items():
                if i != self._local_rank and not _exists(row.pid):
                    return self._gone(i, row)
            if time.monotonic() > end:
                break
            time.sleep(BEAT / 10)
        return None

    @property
    def speaks(self) -> bool:
        """Whether this is the first of the ranks that are left."""
        return not any(i < self._local_rank and _exists(row.pid) for i, row in self._rows().items())

    # ------------------------------------------------------------------ the end

    def finish(self, seconds: float) -> None:
        """Wait so long for the rank processes that this one has started, and kill what is left."""
        self._finishing = True
        end = time.monotonic() + seconds
        while any(child.poll() is None for child in self.children) and time.monotonic() < end:
            time.sleep(BEAT / 20)
        self.kill()

    def kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _end(self, why: str, status: int = 1) -> None:
        """Of this process, whatever its main thread waits for, and of all other ranks of this machine."""
        self._finishing = True
        self.on_end(why)
        if self.speaks or self.children:
            print(f"prerl: error: {why} {self.mend}", file=sys.stderr, flush=True)
        self.kill()
        for i, row in self._rows().items():
            if i != self._local_rank and _exists(row.pid):
                os.kill(row.pid, signal.SIGKILL)
        sys.stdout.flush()
        os._exit(status)


def _nothing(why: str) -> None:
    pass


def _status(child: int) -> int:
    """Of this process, by a rank's: bad input, a run given up, and signals are the same here."""
    return child if child in (2, 3) or child - 128 in ENDING else 1


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


watchdog = Watchdog()
