"""Signals that end a run. Before training one ends the process where it is; from then on a handler only notes it, the
ranks agree on it where they meet anyway (`objectives.interruptions`), and the run ends there, with a checkpoint."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Interrupted(SystemExit):
    """All ranks have agreed to end the run for a signal, behind a step or within a validation: the exit status is 128
    and its ``number``, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class Signals:
    """Of this process.

    Attributes:
        received: the number of the first one; 0: none was.
        at_once: what is done where one ends the run there and then.
        owns_process: the `prerl` command's, which then ends; a notebook's or a script's gets an exception.
    """

    def __init__(self) -> None:
        self.received = 0
        self.at_once: list[Callable[[], None]] = []
        self.owns_process = False
        self._noted_only = False
        self._before: dict[int, Any] = {}

    def listen(self, numbers: Iterable[int] = ENDING) -> None:
        """Take them over, but for those that are ignored: ``nohup`` and a shell's ``&`` mean it so."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            return
        for number in numbers:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, self._handle):
                self._before.setdefault(number, before)
                signal.signal(number, self._handle)

    def note_only(self) -> None:
        """From now on they wait for somebody to look at ``received``."""
        self.received, self._noted_only = 0, True

    def restore(self) -> None:
        """The handlers that were there before `listen`; what was to be done ``at_once`` is forgotten."""
        before, self._before, self._noted_only = self._before, {}, False
        self.at_once.clear()
        for number, handler in before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = bool(self.received), self.received or number
        name = signal.Signals(number).name
        if not self._noted_only:
            # no exception of the command's: what it is raised in the midst of, such as an import, may swallow it
            self._end(number, f"ended by {name}.")
        elif again and number == signal.SIGINT:
            self._end(number, "stopped at once; what was done since the last checkpoint is lost.")
        elif not again:
            _say(f"{name}: the run ends behind the present step, with a checkpoint. A second Ctrl-C ends it at once.")

    def _end(self, number: int, why: str) -> None:
        for act in self.at_once:
            act()
        _say(why)
        if self.owns_process:
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def first_rank() -> bool:
    """Of several processes that are sent the same, the one to say so."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))


def _say(text: str) -> None:
    """Not by print, in the midst of which the signal may have come."""
    if first_rank():
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nprerl: {text}\n".encode())


signals = Signals()
