"""
The folder of files that are being fetched, and of what earlier runs left of them.

``<staging>/<algorithm>-<hex>/<attempt>/data``: one folder for each blob, in it one for each attempt, with a file of a fixed name.
``<staging>/small-<random>/<algorithm>-<hex>``: one folder for all small blobs of a run. They come in one piece, and nothing of one is ever
continued; two folders for each would cost more than its bytes.

Rules that hold here:

1. Everything is private (0700) and checked before it is used; links, devices, pipes and other users' files are deleted, not followed.
2. What the file system says was written (``SEEK_DATA``) decides what is continued, and aria2's control file is written from that each time
   (``aria2_protocol``). Whether the bytes are right is decided by the digest alone.
3. One process at a time: aria2 inherits the lock, so that one that outlived its parent still holds it.
4. A blob keeps one attempt at most. Its folder gets a new time whenever a run continues it; the store deletes old ones, and the folder of
   small blobs of a run that was killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core.errors import StoreBusy
from reconciler.fetch import aria2_protocol

DATA = "data"
#: How the name of the folder for the small blobs of a run begins; ``store.housekeeping`` knows it.
_SMALL = "small-"
_CONTROL = f"{DATA}.aria2"
_PIECES = "pieces"
_Pieces = list[list[aria2_protocol.Run]]
_LOCK = ".fetch.lock"
_BLOCK = 4096
#: The granularity in which a file system reports holes may not be coarser: tmpfs with huge pages says 2 MiB.
_COARSEST = 64 << 10
_LOCK_SECONDS = 10.0
_PIECE = 1 << 20
_LARGE_PIECE = 8 << 20
_FEW_PIECES = 32
#: With more pieces than this they grow: each is a bit in every status of aria2.
_MOST_PIECES = 2048
_MOST_RECORDED_BYTES = 1 << 20


class Attempt:
    """One attempt's folder, with the file *name* for its bytes; *resumed* of them are from an earlier transfer."""

    def __init__(self, folder: Path, resumed: int = 0, name: str = DATA) -> None:
        self.folder = folder
        self.data = folder / name
        self.resumed = resumed
        self.recorded = ""


