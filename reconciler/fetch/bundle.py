"""
Bundles as a source of blobs: a folder or a tar file, from a disk that anybody may have written to.

Rules that hold here:

1. Each byte is hashed while it is copied, and counts only when the digest agrees; what a bundle says of itself decides nothing.
2. The bundle is only read: it may lie on a read-only disk. An interrupted copy goes on where it ended, and is hashed from its start.
3. A tar is read by its headers alone; names that an OCI image layout does not have are passed over, and nothing is unpacked.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from reconciler import files
from reconciler.core import bundle, digest
from reconciler.core.bundle import Contents
from reconciler.core.errors import BadBundle, FetchError, HashMismatch, ReconcileError, SizeMismatch
from reconciler.core.events import FetchProgress, Incident
from reconciler.ports import Fetched, FetchFailed, Reporter, Want

_CHUNK = 1 << 20
_BLOCK = 512
#: More members than any list of models has files.
_MOST_MEMBERS = 1 << 20
_REPORT_SECONDS = 0.2
_NAMES = re.compile(r"(?:\./)?(index\.json|oci-layout|blobs/[a-z0-9]+/[0-9a-f]+)")


class Bundle:
    """An open bundle. Close it."""

    def __init__(self, path: Path) -> None:
        """
        Open the bundle at *path*, a folder or a tar file.

        Raises:
            BadBundle: it is none, or cannot be read.
        """
        self.path = path
        self._file: BinaryIO | None = None
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with self._errors():
                if not path.is_dir():
                    self._file = path.open("rb")
                    self._members = _members(self._file)
            self.contents: Contents = self._contents()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close its file; idempotent."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, most: int) -> bytes:
        """
        Return the bytes of the document *name*, a digest or a path in the layout, of at most *most* bytes.

        Raises:
            BadBundle: it is not there, is larger, or has other bytes than its digest says.
        """
        path = bundle.blob_path(name) if digest.is_digest(name) else name
        with self._errors(), self._open(path) as (source, size):
            data = source.read(min(size, most + 1))
        if len(data) > most:
            raise BadBundle(f"{self.path}: {path} has more than {most:,} bytes")
        if digest.is_digest(name) and digest.of(data, digest.parse(name)[0]) != name:
            raise BadBundle(f"{self.path}: {path} has other bytes than its name says")
        return data

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """Give the blob *name* as an open file that stands at its first byte, with its size in bytes; raises FileNotFoundError."""
        with self._open(bundle.blob_path(name)) as found:
            yield found

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[tuple[BinaryIO, int]]:
        if self._file is None:
            fd = os.open(self.path / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                seen = os.fstat(fd)
                if not stat.S_ISREG(seen.st_mode):
                    raise FileNotFoundError(f"{path} is no plain file")
                yield file, seen.st_size
            return
        if path not in self._members:
            raise FileNotFoundError(path)
        offset, size = self._members[path]
        with self.path.open("rb") as file:  # a file of its own: several are read side by side
            file.seek(offset)
            yield file, size

    def _contents(self) -> Contents:
        manifest = bundle.manifest_of(self.read(bundle.INDEX_FILE, bundle.DOCUMENT_BYTES))
        config = bundle.config_of(self.read(manifest, bundle.DOCUMENT_BYTES))
        return bundle.contents_of(self.read(config, bundle.DOCUMENT_BYTES))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise BadBundle(f"{self.path} is no bundle: {error.filename or error} is missing") from None
        except OSError as error:
            raise BadBundle(f"{self.path} cannot be read: {error.strerror or error}") from None


def _members(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Return offset and size of each file of an OCI image layout in a tar (POSIX.1-2017, pax, ustar and extended headers)."""
    end = file.seek(0, os.SEEK_END)
    found: dict[str, tuple[int, int]] = {}
    at, extended = 0, dict[str, str]()
    for _ in range(_MOST_MEMBERS):
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK or not header.strip(b"\0"):
            return found
        name, size, kind = _parse(header)
        if kind == b"x":
            extended = _extended(file.read(min(size, 1 << 16)))
        elif kind in {b"0", b"\0"}:
            size = int(extended.get("size", size))
            if match := _NAMES.fullmatch(extended.get("path", name)):
                found[match[1]] = (at + _BLOCK, size)
            extended = {}
        at += _BLOCK + size + -size % _BLOCK
        if size < 0 or at > end + _BLOCK:
            raise BadBundle("the tar is cut short")
    raise BadBundle("the tar has more members than a bundle may have")


