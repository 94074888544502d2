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
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

HARD_LIMIT = 1.5  # times the timeout
# of a reward's size: sums of squares over a batch stay finite in fp32, in which metrics are logged and advantages used
LARGEST = 1e9
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class OutOfTime(BaseException):
    pass


Failure = Literal["timeout", "error"]
Judged = tuple[float, str | None, Failure | None, str]  # the fields of pool.Verdict


def judge(reward: Any, arguments: tuple[str, str, str, Mapping[str, Any]]) -> Judged:
    """Score, answer, failure, message."""
    try:
        value = reward(*arguments)
        score = float(value)
    except OutOfTime:
        raise
    except Exception as error:
        return 0.0, None, "error", repr(error)[:500]
    if not abs(score) <= LARGEST:  # so is nan
        return 0.0, None, "error", f"the reward is {score}; it must lie between {-LARGEST:g} and {LARGEST:g}"
    answer = getattr(value, "answer", None)
    return score, None if answer is None else str(answer)[:1000], None, ""


def _judge_in_time(reward: Any, arguments: Any, timeout: float) -> Judged:
    try:
        # the CPU's timer first: it is the one that nothing can hold up
        signal.setitimer(signal.ITIMER_PROF, HARD_LIMIT * timeout)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            return judge(reward, arguments)
        except SystemExit as error:
            return 0.0, None, "error", repr(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return 0.0, None, "timeout", f"longer than {timeout:g} s"


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
    while True:
        for arguments in pipe.recv():
            pipe.send(_judge_in_time(reward, arguments, timeout))


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
