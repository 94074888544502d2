"""`prerl` as a user starts it, in a process of its own."""

import os
import subprocess
import sys
from contextlib import contextmanager


def start(cwd, *args, **kwargs):
    command = [sys.executable, "-m", "prerl_lightning.cli", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def finish(process, seconds=400, code=0):
    """What it wrote; its exit status must be ``code``."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, output
    return output


@contextmanager
def environment_kept():
    """The variables as they were, behind `main` or `prerl.fit` in this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
