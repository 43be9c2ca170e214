"""
Extracts an untrusted archive to plain files, or fails without leaving any that are used.

It runs in a process of its own, which can read one archive and write one folder: a job comes as JSON on standard input, one JSON
document is the answer, and the exit code has no meaning. Why ``tarfile`` and ``zipfile`` are not used stands in ``tar_reader`` and
``zip_reader``.

Rules that hold here:

1. The readers (``tar_reader``, ``zip_reader``) list members, ``core.archive_rules`` checks them, and only this module writes.
2. Every file is created exclusively, relative to descriptors of folders that were made here; no link is ever followed or made. What an
   archive has as a link is a copy.
3. Modes are fixed: 0444 for files and 0755 for folders. Owners, times and attributes in an archive are ignored.
4. Nothing is synced here: extracted files are unfinished work until they are hashed and become blobs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

from msgspec import Meta, Struct, json

from reconciler import files
from reconciler.core import archive_rules as rules
from reconciler.core import strict_json
from reconciler.core.errors import ReconcileError, StoreError, UnpackRefused, UsageError
from reconciler.core.node import Limits
from reconciler.core.vocabulary import KnownUnpack
from reconciler.unpack import decompress, tar_reader, zip_reader

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_JOB_BYTES = 64 << 10
_COPY_BYTES = 1 << 20
_DEEPEST = 64  # more than any settings allow; every level holds a descriptor


class PlainUnpacker:
    """The ``Unpacker`` port in the calling process, within *limits*."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        """
        Unpack *archive* into the empty folder *into* and return the paths of its files, sorted.

        Raises:
            UnpackRefused: it breaks a rule; what was written so far is the caller's to delete.
            StoreError: the disk refused, *archive* is no plain file or *into* is no empty folder.
        """
        with files.translate_errors(f"unpack {archive}", on=into), _open_plain(archive) as file, _open_empty(into) as folder:
            length = os.fstat(file.fileno()).st_size
            members = rules.Members(self._limits, length)
            try:
                for path, body in _entries(file, kind, length, members):
                    if body is not None:
                        folder.write(path, body)
                    elif path:
                        folder.make(path)
                for link in rules.links(members):
                    folder.copy(link.target, link.path)
            except MemoryError:
                raise StoreError(f"not enough memory to unpack {archive}") from None
            return tuple(sorted(members.files))


def list_files(archive: Path, kind: str) -> tuple[str, ...]:
    """
    Return the paths of the files that ``unpack`` would make of *archive*, sorted: every byte is read, and none is written.

    Raises:
        UnpackRefused: every node would refuse it.
        StoreError: it cannot be read.
    """
    with files.translate_errors(f"read {archive}"), _open_plain(archive) as file:
        length = os.fstat(file.fileno()).st_size
        members = rules.Members(Limits(), length)
        for _, body in _entries(file, kind, length, members):
            for _ in body or ():
                pass
        for _ in rules.links(members):
            pass
        return tuple(sorted(members.files))


def _entries(file: BinaryIO, kind: str, length: int, members: rules.Members) -> Iterator[tuple[str, Iterator[bytes] | None]]:
    if kind != "zip":
        return tar_reader.entries(decompress.chunks(file, kind), members)
    return zip_reader.entries(file, length, members)


@contextlib.contextmanager
def _open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open the plain file at *path*; without O_NONBLOCK, opening a FIFO would wait without end."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StoreError(f"{path} is not a plain file")
        yield file


@contextlib.contextmanager
def _open_empty(path: Path) -> Iterator[_Folder]:
    fd = os.open(path, _FOLDER)
    try:
        with os.scandir(fd) as found:
            is_empty = next(found, None) is None
        if not is_empty:
            raise StoreError(f"the folder {path} is not empty")
        yield _Folder(fd)
    finally:
        os.close(fd)


class _Folder:
    """The folder that is extracted into, and the folders that were made below it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._made: set[str] = set()

    def make(self, path: str) -> None:
        """Make the folder *path* and those above it, unless they were made here before."""
        with self._open_folder(path):
            pass

    def write(self, path: str, body: Iterator[bytes]) -> None:
        """Make the file *path* of the bytes of *body*, and the folders above it."""
        above, _, name = path.rpartition("/")
        with self._open_folder(above) as folder, _refuse_existing(path):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            for piece in body:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o444)
        finally:
            os.close(fd)

    def copy(self, source: str, path: str) -> None:
        """Make the file *path* with the bytes of *source*, a file that was written here."""
        above, _, name = source.rpartition("/")
        with self._open_folder(above) as folder:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnpackRefused(f"{rules.shown(source)} is no plain file any more")
            self.write(path, iter(lambda: file.read(_COPY_BYTES), b""))

    @contextlib.contextmanager
    def _open_folder(self, path: str) -> Iterator[int]:
        """Open the folder *path* one component at a time, because the system follows links in the middle of a path."""
        here = os.dup(self._fd)
        try:
            for end in _component_ends(path):
                name = path[:end].rpartition("/")[2]
                if path[:end] not in self._made:
                    with _refuse_existing(path[:end]):
                        os.mkdir(name, 0o700, dir_fd=here)
                below = os.open(name, _FOLDER, dir_fd=here)
                os.close(here)
                here = below
                if path[:end] not in self._made:
                    os.fchmod(here, 0o755)
                    self._made.add(path[:end])
            yield here
        finally:
            os.close(here)


