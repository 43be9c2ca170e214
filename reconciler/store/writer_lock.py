"""
One writer at a time.

``flock`` on one file, held for the whole run: the kernel lets go of it when the process dies, however it dies, so there is no stale
lock to break. The file is never deleted: a second opener of a deleted one would hold another lock (OSTree had that bug).
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
    Hold the store whose lock file is *path*, waiting for it at most *timeout_seconds*.

    Raises:
        StoreBusy: another run holds it; the message says which.
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
        with contextlib.suppress(OSError):  # Linux lets go of the descriptor, and so of the lock, whatever close says
            os.close(fd)


def _holder(fd: int) -> str:
    """Return who holds the lock, for people: asked of the kernel, so that the file need not be written and cannot lie."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
                return f"process {int(fields[4])}"
    return "its process is not visible from here"
