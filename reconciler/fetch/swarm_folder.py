"""
The folder in which bytes from peers arrive: ``incoming/<hex>/<hex>``, written by another user.

Rules that hold here:

1. No link is followed, neither for a folder nor for a file: each step is taken from the open folder above it. Else whoever took the swarm's
   process over could have this one read or delete the file of a like name in the store.
2. Nothing but a file that is named as its folder, its control file and that folder is deleted.
3. Bytes are copied out first and hashed on the way; what is handed on is the copy, which the other user cannot reach.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from reconciler import files
from reconciler.core import digest as digests
from reconciler.ports import Fetched, Want

#: What the source of a blob is called that peers gave, in events and incidents.
PEERS = "peers"
_CHUNK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = re.compile(r"[0-9a-f]{64,128}")


class Arrivals:
    """What is in the folder *root*."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Return the hex digits of every blob of which anything arrived; raises OSError."""
        return sorted(name for name in os.listdir(self._root) if _NAME.fullmatch(name))  # noqa: PTH208  names alone

    @contextlib.contextmanager
    def open(self, digits: str) -> Iterator[BinaryIO]:
        """Give the file of the blob with the hex *digits*, open for reading; raises OSError where there is no plain file."""
        with self._folder(digits) as folder:
            fd = os.open(digits, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no plain file")
            yield file

    def delete(self, digits: str) -> None:
        """Delete what arrived of a blob, as far as that can be done."""
        with contextlib.suppress(OSError), self._above() as above:
            with self._folder(digits) as folder:
                for name in (digits, f"{digits}.aria2"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
            os.rmdir(digits, dir_fd=above)

    @contextlib.contextmanager
    def _above(self) -> Iterator[int]:
        fd = os.open(self._root, _FOLDER)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _folder(self, digits: str) -> Iterator[int]:
        with self._above() as above:
            fd = os.open(digits, _FOLDER, dir_fd=above)
        try:
            yield fd
        finally:
            os.close(fd)


def verified_copy(want: Want, source: BinaryIO, path: Path) -> Fetched | None:
    """
    Copy *source* to a new file at *path*, and return it if it is the blob that is wanted.

    Raises:
        StoreError: it cannot be written. OSError: *source* cannot be read.
    """
    algorithm = digests.parse(want.digest)[0]
    hasher, left = digests.hasher(algorithm), want.size
    with files.translate_errors(f"copy {want.digest}"), _new(path) as target:
        while left and (data := source.read(min(_CHUNK, left))):
            hasher.update(data)
            target.write(data)
            left -= len(data)
        target.flush()
        seen = os.fstat(target.fileno())
    if left or f"{algorithm}:{hasher.hexdigest()}" != want.digest:
        return None
    return Fetched(
        digest=want.digest, size=want.size, path=path, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns, sources=(PEERS,)
    )


def copy_ranges(source: BinaryIO, path: Path, ranges: Sequence[tuple[int, int]]) -> None:
    """Copy *ranges* of *source* to the same places of a new file at *path*, with holes between them; raises OSError."""
    with _new(path) as target:
        for first, last in ranges:
            source.seek(first)
            target.seek(first)
            left = last - first
            while left and (data := source.read(min(_CHUNK, left))):
                target.write(data)
                left -= len(data)


def _new(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