def check_extracted(into: Path, members: tuple[str, ...]) -> None:
    """
    Check that *into* holds the plain files *members*, each with one name, in plain folders, and nothing else.

    The extractor's own answer is not trusted, because an untrusted archive may have taken it over: one link among the folders would make
    the caller read files from anywhere.

    Raises:
        UnpackRefused: it does not.
        StoreError: the disk refused.
    """
    with files.translate_errors(f"look through {into}"):
        fd = os.open(into, _FOLDER)
        try:
            found = sorted(_plain_files(fd, ""))
        finally:
            os.close(fd)
    if found != sorted(members):
        raise UnpackRefused("the folder holds other files than the extractor says")


def _plain_files(fd: int, above: str) -> Iterator[str]:
    if above.count("/") > _DEEPEST:
        raise UnpackRefused("the extractor left folders deeper than any archive may have")
    with os.scandir(fd) as found:
        for entry in found:
            path = f"{above}{entry.name}"
            seen = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(seen.st_mode):
                below = os.open(entry.name, _FOLDER, dir_fd=fd)
                try:
                    yield from _plain_files(below, f"{path}/")
                finally:
                    os.close(below)
            elif stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1:
                yield path
            else:
                raise UnpackRefused(f"the extractor left {rules.shown(path)}, which is no plain file or has another name elsewhere")


def _component_ends(path: str) -> list[int]:
    """Return where each component of *path* ends."""
    return [at for at, character in enumerate(f"{path}/") if character == "/"] if path else []


@contextlib.contextmanager
def _refuse_existing(path: str) -> Iterator[None]:
    """Refuse a name that exists already: the file system takes two different spellings for one."""
    try:
        yield
    except FileExistsError:
        raise UnpackRefused(f"this disk takes {rules.shown(path)} and an earlier member's name for one") from None


# -- the process of its own ------------------------------------------------------------------------


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the process shall do; its answer repeats the *nonce*, so that no other output passes for it."""

    nonce: Annotated[str, Meta(max_length=256)]
    archive: str
    kind: KnownUnpack
    into: str
    limits: Limits = Limits()


class Failure(Struct, frozen=True, kw_only=True):
    """The name and the message of the error that ended a job."""

    name: str
    message: str
    hint: str = ""


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a job ended: the paths of the files, sorted, or an error."""

    nonce: str
    members: tuple[str, ...] | None = None
    error: Failure | None = None


def answer(data: bytes) -> Answer:
    """Do the job that *data* describes and return how it ended."""
    nonce = ""
    try:
        job = _job(data)
        nonce = job.nonce
        return Answer(nonce=nonce, members=PlainUnpacker(job.limits).unpack(Path(job.archive), job.kind, Path(job.into)))
    except ReconcileError as error:
        return Answer(nonce=nonce, error=Failure(name=error.name, message=error.message, hint=error.hint))


def _job(data: bytes) -> Job:
    try:
        job = strict_json.decode(data, Job)
    except strict_json.NotStrict as error:
        raise UsageError(f"not a job for unpacking: {error}") from None
    if "\0" in job.archive + job.into:
        raise UsageError("not a job for unpacking: a path with a NUL in it")
    return job


def main() -> None:
    """Read one job on standard input and print one answer."""
    sys.stdout.buffer.write(json.encode(answer(sys.stdin.buffer.read(_JOB_BYTES))) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
