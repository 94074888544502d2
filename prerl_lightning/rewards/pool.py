"""Verification in worker processes: a verifier that hangs, crashes or eats memory costs its own answer and no more.

Each worker is a plain ``python -m prerl_lightning.rewards.worker`` behind a pipe, served by one thread here. An answer
that takes longer than the limit is a *timeout*: first an exception is raised in the verifier, then, where that does not
help (a C extension), the worker is killed and replaced. A verifier that raises, returns no finite number or takes its
worker with it twice is an *error*. Both count 0 as a reward and are told apart from wrong answers in the log; above a
share of a batch they stop the run. What a lost worker still had to do goes to whichever is free.
"""

import logging
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from prerl_lightning.errors import InputError, check_ranges
from prerl_lightning.rewards.score import Reward
from prerl_lightning.rewards.worker import HARD_LIMIT, Failure, judge

log = logging.getLogger(__name__)

CHUNK = 16  # answers a message
START_SECONDS = 120.0
SLOW_START = 10.0  # seconds from which on the start of a worker is worth a line
MARGIN = 5.0  # seconds beyond an answer's limits, for a machine that is busy
SHOWN = 3  # failures of a run that are shown with their text, and a worker's losses


@dataclass(frozen=True)
class Item:
    """One response to verify: the arguments of a reward, and the problem's row for messages."""

    prompt: str
    response: str
    ground_truth: str
    extra: Mapping[str, Any]
    row: int = 0


@dataclass(frozen=True)
class Verdict:
    """The reward of one response.

    Args:
        score: 0 if it failed.
        answer: what the verifier read, for maj@k; None: nothing, or the verifier does not say.
        failure: None: a verdict, right or wrong.
        message: of a failure.
    """

    score: float
    answer: str | None = None
    failure: Failure | None = None
    message: str = ""


HUNG = Verdict(0.0, None, "timeout", "the verifier did not come back and was killed")


@dataclass(frozen=True)
class Verification:
    """How rewards are computed.

    Args:
        workers: processes a rank; 0: in the training process, without any limit, for a debugger's sake.
        timeout: seconds an answer.
        memory_mib: address space of a worker.
        max_failed: the run stops if a larger share of a batch's answers ended in a timeout or an error.
    """

    workers: int = 2
    timeout: float = 5.0
    memory_mib: int = 2048
    max_failed: float = 0.1

    def __post_init__(self) -> None:
        checks = {
            "workers": self.workers >= 0,
            "timeout": self.timeout > 0,
            "memory_mib": self.memory_mib >= 256,
            "max_failed": 0 <= self.max_failed <= 1,
        }
        check_ranges(self, "data.verification", checks)


class RewardPool:
    """Workers that all hold one reward.

    Raises:
        InputError: the reward cannot be sent to a worker, or a worker cannot load it.
    """

    def __init__(self, reward: Reward, options: Verification) -> None:
        self.reward, self.options = reward, options
        self._shown = 0
        self._queue: queue.SimpleQueue[tuple[Item, Future[Verdict]] | None] = queue.SimpleQueue()
        self._threads: list[_Worker] = []
        if options.workers:
            try:
                pickled = pickle.dumps(reward)
            except Exception as error:
                raise _not_loadable(reward, str(error)) from error
            self._threads = [_Worker(self._queue, reward, pickled, options) for _ in range(options.workers)]
            for thread in self._threads:
                thread.launch()
            for thread in self._threads:
                try:
                    thread.await_ready()
                except (EOFError, ConnectionError):
                    raise _not_loadable(reward, thread._ending()) from None
                thread.start()

    def submit(self, items: Sequence[Item]) -> "list[Future[Verdict]]":
        """Returns at once; the futures are in the items' order."""
        futures: list[Future[Verdict]] = [Future() for _ in items]
        for item, future in zip(items, futures, strict=True):
            if self.options.workers:
                self._queue.put((item, future))
            else:
                future.set_result(Verdict(*judge(self.reward, _arguments(item))))
        return futures

    def collect(self, items: Sequence[Item], futures: "Sequence[Future[Verdict]]") -> list[Verdict]:
        """Waits for the verdicts of one batch, and shows the first failures of the run.

        Raises:
            InputError: more than ``max_failed`` of them failed.
        """
        verdicts = [future.result() for future in futures]
        failed = [(i, v) for i, v in zip(items, verdicts, strict=True) if v.failure]
        described = [
            f"{v.failure} at row {i.row}: {v.message}; truth {i.ground_truth[:100]!r}, response {i.response[-300:]!r}"
            for i, v in failed
        ]
        for text in described[: max(0, SHOWN - self._shown)]:
            self._shown += 1
            log.warning("reward: %s", text)
        if len(failed) > self.options.max_failed * len(items):
            raise InputError(
                f"data.reward: {len(failed)} of {len(items)} answers could not be verified, which is more than "
                f"data.verification.max_failed ({self.options.max_failed:.0%}). The first: {described[0]}"
            )
        return verdicts

    def verify(self, items: Sequence[Item]) -> list[Verdict]:
        return self.collect(items, self.submit(items))

    @property
    def replaced(self) -> int:
        """Workers lost so far."""
        return sum(thread.lost for thread in self._threads)

    @property
    def pids(self) -> list[int]:
        return [t.process.pid for t in self._threads if t.process is not None]

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


