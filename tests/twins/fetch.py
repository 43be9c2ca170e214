"""Memory twins of what brings bytes in: ``Fetcher`` and ``Unpacker``."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from reconciler.core import digest
from reconciler.core.errors import FetchError, HashMismatch, SizeMismatch, StoreError, UnpackRefused
from reconciler.core.events import FetchProgress, Incident
from reconciler.ports import Blobs, Fetched, FetchFailed, Reporter, Want
from tests.twins.content import tar_members, url_of


class Internet:
    """What all servers have, by URL; every request is counted."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []

    def add(self, data: bytes) -> None:
        self.pages[url_of(data)] = data

    def remove(self, data: bytes) -> None:
        self.pages.pop(url_of(data), None)


class MemoryFetcher:
    """Writes into a staging folder what the *internet* has; a URL that it does not have does not answer."""

    def __init__(self, staging: Path, internet: Internet) -> None:
        self._staging = staging
        self._internet = internet
        self.closed = False

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        for want in wants:
            self._internet.asked.append(want.digest)
            try:
                yield self._fetch_one(want, report)
            except OSError as error:
                yield FetchFailed(digest=want.digest, error=StoreError(f"cannot write: {error.strerror}"))

    def _fetch_one(self, want: Want, report: Reporter) -> Fetched | FetchFailed:
        error = FetchError(f"no source gave {want.digest}")
        for url in want.sources:
            data = self._internet.pages.get(url)
            if data is None:
                report(Incident(kind="source-failed", blob=want.digest, source=url, detail="it does not answer"))
            elif len(data) != want.size:
                error = SizeMismatch(f"no source gave {want.digest}")
                report(Incident(kind="size-mismatch", blob=want.digest, source=url, detail=f"it has {len(data)} bytes"))
            elif digest.of(data, digest.parse(want.digest)[0]) != want.digest:
                error = HashMismatch(f"no source gave {want.digest}")
                report(Incident(kind="hash-mismatch", blob=want.digest, source=url, detail="it has other bytes"))
            else:
                report(FetchProgress(digest=want.digest, done=want.size, total=want.size, source=url))
                return self._kept(want, data, url)
        return FetchFailed(digest=want.digest, error=error)

    def _kept(self, want: Want, data: bytes, url: str) -> Fetched:
        folder = self._staging / want.digest.replace(":", "-")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "data"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        return fetched_at(path, want.digest, url)

    def close(self) -> None:
        self.closed = True


def fetched_at(path: Path, name: str, source: str = "") -> Fetched:
    """Return what a fetcher says of the file at *path*."""
    seen = path.lstat()
    return Fetched(
        digest=name, size=seen.st_size, path=path, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns, sources=(source,)
    )  # fmt: skip


class TarUnpacker:
    """Takes a plain tar apart; refuses what is no file."""

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        assert kind == "tar"
        try:
            return tuple(sorted(_unpacked(archive.read_bytes(), into)))
        except tarfile.TarError as error:
            raise UnpackRefused(str(error)) from None
        except OSError as error:
            raise StoreError(f"cannot unpack: {error.strerror}") from error


def _unpacked(data: bytes, into: Path) -> Iterator[str]:
    for name, content in tar_members(data).items():
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        yield name


def adopt(blobs: Blobs, fetched: Fetched) -> None:
    """Give one file its name; raise why it does not get it."""
    for error in blobs.adopt([fetched]).values():
        raise error
