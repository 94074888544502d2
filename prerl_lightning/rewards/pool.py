"""Verification in worker processes: a verifier that hangs, crashes or eats memory costs its own answer and no more.

Each worker (process.py, worker.py) is a plain ``python -m`` behind a pipe, started and served by one thread here. An
answer that takes longer than the limit is a *timeout*: first an exception is raised in the verifier, then, where that
does not help (a C extension), the worker is killed and replaced. A verifier that raises, returns no number within
`LARGEST` or takes its worker with it twice is an *error*. Both count 0 as a reward and are told apart from wrong
answers in the log; above a share of a batch they stop the run, as soon as that share is certain. What a lost worker
still had to do goes to whichever is free.

A reward that is better given many answers (score.py) gets whole groups, up to ``batch`` answers, and has ``timeout``
seconds for each of them together; what it raises, or does to its worker, is then the failure of all. An async one has
``timeout`` for each answer, whose failures are its own.
"""

import logging
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

from prerl_lightning.errors import InputError, check_bounds
from prerl_lightning.rewards.judging import Arguments, Failure, Judged, judge, judge_all
from prerl_lightning.rewards.process import WorkerProcess, counter, not_loadable
from prerl_lightning.rewards.score import Reward, at_once
from prerl_lightning.terminal import printable
from prerl_lightning.watchdog import watchdog

log = logging.getLogger(__name__)

CHUNK = 16  # answers a message
SHOWN = 3  # failures of a run that are shown with their text, and a worker's losses
WAIT = 10.0  # seconds of waiting for verdicts until a word on it; twice as many to the next


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
        parts: of a sum, its rewards by name.
    """

    score: float
    answer: str | None = None
    failure: Failure | None = None
    message: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


HUNG = Verdict(0.0, None, "timeout", "the verifier did not come back and was killed")


@dataclass(frozen=True)
class Verification:
    """How rewards are computed.

    Args:
        workers: processes a rank; 0: in the training process, without any limit, for a debugger's sake.
        timeout: seconds an answer.
        memory_mib: address space of a worker.
        max_failed: the run stops if a larger share of a batch's answers ended in a timeout or an error.
        batch: answers that a reward which takes many gets at a time: whole groups, until there are so many.
        try_truths: look at the start at what the sets' own truths earn. False where a truth is no answer, such as a
            number to reach.
    """

    workers: int = 2
    timeout: float = 5.0
    memory_mib: int = 2048
    max_failed: float = 0.1
    batch: int = 64
    try_truths: bool = True

    def __post_init__(self) -> None:
        least = {"workers": 0, "memory_mib": 256, "max_failed": 0, "batch": 1}
        check_bounds(self, "data.verification", least, {"timeout": 0}, {"max_failed": 1})


class RewardPool:
    """Workers that all hold one reward.

    Raises:
        InputError: the reward cannot be sent to a worker, or a worker cannot load it.
    """

    def __init__(self, reward: Reward, options: Verification) -> None:
        self.reward, self.options = reward, options
        self._shown = 0
        self.at_once = at_once(reward)
        self._queue: queue.SimpleQueue[list[Entry] | None] = queue.SimpleQueue()
        self._threads: list[_Worker] = []
        if options.workers:
            try:
                # by value where a worker cannot import it: of a script, a notebook's cell, another function
                pickled = cloudpickle.dumps(reward)
            except Exception as error:
                raise not_loadable(reward, str(error)) from error
            written = counter()
            self._threads = [_Worker(self._queue, reward, pickled, options, written) for _ in range(options.workers)]
            try:
                for thread in self._threads:
                    thread.start()
                for thread in self._threads:
                    thread.started.result()
            except BaseException:
                self.close()
                raise

    def submit(self, items: Sequence[Item]) -> "list[Future[Verdict]]":
        """Returns at once; the futures are in the items' order. A reward that takes many gets these together."""
        futures: list[Future[Verdict]] = [Future() for _ in items]
        entries = [*zip(items, futures, strict=True)]
        if self.options.workers:
            for part in [entries] if self.at_once else [[entry] for entry in entries]:
                self._queue.put(part)
            return futures
        for future, judged in zip(futures, self._judged_here([_arguments(item) for item in items]), strict=True):
            future.set_result(Verdict(*judged))
        return futures

    def _judged_here(self, many: list[Arguments]) -> list[Judged]:
        if not self.at_once:
            return [judge(self.reward, arguments) for arguments in many]
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has an event loop
            return thread.submit(judge_all, self.reward, many, self.options.timeout).result()

    def collect(self, items: Sequence[Item], futures: "Sequence[Future[Verdict]]") -> list[Verdict]:
        """Waits for the verdicts of one batch, says how far it is where that takes long, and shows the first failures
        of the run.

        Raises:
            InputError: more than ``max_failed`` of them failed; without waiting for those that cannot change it.
        """
        most = self.options.max_failed * len(items)
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        number = {future: i for i, future in enumerate(futures)}
        for future in futures:
            future.add_done_callback(lambda ended: done.put(number[ended]))
        failed: list[str] = []
        begun, word = time.monotonic(), WAIT
        for n in range(1, len(items) + 1):
            i: int | None = None
            while i is None:
                with suppress(queue.Empty):
                    i = done.get(timeout=max(0.0, begun + word - time.monotonic()))
                if (waited := time.monotonic() - begun) >= word:
                    word *= 2
                    log.info(
                        "reward: %d of %d answers are verified after %.0f s of waiting, %d of them failed; above %d "
                        "the run stops.",
                        *(n - 1, len(items), waited, len(failed), int(most)),
                    )
            watchdog.move()
            verdict = futures[i].result()
            if not verdict.failure:
                continue
            failed.append(_described(items[i], verdict))
            if self._shown < SHOWN:
                self._shown += 1
                log.warning("reward: %s", failed[-1])
            if len(failed) > most:
                for future in futures:
                    future.cancel()
                left = f"; {len(items) - n} more were not waited for" if n < len(items) else ""
                raise InputError(
                    f"data.reward: {len(failed)} of {len(items)} answers could not be verified, more than "
                    f"data.verification.max_failed ({self.options.max_failed:.0%}){left}. The first: {failed[0]}"
                )
        return [future.result() for future in futures]

    def verify(self, items: Sequence[Item]) -> list[Verdict]:
        return self.collect(items, self.submit(items))

    @property
    def replaced(self) -> int:
        """Workers lost so far."""
        return sum(thread.lost for thread in self._threads)

    @property
    def pids(self) -> list[int]:
        return [process.process.pid for t in self._threads if (process := t.process) is not None]

    def close(self) -> None:
        """At once: what is not verified by now is not waited for."""
        for thread in self._threads:
            thread.closing = True
        with suppress(queue.Empty):
            while True:
                for _, future in self._queue.get_nowait() or []:
                    future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            while thread.is_alive():  # one that was starting a process has another by now
                if (process := thread.process) is not None:
                    process.kill()
                thread.join(0.1)
        self._threads = []


