"""Processes that run as `python -m` or a script does, but forked from one that has imported what most of them need,
which takes 15 to 25 s of CPU. What an import may change, such as a signal in its midst, needs a start of its own."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

from commands import environment_kept, finish


def context():
    """Of multiprocessing, for a function."""
    made = multiprocessing.get_context("forkserver")
    with environment_kept():
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        made.set_forkserver_preload(["imported"])
        forkserver.ensure_running()
    return made


class Forked:
    """What tests use of a Popen.

    Args:
        arguments: of `python`: a script, -m and a module, or -c and code; and theirs.
        cwd: where it runs.
        env: its variables; this process's by default.
        output: a file for what it writes; by default one without a name.
        start_new_session: of its own.
    """

    def __init__(self, arguments, cwd=".", env=None, output=None, start_new_session=False) -> None:
        self._output = open(output, "w+b") if output else tempfile.TemporaryFile()  # noqa: SIM115
        file = f"/proc/{os.getpid()}/fd/{self._output.fileno()}"
        given = (list(map(str, arguments)), str(cwd), dict(os.environ if env is None else env), file)
        self._process = context().Process(target=_run, args=(*given, start_new_session))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=None) -> tuple[str, None]:
        self.wait(timeout)
        return self.said(), None

    def send_signal(self, number) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")


def finish_together(processes, seconds=400) -> None:
    """Of ranks, the first that fails has the reason, and the others would wait for it."""
    end = time.monotonic() + seconds
    while None in (codes := [p.poll() for p in processes]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        for process in sorted(processes, key=lambda p: not p.returncode):
            finish(process, 10)
    finally:
        for process in processes:
            process.kill()


def prerl(cwd, *args, **kwargs) -> Forked:
    """The command, as `commands.start` has it."""
    return Forked(["-m", "prerl_lightning.cli", *args], cwd, **kwargs)


def _run(arguments, cwd, env, output, start_new_session) -> None:
    if start_new_session:
        os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # that of TMPDIR
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    # as the interpreter does
    way = arguments.pop(0) if arguments[0] in ("-m", "-c") else ""
    sys.argv = arguments
    first = cwd if way else os.path.dirname(arguments[0])
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if way == "-m":
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif way == "-c":
            exec(arguments[0], {"__name__": "__main__"})
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
