"""The fetcher of a run that may touch no network: every blob fails with a sentence that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from reconciler.core.errors import FetchError
from reconciler.ports import Fetched, FetchFailed, Reporter, Want


class OfflineFetcher:
    """Fetches nothing."""

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield a refusal for each of *wants*."""
        del report
        for want in wants:
            yield FetchFailed(digest=want.digest, error=FetchError("not fetched: this run is offline", hint="run again without --offline"))

    def close(self) -> None:
        """Nothing was started."""