class Staging:
    """The folder *root*, which must be on the store's file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = -1
        self._holes: int | None = None
        self._small: Path | None = None
        #: Entries that may be there: what earlier runs left, and small blobs that this one began.
        self._entries_seen: set[str] = set()

    def open(self) -> None:
        """
        Make the folder and take its lock.

        Raises:
            StoreBusy: a downloader of another run still writes here.
            StoreError: the folder cannot be made, or is not this user's.
        """
        if self._lock >= 0:
            return
        with files.translate_errors(f"use {self.root} for downloads"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own_folder(self.root)
            fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if not files.lock(fd, _LOCK_SECONDS):
            os.close(fd)
            raise StoreBusy(f"another downloader still writes to {self.root}")
        self._lock = fd
        with files.translate_errors(f"read {self.root}"):
            self._entries_seen = {path.name for path in self.root.iterdir()}

    @property
    def lock(self) -> int:
        """The lock's file descriptor, for aria2 to inherit."""
        return self._lock

    def close(self) -> None:
        """Release the lock."""
        if self._small:
            with contextlib.suppress(OSError):
                self._small.rmdir()  # what is still in it, the next run deletes
            self._small = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def resume(self, name: str, size: int) -> Attempt | None:
        """Return the attempt that an earlier transfer left, ready to be continued; delete everything else of this blob."""
        with files.translate_errors(f"look at what is left of {name}"):
            best: Attempt | None = None
            pieces: _Pieces = []
            for path in self._entries(name):
                left = self._pieces_of(path, size)
                if aria2_protocol.total_bytes(left) > (best.resumed if best else 0):
                    if best:
                        files.delete(best.folder)
                    best, pieces = Attempt(path, aria2_protocol.total_bytes(left)), left
                else:
                    files.delete(path)
            if best:
                _write(best.folder / _CONTROL, aria2_protocol.control_file(pieces, piece_length(size), size))
                os.utime(best.folder.parent)
            return best

    @staticmethod
    def record_pieces(attempt: Attempt, bitfield: str) -> None:
        """Record which pieces aria2 reports as complete. Not synced: after a power cut it may list too many, and the digest decides."""
        if bitfield and bitfield != attempt.recorded:
            attempt.recorded = bitfield
            with contextlib.suppress(OSError):
                _write(attempt.folder / _PIECES, bitfield.encode())

    def start_attempt(self, name: str, *, small: bool = False) -> Attempt:
        """Return a new attempt, for a blob that comes in one piece if *small*; what earlier ones left is deleted."""
        with files.translate_errors(f"make a folder for {name}"):
            return self._start_small(name) if small else self._start_large(name)

    def _start_small(self, name: str) -> Attempt:
        entry = _entry(name)
        if entry in self._entries_seen:
            self.discard(name)
        self._entries_seen.add(entry)
        if not self._small:
            made = self.root / f"{_SMALL}{secrets.token_hex(4)}"
            made.mkdir(mode=0o700)
            self._small = made
        return Attempt(self._small, name=entry)

    def _start_large(self, name: str) -> Attempt:
        folder = self._folder(name)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            self.discard(name)
            folder.mkdir(mode=0o700)
        path = folder / secrets.token_hex(4)
        path.mkdir(mode=0o700)
        return Attempt(path)

    def discard(self, name: str) -> None:
        """Delete all that there is of *name*."""
        with files.translate_errors(f"delete what is left of {name}"):
            files.delete(self._folder(name))
            if self._small:
                files.delete(self._small / _entry(name))

    def remove_if_empty(self, name: str) -> None:
        """Delete the blob's folder, if its file is no longer in it."""
        with contextlib.suppress(OSError):
            for path in _listed(self._folder(name)):
                try:
                    path.rmdir()  # a file that was small and is in the store now left an empty folder
                except OSError:
                    if length(path / DATA) < 0:
                        files.delete(path)
            self._folder(name).rmdir()

    def _folder(self, name: str) -> Path:
        return self.root / _entry(name)

    def _entries(self, name: str) -> Iterator[Path]:
        folder = self._folder(name)
        with contextlib.suppress(FileNotFoundError):
            try:
                _check_own_folder(folder)
            except NotADirectoryError:
                files.delete(folder)
                return
            yield from _listed(folder)

    def _pieces_of(self, path: Path, size: int) -> _Pieces:
        """Return the ranges that are there of the attempt at *path*, for each piece."""
        try:
            _check_own_folder(path)
            known = _read_recorded(path / _PIECES)
            for other in _listed(path):
                if other.name not in {DATA, _PIECES}:
                    files.delete(other)
            seen = (path / DATA).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1 or seen.st_uid != os.geteuid() or seen.st_size > size:
            return []
        coarse = self._granularity()
        if not coarse:
            return []
        return aria2_protocol.kept_ranges(_written_ranges(path / DATA), known, piece_length(size), size, coarse)

    def _granularity(self) -> int:
        """Return how exactly the file system reports holes, in bytes; 0: too coarsely, or not at all."""
        if self._holes is None:
            probe = self.root / f".probe.{secrets.token_hex(4)}"
            fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            probe.unlink()
            try:
                os.pwrite(fd, b"\1", 0)
                os.pwrite(fd, b"\1", 4 * _COARSEST)
                found = os.lseek(fd, 0, os.SEEK_HOLE)
            except OSError:
                found = 0
            finally:
                os.close(fd)
            self._holes = max(found, _BLOCK) if 0 < found <= _COARSEST else 0
        return self._holes


def _entry(name: str) -> str:
    algorithm, digits = digests.parse(name)
    return f"{algorithm}-{digits}"


def piece_length(size: int) -> int:
    """
    Return the length of a piece for a file of *size* bytes: a power of two MiB.

    Each piece is a request, with a pause as long as the way there and back: over 40 ms at 1 Gbit/s, pieces of 8 MiB bring a file in two
    thirds of the time that pieces of 1 MiB take. Larger ones leave too few for all connections at the end, and hashing further behind.
    """
    piece = _PIECE
    while piece < _LARGE_PIECE and size >= piece * 2 * _FEW_PIECES:
        piece *= 2
    while size > piece * _MOST_PIECES and piece < 64 * _PIECE:
        piece *= 2
    return piece


def length(path: Path) -> int:
    """Return the size of the plain file at *path* in bytes, -1 where there is none."""
    try:
        seen = path.lstat()
    except OSError:
        return -1
    return seen.st_size if stat.S_ISREG(seen.st_mode) else -1


def _check_own_folder(path: Path) -> None:
    """Make *path* private; raise ``NotADirectoryError`` where it is no folder of this user."""
    seen = path.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder of this user")
    if seen.st_mode & 0o077:
        path.chmod(0o700)


def _written_ranges(path: Path) -> list[aria2_protocol.Run]:
    """Return the ranges of the file at *path* that were written to."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        runs: list[aria2_protocol.Run] = []
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # none behind this
                    return runs
                raise
            end = os.lseek(fd, start, os.SEEK_HOLE)
            runs.append((start, end))
    finally:
        os.close(fd)


def _read_recorded(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        text = file.read(_MOST_RECORDED_BYTES).decode("ascii", "replace") if stat.S_ISREG(os.fstat(fd).st_mode) else ""
    return text if set(text) <= set("0123456789abcdef") else ""


def _write(path: Path, data: bytes) -> None:
    """Write *data* to the file *path*, in place: the two files that are written so only list fewer bytes when they are torn."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _listed(path: Path) -> list[Path]:
    return sorted(path.iterdir())
