"""
Blobs: immutable bytes under their digest.

Rules that hold here:

1. A name appears under ``blobs/`` only for a file whose every byte was hashed to it, read-only and synced.
2. Whoever hashed a file hands on its device, inode, size and time; they are compared before the rename, so no other file takes its place.
3. A blob that is found to hold other bytes is not trusted any more: it is fetched again and replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core.errors import BlobDamaged, HashMismatch, ReconcileError, StoreError
from reconciler.ports import Fetched
from reconciler.store import atomic
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Verification

#: Returns the digest of the file at a path, with the given algorithm; raises ``OSError`` or ``ReconcileError`` if it cannot be read.
Hash = Callable[[Path, str], str]
#: Errors that concern this process and not the file: no reason to consider the file damaged and fetch it again.
_NOT_ABOUT_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class Blobs:
    """The blobs of one store, for its one writer."""

    def __init__(self, layout: Layout, ledger: Ledger, hash_file: Hash, now: Callable[[], datetime]) -> None:
        self._layout = layout
        self._ledger = ledger
        self._hash = hash_file
        self._now = now

    def adopt(self, fetched: Sequence[Fetched]) -> dict[str, ReconcileError]:
        """
        Rename verified files in staging to their digests; return by digest why one was not.

        ``HashMismatch``: the path leads to another file than the one that was hashed, or it was written to since. ``StoreError``: the disk
        refused. The files are synced one by one, then all are renamed, then each folder is synced once and the ledger has one commit: a
        hundred small files cost little more than one.
        """
        failures: dict[str, ReconcileError] = {}
        for batch in _batches(fetched):
            with contextlib.ExitStack() as opened:
                self._adopt_batch(batch, failures, opened)
        return failures

    def _adopt_batch(self, batch: Sequence[Fetched], failures: dict[str, ReconcileError], opened: contextlib.ExitStack) -> None:
        ready: list[tuple[Fetched, int]] = []
        for one in batch:
            with _failure_of(one, failures):
                fd = _open(one.path)
                opened.callback(os.close, fd)
                _check_hashed(one, fd)
                self._prepare_name(fd, one.digest)
                ready.append((one, fd))
        moved = []
        for one, fd in ready:
            with _failure_of(one, failures), files.translate_errors(f"keep {one.digest}"):
                atomic.move(one.path, self._layout.blob(one.digest))
                moved.append((one, os.fstat(fd)))
        try:
            # A name in staging that comes back is a second name of the blob: the next run deletes it there.
            atomic.sync_folders({self._layout.blob(one.digest).parent for one, _ in moved})
            self._record({one.digest: seen for one, seen in moved})
        except ReconcileError as error:
            failures |= {one.digest: error for one, _ in moved}

    def add_file(self, path: Path) -> tuple[str, int]:
        """Hash the plain file at *path*, rename it to its digest, and return its digest and size; for the members of an archive."""
        name = self._hash_file(path, "sha256")
        fd = _open(path)
        try:
            if self._layout.blob(name).exists() and self.check(name):
                return name, os.fstat(fd).st_size
            self._move_to_digest(fd, path, name)
            return name, os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _move_to_digest(self, fd: int, path: Path, name: str) -> None:
        self._prepare_name(fd, name)
        atomic.rename(path, self._layout.blob(name))
        self._record({name: os.fstat(fd)})

    def _prepare_name(self, fd: int, name: str) -> None:
        """Make the open file durable, and free the place that its name leads to."""
        target = self._layout.blob(name)
        atomic.make_folder(target.parent)
        with files.translate_errors(f"keep {name}"):
            atomic.sync_file(fd, 0o444)
        _delete_folder_at(target)

    def check(self, name: str) -> bool:
        """Hash the blob in full and return whether it is good. A bad one stays until it is replaced, and counts as not verified."""
        path = self._layout.blob(name)
        try:
            before = path.lstat()
            good = stat.S_ISREG(before.st_mode) and self._hash(path, digests.parse(name)[0]) == name
            if good and stat.S_IMODE(before.st_mode) != 0o444:
                path.chmod(0o444)
        except FileNotFoundError:
            good = False
        except OSError as error:
            if error.errno in _NOT_ABOUT_THE_FILE:
                raise StoreError(f"cannot hash {name}: {error.strerror}") from error
            good = False
        except (StoreError, HashMismatch, BlobDamaged):
            good = False
        if good:
            self._record({name: before})
        else:
            self._ledger.forget_blobs([name])
        return good

    def discard(self, name: str) -> None:
        """Delete the blob; a reader that holds it open keeps it."""
        self._ledger.forget_blobs([name])
        atomic.delete(self._layout.blob(name))

    def archive(self, name: str) -> None:
        """
        Copy the blob to cold storage, hash the copy, and only then delete the original.

        Raises:
            BlobDamaged: the copy is not the blob; the original stays.
        """
        cold = self._layout.cold_blob(name)
        atomic.make_folder(cold.parent)
        self._copy_verified(self._layout.blob(name), cold, cold.with_name(f".{cold.name}.tmp"), name)
        self.discard(name)

    def restore(self, name: str) -> None:
        """
        Copy the blob back from cold storage, hash the copy in full, and only then delete the cold one.

        Raises:
            BlobDamaged: the cold copy has other bytes; it is deleted, so that the blob is fetched again.
        """
        cold, target = self._layout.cold_blob(name), self._layout.blob(name)
        atomic.make_folder(target.parent)
        try:
            self._copy_verified(cold, target, self._layout.staging / f"thaw-{target.name}", name)
        except BlobDamaged:
            atomic.delete(cold)
            raise
        self._record({name: target.lstat()})
        atomic.delete(cold)

    def _copy_verified(self, source: Path, target: Path, temporary: Path, name: str) -> None:
        atomic.delete(temporary)
        atomic.copy(source, temporary)
        if self._hash_file(temporary, digests.parse(name)[0]) != name:
            atomic.delete(temporary)
            raise BlobDamaged(f"the copy of {name} has other bytes")
        _delete_folder_at(target)
        atomic.rename(temporary, target)

    def _hash_file(self, path: Path, algorithm: str) -> str:
        with files.translate_errors(f"read {path.name}"):
            return self._hash(path, algorithm)

    def _record(self, seen: Mapping[str, os.stat_result]) -> None:
        if not seen:
            return
        now = self._now()
        self._ledger.record_verified({
            name: Verification(size=one.st_size, inode=one.st_ino, mtime_ns=one.st_mtime_ns, verified_at=now) for name, one in seen.items()
        })  # fmt: skip


#: Files that are adopted together at most: each is held open until all have their names.
_BATCH = 64


def _batches(fetched: Sequence[Fetched]) -> Iterator[Sequence[Fetched]]:
    for start in range(0, len(fetched), _BATCH):
        yield fetched[start : start + _BATCH]


def _check_hashed(fetched: Fetched, fd: int) -> None:
    """Raise ``HashMismatch`` where the open file is not the one that was hashed."""
    seen = os.fstat(fd)
    found = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1 or found != (
        fetched.device, fetched.inode, fetched.size, fetched.mtime_ns
    ):  # fmt: skip
        raise HashMismatch(f"{fetched.path.name} is not the file that was hashed")


@contextlib.contextmanager
def _failure_of(one: Fetched, failures: dict[str, ReconcileError]) -> Iterator[None]:
    """Let an error concern this one file and no other."""
    try:
        yield
    except ReconcileError as error:
        failures[one.digest] = error


def set_aside(layout: Layout, name: str) -> None:
    """
    Rename a damaged copy in cold storage, so that it does not count as the blob; the file stays for a week, for people to examine.

    Raises:
        StoreError: the disk refuses.
    """
    cold = layout.cold_blob(name)
    atomic.rename(cold, cold.with_name(f".{cold.name}.damaged"))


def _delete_folder_at(target: Path) -> None:
    """Delete a folder in the place of a blob: the rename of a file cannot replace it."""
    with files.translate_errors(f"look at {target.name}"):
        folder = target.is_dir() and not target.is_symlink()
    if folder:
        atomic.delete(target)


def _open(path: Path) -> int:
    with files.translate_errors(f"open {path.name}"):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
