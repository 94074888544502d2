"""Locks of files, which a process holds as long as it lives."""

import errno
import fcntl
from typing import IO, Any


def lock(file: IO[Any], how: int = fcntl.LOCK_EX) -> None:
    """Where the file system knows locks: on one that does not, whoever asks is alone for all that is known.

    Raises:
        BlockingIOError: another process holds it, and ``how`` has LOCK_NB.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