class _Worker(threading.Thread):
    """Serves one worker process, and replaces it."""

    def __init__(self, work: queue.SimpleQueue, reward: Reward, pickled: bytes, options: Verification) -> None:
        super().__init__(daemon=True, name="prerl-reward")
        self.work, self.reward, self.pickled, self.options = work, reward, pickled, options
        self.process: subprocess.Popen | None = None
        self.pipe: Connection
        self.ready = False
        self.lost = 0

    def launch(self) -> None:
        self.pipe, theirs = Pipe()
        self._limit_sending(START_SECONDS)
        command = [sys.executable, "-m", "prerl_lightning.rewards.worker", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        # not with the first answers: a path that differs here must not decide what the worker imports first
        self.pipe.send((sys.path, self.options.timeout, self.options.memory_mib))
        self.pipe.send_bytes(self.pickled)

    def await_ready(self) -> None:
        """Raises InputError where the worker cannot load the reward, EOFError or ConnectionError where it died."""
        there = self._sign_of_life()
        problem = self.pipe.recv() if there else f"no sign of life in {START_SECONDS:.0f} s"
        if problem:
            self.stop()
            raise _not_loadable(self.reward, problem)
        self.ready = True
        self._limit_sending(self._patience)

    def _sign_of_life(self) -> bool:
        """Waits for the first one of a worker."""
        begun, there = time.monotonic(), self.pipe.poll(START_SECONDS)
        if (seconds := time.monotonic() - begun) > SLOW_START:
            log.warning("reward: waited %.0f s for a worker to start.", seconds)
        return there

    @property
    def _patience(self) -> float:
        """Seconds for an answer, after which a worker counts as hung."""
        return HARD_LIMIT * self.options.timeout + MARGIN

    def _limit_sending(self, seconds: float) -> None:
        """A message larger than the pipe's buffer would wait without end for a worker that does not read."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        with socket.fromfd(self.pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _lose(self, ending: str, chunk: "list[tuple[Item, Future[Verdict]]]") -> None:
        """All but the present answer is left to the others."""
        self.stop()
        self.lost += 1
        if self.lost <= SHOWN:
            log.warning("reward: at row %d %s; another is started.", chunk[0][0].row, ending)
        for entry in chunk[1:]:
            self.work.put(entry)
        del chunk[1:]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.process, self.ready = None, False

    def _ending(self) -> str:
        assert self.process is not None
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "its worker closed the pipe"
        return f"its worker died ({signal.Signals(-status).name if status < 0 else f'exit status {status}'})"

    def run(self) -> None:
        while (chunk := self._take()) is not None:
            try:
                self._serve(chunk)
            except BaseException as error:  # whoever waits for a verdict learns of it
                for _, future in chunk:
                    if not future.done():
                        future.set_exception(error)
        self.stop()

    def _take(self) -> "list[tuple[Item, Future[Verdict]]] | None":
        """Some of the work, so that it ends at about the same time for all; None at the end."""
        if not self.ready:  # first the next worker: the others have the work meanwhile
            with suppress(EOFError, OSError):  # said when it is to serve
                if self.process is None:
                    self.launch()
                self._sign_of_life()
        first = self.work.get()
        if first is None:
            return None
        chunk = [first]
        share = self.work.qsize() // (2 * self.options.workers)
        while len(chunk) < min(CHUNK, share):
            try:
                more = self.work.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self.work.put(None)
                break
            chunk.append(more)
        return chunk

    def _serve(self, chunk: list[tuple[Item, "Future[Verdict]"]]) -> None:
        deaths = 0  # of workers, at the answer that is next
        sent = False
        while chunk:
            verdict: Verdict | None = None
            try:
                if self.process is None:
                    self.launch()
                if not self.ready:
                    self.await_ready()
                if not sent:
                    self.pipe.send([_arguments(item) for item, _ in chunk])
                    sent = True
                if self.pipe.poll(self._patience):
                    verdict = Verdict(*self.pipe.recv())
                else:
                    verdict, sent = HUNG, False
                    self._lose("its worker did not answer", chunk)
            except (EOFError, ConnectionError, BlockingIOError) as error:  # the last: it does not read
                hung = isinstance(error, BlockingIOError)
                ending = "its worker does not read" if hung else self._ending()
                self._lose(ending, chunk)
                sent = False
                deaths += 1
                if signal.SIGPROF.name in ending:  # the kernel's timer: see worker.py
                    verdict = HUNG
                elif deaths == 2:  # at the first time the answer need not be what killed it
                    verdict = Verdict(0.0, None, "error", ending)
            if verdict is not None:
                chunk.pop(0)[1].set_result(verdict)
                deaths = 0


def _arguments(item: Item) -> tuple[str, str, str, Mapping[str, Any]]:
    return item.prompt, item.response, item.ground_truth, item.extra


def _not_loadable(reward: Reward, problem: str) -> InputError:
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return InputError(
        f"data.reward: {name} cannot be used in a worker process: {problem}. Put it into a module on PYTHONPATH, or "
        "set data.verification.workers: 0, which verifies in the training process and has no time limit."
    )