def _parse(header: bytes) -> tuple[str, int, bytes]:
    """Return the name, the size in bytes and the type of the member that a tar header describes."""
    digits = header[124:136].strip(b" \0")
    if header[257:262] != b"ustar" or not re.fullmatch(rb"[0-7]{1,11}", digits):
        raise BadBundle("it is no folder, and no tar with headers of the ustar form")
    name, prefix = (part.partition(b"\0")[0].decode("ascii", "replace") for part in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix else name, int(digits, 8), header[156:157]


def _extended(data: bytes) -> dict[str, str]:
    found = re.findall(rb"\d{1,5} (path|size)=([^\n]{1,1024})\n", data)
    records = {key.decode(): value.decode("ascii", "replace") for key, value in found}
    if not records.get("size", "0").isdecimal():
        raise BadBundle("a size in the tar is no number")
    return records


def _read(source: BinaryIO, most: int) -> bytes:
    """Return the next bytes of a bundle's file, at most *most*; what refuses is the bundle's disk and not the store's."""
    try:
        return source.read(most)
    except OSError as error:
        raise FetchError(f"the bundle cannot be read: {error.strerror}") from None


class BundleFetcher:
    """Copies blobs from a bundle into *staging*, a folder on the store's file system that only this object uses."""

    def __init__(self, source: Bundle, staging: Path) -> None:
        self._bundle = source
        self._staging = staging
        self._closed = threading.Event()

    def close(self) -> None:
        """End a copy, and close the bundle; from any thread."""
        self._closed.set()
        self._bundle.close()

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*, in their order."""
        for want in wants:
            try:
                yield self._fetched(want, report)
            except ReconcileError as error:
                if isinstance(error, HashMismatch | SizeMismatch):
                    report(Incident(kind=error.name, blob=want.digest, source=str(self._bundle.path), detail=error.message))
                yield FetchFailed(digest=want.digest, error=error)

    def _fetched(self, want: Want, report: Reporter) -> Fetched:
        folder = self._staging / want.digest.replace(":", "-")
        with files.translate_errors(f"copy {want.digest}"):
            folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / "bundle"
        try:
            return self._copied(want, path, report)
        except HashMismatch:
            if not path.exists():
                raise
            path.unlink()  # what an earlier run left may have been harmed since, and is no fault of the bundle's
            return self._copied(want, path, report)

    def _copied(self, want: Want, path: Path, report: Reporter) -> Fetched:
        """Copy a blob to *path*, after what is there already; a copy with another digest is deleted unless it went on from an older one."""
        try:
            with self._bundle.open(want.digest) as (source, size):
                return self._copy(want, source, size, path, report)
        except FileNotFoundError:
            earlier = " (an earlier bundle does)" if want.digest in self._bundle.contents.assumes else ""
            hint = "export a bundle without --since and import that; bundles with --since are imported in the order in which they were made"
            raise FetchError(f"the bundle does not hold {want.digest}{earlier}", hint=hint) from None
        except OSError as error:
            raise FetchError(f"{want.digest} in the bundle cannot be read: {error.strerror}") from None

    def _copy(self, want: Want, source: BinaryIO, size: int, path: Path, report: Reporter) -> Fetched:
        if size != want.size:
            raise SizeMismatch(f"the bundle has {size:,} bytes of {want.digest}, and {want.size:,} are signed")
        algorithm = digest.parse(want.digest)[0]
        hasher = digest.hasher(algorithm)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with files.translate_errors(f"copy {want.digest}"), os.fdopen(os.open(path, flags, 0o600), "r+b") as target:
            done = 0
            while done < size and (data := target.read(min(_CHUNK, size - done))):
                hasher.update(data)
                done += len(data)
            resumed = done
            target.truncate(done)
            source.seek(done, os.SEEK_CUR)
            said = time.monotonic()
            while done < size:
                data = _read(source, min(_CHUNK, size - done))
                if not data or self._closed.is_set():
                    raise FetchError("the bundle ends early" if not data else "the copy was stopped")
                target.write(data)
                hasher.update(data)
                done += len(data)
                if time.monotonic() - said >= _REPORT_SECONDS:
                    report(FetchProgress(digest=want.digest, done=done, total=size, hashed=done))
                    said = time.monotonic()
            target.flush()
            seen = os.fstat(target.fileno())
        if f"{algorithm}:{hasher.hexdigest()}" != want.digest:
            if not resumed:
                path.unlink()
            raise HashMismatch(f"the bundle has other bytes of {want.digest} than were signed")
        return Fetched(
            digest=want.digest, size=size, path=path, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns,
            sources=(str(self._bundle.path),),
        )  # fmt: skip
