"""A worker process of rewards/pool.py: ``python -m prerl_lightning.rewards.worker FD PARENT``.

Whatever the user's code does, the kernel sees to four things, also where Python does not come to its turn: a timer by
the clock raises an exception in the verifier; one of CPU time, later, ends the process; it ends with the thread of the
training process that started it, however that went; and what the verifier has started ends with it.
"""

import ctypes
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prerl_lightning.rewards.judging import Arguments, Judged, OutOfTime, failed, judge, judge_all
from prerl_lightning.rewards.score import at_once

HARD_LIMIT = 1.5  # times the timeout
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _in_time(judged: Callable[[], list[Judged]], answers: int, seconds: float) -> list[Judged]:
    """As many as there are answers."""
    try:
        # the CPU's timer first: it is the one that nothing can hold up
        signal.setitimer(signal.ITIMER_PROF, HARD_LIMIT * seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return judged()
        except SystemExit as error:
            return [failed("error", repr(error))] * answers
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        signal.setitimer(signal.ITIMER_PROF, 0)
        of = f" for {answers} answers" if answers > 1 else ""
        return [failed("timeout", f"longer than {seconds:g} s{of}")] * answers


def _raise(*_: Any) -> None:
    raise OutOfTime


def _signal_at_the_end_of(parent: int, number: int) -> None:
    """No thread of Python's could see to it: an import of C code may hold the interpreter for good."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it has ended before the call
        os.kill(os.getpid(), number)


def _end_with(parent: int) -> None:
    """And with this process whatever it starts from here on: another one waits for its end, and ends its group."""
    if sys.platform != "linux":  # a worker between two answers sees the pipe's end
        return
    _signal_at_the_end_of(parent, signal.SIGKILL)
    os.setpgid(0, 0)
    worker, ended = os.getpid(), signal.SIGRTMAX  # which nobody else sends
    signal.pthread_sigmask(signal.SIG_BLOCK, {ended})
    if os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ended})
        return
    os.closerange(0, 1 << 16)  # the pipes' other ends must see the worker's end
    _signal_at_the_end_of(worker, ended)
    signal.sigwait({ended})
    os.killpg(0, signal.SIGKILL)


def main(pipe: Connection) -> None:
    path, timeout, memory_mib = pipe.recv()
    sys.path[:] = path
    pickled = pipe.recv_bytes()
    try:
        reward = pickle.loads(pickled)
    except BaseException as error:
        pipe.send(repr(error))
        return
    signal.signal(signal.SIGALRM, _raise)
    size = Path("/proc/self/statm")  # in pages; where there is none, the imports count
    used = int(size.read_text().split()[0]) * resource.getpagesize() if size.exists() else 0
    limit = used + (memory_mib << 20)  # what the reward's own imports took does not count
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send("")
    together = at_once(reward)
    while True:
        many = pipe.recv()
        for part in [many] if together else [[arguments] for arguments in many]:
            judged = partial(judge_all, reward, part, timeout) if together else partial(_one, reward, part)
            pipe.send(_in_time(judged, len(part), timeout * len(part)))


def _one(reward: Any, part: Sequence[Arguments]) -> list[Judged]:
    return [judge(reward, part[0])]


if __name__ == "__main__":
    # what is sent to the whole job is the training process's to answer; not ignored, which children would inherit
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    os.set_inheritable(int(sys.argv[1]), False)  # what the verifier starts must not hold the pipe
    _end_with(int(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]  # a pipe, too
    with suppress(EOFError, ConnectionError):  # the training process has ended
        main(Connection(int(sys.argv[1])))
