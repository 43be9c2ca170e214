"""The memory twin of ``ports.Fetcher``: sources are a dictionary, and the promises are the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from reconciler.core import digest as digests
from reconciler.core.errors import FetchError, HashMismatch
from reconciler.ports import Fetched, FetchFailed, FetchProgress, Incident, Reporter, Want


class MemoryFetcher:
    """Fetches from *sources*, bytes by URL; a URL that is not there does not answer."""

    def __init__(self, staging: Path, sources: Mapping[str, bytes]) -> None:
        self._staging = staging
        self._sources = sources

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        for want in wants:
            yield self._one(want, report)

    def close(self) -> None:
        """Nothing was started."""

    def _one(self, want: Want, report: Reporter) -> Fetched | FetchFailed:
        error: FetchError = FetchError(f"no source gave {want.digest}")
        for url in want.sources:
            data = self._sources.get(url)
            if data is None:
                report(Incident(kind="source-failed", blob=want.digest, source=url, detail="it does not answer"))
            elif len(data) != want.size:
                report(Incident(kind="size-mismatch", blob=want.digest, source=url, detail=f"it has {len(data)} bytes"))
            elif digests.of(data, digests.parse(want.digest)[0]) != want.digest:
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
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            seen = os.fstat(fd)
        finally:
            os.close(fd)
        return Fetched(
            digest=want.digest, size=seen.st_size, path=path, sources=(url,),
            device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns,
        )  # fmt: skip
