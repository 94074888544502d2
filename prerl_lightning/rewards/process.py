"""One worker process as its thread in rewards/pool.py sees it: started, asked, and killed."""

import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Pipe
from typing import IO, Any

from prerl_lightning.errors import InputError
from prerl_lightning.rewards.judging import Judged
from prerl_lightning.rewards.score import Reward, name_of
from prerl_lightning.rewards.worker import HARD_LIMIT
from prerl_lightning.terminal import printable

log = logging.getLogger(__name__)

START_SECONDS = 120.0
SLOW_START = 10.0  # seconds from which on the start of a worker is worth a line
MARGIN = 5.0  # seconds beyond an answer's limits, for a machine that is busy
LINES, WIDTH = 5, 300  # of what all workers of a pool write, that is shown


class WorkerProcess:
    """It ends with the thread that makes it (worker.py), so that thread is to be the one that serves it.

    Args:
        reward: for messages; ``pickled`` is what the worker gets.
        timeout: seconds an answer.
        memory_mib: address space beyond what its imports take.
        written: counts the lines that workers have written, all that share it.
    """

    def __init__(self, reward: Reward, pickled: bytes, timeout: float, memory_mib: int, written: Iterator[int]) -> None:
        self.reward, self.pickled, self.timeout, self.memory_mib = reward, pickled, timeout, memory_mib
        self.ready = False
        self.pipe, theirs = Pipe()
        self._limit_sending(START_SECONDS)
        command = [sys.executable, "-m", "prerl_lightning.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        assert self.process.stdout is not None
        self.output = _Output(self.process.stdout, written)
        self.output.start()

    def load(self) -> None:
        """Has it load the reward. Raises InputError where it cannot, EOFError or OSError where it died."""
        # the path not with the first answers: one that differs here must not decide what the worker imports first
        self.pipe.send((sys.path, self.timeout, self.memory_mib))
        self.pipe.send_bytes(self.pickled)
        if not self.pipe.poll(SLOW_START):
            log.warning("reward: a worker is still importing %s after %.0f s.", name_of(self.reward), SLOW_START)
        there = self.pipe.poll(START_SECONDS - SLOW_START)
        problem = self.pipe.recv() if there else f"no sign of life in {START_SECONDS:.0f} s"
        if problem:
            raise not_loadable(self.reward, problem)
        self.ready = True
        self._limit_sending(self.patience(1))

    def patience(self, answers: int) -> float:
        """Seconds for so many answers, after which it counts as hung."""
        return HARD_LIMIT * self.timeout * answers + MARGIN

    def _limit_sending(self, seconds: float) -> None:
        """A message larger than the pipe's buffer would wait without end for a worker that does not read."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        with socket.fromfd(self.pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def ask(self, answers: Sequence[Any]) -> None:
        """Raises ConnectionError where it died, BlockingIOError where it does not read."""
        self.pipe.send(answers)

    def next_verdicts(self, answers: int) -> list[Judged] | None:
        """Of so many answers, which it judges together. None: it hangs. Raises EOFError or ConnectionError where it
        died."""
        return self.pipe.recv() if self.pipe.poll(self.patience(answers)) else None

    def ending(self) -> str:
        """How it ended, and the last that it wrote."""
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "its worker closed the pipe"
        self.output.join(1.0)  # a process that it started may keep the other end
        last = f", and wrote last: {printable(self.output.tail.strip())}" if self.output.tail.strip() else ""
        return f"its worker died ({signal.Signals(-status).name if status < 0 else f'exit status {status}'}){last}"

    def kill(self) -> None:
        """From any thread: whoever waits for a verdict of it gets an EOFError."""
        self.process.kill()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class _Output(threading.Thread):
    """Reads what a worker, or C code in it, writes to its standard output and error: to the end, so that it never
    waits for a reader; the first lines are shown."""

    def __init__(self, stream: IO[bytes], written: Iterator[int]) -> None:
        super().__init__(daemon=True, name="prerl-reward-output")
        self.stream, self.written = stream, written
        self._last = b""

    @property
    def tail(self) -> str:
        return self._last.decode("utf-8", "replace")

    def run(self) -> None:
        rest, shows = b"", True
        with self.stream:
            while new := os.read(self.stream.fileno(), 1 << 16):
                self._last = (self._last + new)[-WIDTH:]
                if shows:
                    *lines, rest = (rest + new).split(b"\n")
                    rest = rest[:WIDTH]
                    shows = all(self._show(line) for line in lines)
            if shows:
                self._show(rest)

    def _show(self, line: bytes) -> bool:
        """False: enough have been."""
        text = line.decode("utf-8", "replace").strip()[:WIDTH]
        number = next(self.written) if text else 0
        if text and number < LINES:
            log.info("reward: a worker wrote: %s", printable(text))
        elif number == LINES:
            log.info("reward: what workers write from here on is not shown.")
        return number < LINES


def counter() -> Iterator[int]:
    """For ``written``: `next` of it is one step, whatever the threads."""
    return itertools.count()


def not_loadable(reward: Reward, problem: str) -> InputError:
    return InputError(
        f"data.reward: {name_of(reward)} cannot be used in a worker process: {printable(problem)}. Put it into a "
        "module on PYTHONPATH, or set data.verification.workers: 0 (in Python verification=Verification(workers=0)), "
        "which verifies in the training process and has no time limit."
    )
