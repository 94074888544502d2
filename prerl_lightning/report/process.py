"""Which process writes a run, so that a reader on the same machine sees whether it still lives."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity() -> dict[str, Any] | None:
    """Of this process, for run.json: its number, its start in ticks since the machine's, and, without naming the
    machine, where such numbers hold: this boot and PID namespace. None where /proc does not say."""
    found, where = _started(os.getpid()), _where()
    return {"pid": os.getpid(), "started": found, "where": where} if found and where else None


def lives(process: Any) -> bool | None:
    """Whether the process of an `identity` does; None: it cannot be known from here."""
    pid = process.get("pid") if isinstance(process, Mapping) else None
    if not isinstance(pid, int) or not 0 < pid < 1 << 31 or process.get("where") != (_where() or ""):
        return None
    hidden = False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        hidden = True  # another user's, which /proc may not show
    started = _started(pid)
    return None if hidden and started is None else started == process.get("started")


def _started(pid: int) -> int | None:
    """None: there is none, or it is dead and nobody has asked how it ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def _where() -> str | None:
    try:
        here = f"{BOOT.read_text()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
    return hashlib.sha256(here.encode()).hexdigest()[:16]
