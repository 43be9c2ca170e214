"""
The lock that keeps a store to one writer at a time.

It is ``flock`` on one file, held for the whole run. The kernel releases it when the process dies, however it dies, so a stale lock cannot
exist. The file is never deleted: whoever opens a new one in its place would hold another lock (OSTree had that bug).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from reconciler import files
from reconciler.core.errors import StoreBusy


@contextlib.contextmanager
def hold(path: Path, *, timeout_seconds: float = 0.0) -> Iterator[None]:
    """
    Hold the lock of the store whose lock file is *path*; wait for it at most *timeout_seconds*.

    Raises:
        StoreBusy: another run holds it; the message names its process.
    """
    with files.translate_errors(f"open {path}"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        with files.translate_errors(f"lock {path}"):
            taken = files.lock(fd, timeout_seconds)
        if not taken:
            raise StoreBusy(f"another run holds the store: {_holder(fd)}")
        yield
    finally:
        with contextlib.suppress(OSError):  # Linux closes the descriptor, and so releases the lock, whatever close(2) returns
            os.close(fd)


def holder(path: Path) -> str:
    """Return which process holds the lock whose file is *path*, for people; empty where none does, or it is not visible from here."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        found = _holder(fd)
    finally:
        os.close(fd)
    return found if found.startswith("process") else ""


def _holder(fd: int) -> str:
    """Return who holds the lock, for people. The kernel tells it, so the file need not be written and cannot be wrong."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                return f"process {int(fields[4])}"
    return "its process is not visible from here"