Entry = tuple[Item, "Future[Verdict]"]


class _Worker(threading.Thread):
    """Starts one worker process, serves it, and replaces it."""

    def __init__(
        self,
        work: "queue.SimpleQueue[list[Entry] | None]",
        reward: Reward,
        pickled: bytes,
        options: Verification,
        written: Iterator[int],
    ) -> None:
        super().__init__(daemon=True, name="prerl-reward")
        self.work, self.options, self.at_once = work, options, at_once(reward)
        self._made_of = (reward, pickled, options.timeout, options.memory_mib, written)
        self.process: WorkerProcess | None = None
        self.started: Future[None] = Future()
        self.closing = False
        self.lost = 0

    def _begin(self) -> WorkerProcess:
        """A process that is ready. Raises InputError where it cannot load the reward, EOFError or OSError where it
        died."""
        if self.process is None:
            self.process = WorkerProcess(*self._made_of)
        if not self.process.ready:
            self.process.load()
        return self.process

    def _lose(self, ending: str, chunk: list[Entry], present: int) -> None:
        """All but the present answers is left to the others."""
        self._drop()
        self.lost += 1
        if self.lost <= SHOWN:
            log.warning("reward: at row %d %s; another is started.", chunk[0][0].row, ending)
        for entry in chunk[present:]:
            self.work.put([entry])
        del chunk[present:]

    def _drop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

    def run(self) -> None:
        try:
            self._begin()
        except (EOFError, ConnectionError):
            assert self.process is not None
            self.started.set_exception(not_loadable(self._made_of[0], self.process.ending()))
        except BaseException as error:
            self.started.set_exception(error)
        else:
            self.started.set_result(None)
            while (chunk := self._take()) is not None:
                try:
                    self._serve(chunk)
                except BaseException as error:  # whoever waits for a verdict learns of it
                    for _, future in chunk:
                        with suppress(InvalidStateError):
                            future.set_exception(error)
        self._drop()

    def _take(self) -> list[Entry] | None:
        """Some of the work, one by one so much that it ends at about the same time for all; None at the end."""
        if self.process is None and not self.closing:  # first the next worker: the others have the work meanwhile
            try:
                self._begin()
            except (EOFError, OSError, InputError):  # said when it is to serve
                self._drop()
        first = self.work.get()
        if first is None:
            return None
        chunk = [*first]
        share = min(CHUNK, self.work.qsize() // (2 * self.options.workers))
        while len(chunk) < (self.options.batch if self.at_once else share):
            try:
                more = self.work.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self.work.put(None)
                break
            chunk += more
        return [entry for entry in chunk if not entry[1].cancelled()]

    def _serve(self, chunk: list[Entry]) -> None:
        present = len(chunk) if self.at_once else 1  # answers that are judged together
        deaths = 0  # of workers, at them
        sent = False
        while chunk:
            if self.closing:
                for _, future in chunk:
                    future.cancel()
                return
            verdicts: list[Verdict] | None = None
            try:
                process = self._begin()
                if not sent:
                    process.ask([_arguments(item) for item, _ in chunk])
                    sent = True
                if found := process.next_verdicts(present):
                    verdicts = [Verdict(*judged) for judged in found]
                else:
                    verdicts, sent = [HUNG] * present, False
                    self._lose("its worker did not answer", chunk, present)
            except (EOFError, ConnectionError, BlockingIOError) as error:  # the last: it does not read
                if self.closing:
                    continue
                ending = "its worker does not read"
                if self.process is not None and not isinstance(error, BlockingIOError):
                    ending = self.process.ending()
                self._lose(ending, chunk, present)
                sent = False
                deaths += 1
                if signal.SIGPROF.name in ending:  # the kernel's timer: see worker.py
                    verdicts = [HUNG] * present
                elif deaths == 2:  # at the first time the answer need not be what killed it
                    verdicts = [Verdict(0.0, None, "error", ending)] * present
            for verdict in verdicts or []:
                with suppress(InvalidStateError):  # cancelled: the run stops
                    chunk.pop(0)[1].set_result(verdict)
                deaths = 0


def _arguments(item: Item) -> Arguments:
    return item.prompt, item.response, item.ground_truth, item.extra


def _described(item: Item, verdict: Verdict) -> str:
    truth, response = item.ground_truth[:100], item.response[-300:]
    return f"{verdict.failure} at row {item.row}: {printable(verdict.message)}; truth {truth!r}, response {response!r}"
