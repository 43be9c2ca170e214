"""What every package needs of the file system: one translation of its errors, a lock with a deadline, and deleting untrusted folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from reconciler.core.errors import DiskFull, StoreError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_RETRY_SECONDS = 0.05
_FULL = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = "something else lies in its place: move it away, and run again"
_NOT_YOURS = "run as the user whom the store belongs to (`ls -l`)"
#: What to do about what the system says.
_HINTS = {
    errno.EISDIR: _IN_THE_WAY, errno.ENOTDIR: _IN_THE_WAY, errno.EEXIST: _IN_THE_WAY, errno.ELOOP: _IN_THE_WAY,
    errno.EACCES: _NOT_YOURS, errno.EPERM: _NOT_YOURS,
    errno.EROFS: "the file system is mounted read-only: look at `mount` and `dmesg`",
    errno.EIO: "the disk may be failing: look at `dmesg` and `smartctl`",
}  # fmt: skip


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Turn what the system refuses into a ``StoreError`` that says *what* was tried."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in _FULL else StoreError
        raise kind(f"cannot {what}: {error.strerror or error}", hint=_HINTS.get(error.errno or 0, "")) from error


def lock(fd: int, timeout_seconds: float = 0.0) -> bool:
    """
    Take an exclusive lock on the open file *fd* (``flock(2)``), waiting for it at most *timeout_seconds*; return whether it was taken.

    The system waits without end or not at all, and an alarm to cut it short is for the main thread alone; hence the repeated tries.

    Raises:
        OSError: the file system has no locks, or none left.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOCK_RETRY_SECONDS)


def delete(path: Path) -> bool:
    """
    Delete what is at *path*, a folder with all that is in it; links are deleted and never followed. Return whether there was anything.

    Raises:
        OSError: something in it cannot be deleted.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        _delete_folder(path)
    else:
        path.unlink(missing_ok=True)
    return True


def _delete_folder(path: Path) -> None:
    """
    Delete the folder *path* with all that is in it, however deep.

    Not ``shutil.rmtree``: it recurses and holds a descriptor a level, so a thousand folders in one another, which cost whoever unpacks a
    stranger's archive nothing, would stop every later run. Here a folder's folders are first moved up beside it.
    """
    _admit(path, None)
    top = os.open(path, _FOLDER)
    try:
        while names := _emptied(top, top):
            for name in names:
                below = os.open(name, _FOLDER, dir_fd=top)
                try:
                    _emptied(below, top)
                finally:
                    os.close(below)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def _emptied(fd: int, top: int) -> list[str]:
    """Delete what is in the folder *fd* and move its folders to *top*; return the names of those that are there already."""
    with os.scandir(fd) as found:
        entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    names = []
    for name, is_folder in entries:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
            continue
        _admit(name, fd)
        if fd == top:
            names.append(name)
        else:
            os.rename(name, os.urandom(16).hex(), src_dir_fd=fd, dst_dir_fd=top)
    return names


def _admit(name: str | Path, folder: int | None) -> None:
    """Open a folder to its owner where whoever made it did not; not by its name, which may be a link by now."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if os.fstat(handle).st_mode & 0o700 != 0o700:
            Path(f"/proc/self/fd/{handle}").chmod(0o700)
    finally:
        os.close(handle)
