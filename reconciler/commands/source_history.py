"""
Fetching with a memory: a source that lied about a blob before is asked for it last, and never beside others.

What is remembered are the incidents of earlier runs. Nobody is shut out for good: where no other source gives the blob, those that lied
are asked again, each byte being checked as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from reconciler.core.errors import FetchError
from reconciler.fetch import sources
from reconciler.ports import Fetched, Fetcher, FetchFailed, Reporter, Want

if TYPE_CHECKING:
    from collections.abc import Generator

#: A lie is forgotten after so many seconds.
MEMORY_SECONDS = 30 * 86400.0


class FetcherWithHistory:
    """A fetcher that asks through *fetcher*; *lied* are pairs of a blob and a source, as incidents name them."""

    def __init__(self, fetcher: Fetcher, lied: frozenset[tuple[str, str]]) -> None:
        self._fetcher = fetcher
        self._lied = lied

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*: from sources without a record first, then from the others."""
        suspects = {want.digest: self._suspects(want) for want in wants}
        left = []
        outcomes = self._fetcher.fetch([_without(want, suspects[want.digest]) for want in wants], report)
        with contextlib.closing(cast("Generator[Fetched | FetchFailed]", outcomes)):  # whoever closes this closes that
            for outcome in outcomes:
                if isinstance(outcome, FetchFailed) and isinstance(outcome.error, FetchError) and suspects[outcome.digest]:
                    left.append(outcome.digest)
                else:
                    yield outcome
        again = [msgspec.structs.replace(want, sources=suspects[want.digest]) for want in wants if want.digest in left]
        if again:
            yield from self._fetcher.fetch(again, report)

    def _suspects(self, want: Want) -> tuple[str, ...]:
        """Return the sources of *want* that lied, unless there is no other."""
        found = tuple(url for url in want.sources if (want.digest, sources.redact(url)) in self._lied)
        return found if len(found) < len(want.sources) else ()

    def close(self) -> None:
        """End whatever was started; idempotent."""
        self._fetcher.close()


def _without(want: Want, suspects: tuple[str, ...]) -> Want:
    return msgspec.structs.replace(want, sources=tuple(url for url in want.sources if url not in suspects))
