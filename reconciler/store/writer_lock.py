"""
One writer at a time.

``flock`` on one file, held for the whole run: the kernel lets go of it when the process dies, however it dies, so there is no stale
lock to break. The file is never deleted: a second opener of a deleted one would hold another lock (OSTree had that bug).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from reconciler import files
from reconciler.core.errors import StoreBusy

_RETRY_SECONDS = 0.1


@contextlib.contextmanager
def hold(path: Path, *, timeout_seconds: float = 0.0) -> Iterator[None]:
    """
    Hold the store whose lock file is *path*, waiting for it at most *timeout_seconds*.

    Raises:
        StoreBusy: another run holds it; the message says which.
    """
    with files.translate_errors(f"open {path}"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with files.translate_errors(f"lock {path}"):
            _take(fd, timeout_seconds)
        yield
    finally:
        with contextlib.suppress(OSError):  # Linux lets go of the descriptor, and so of the lock, whatever close says
            os.close(fd)


def _take(fd: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StoreBusy(f"another run holds the store: {_holder(fd)}") from None
            time.sleep(_RETRY_SECONDS)  # flock has no timeout of its own, and an alarm would be everybody's
        else:
            return


def _holder(fd: int) -> str:
    """Return who holds the lock, for people: asked of the kernel, so that the file need not be written and cannot lie."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                return f"process {int(fields[4])}"
    return "its process is not visible from here"
