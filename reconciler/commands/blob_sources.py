"""
Where a run's blobs come from: the network, a bundle, or nowhere.

A source that gave wrong bytes for a blob in an earlier run is asked for that blob last, and never together with others.

The ledger's incidents are the record. No source is excluded: where no other source gives the blob, those with a record are asked again, and
every byte is checked as always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import msgspec

from reconciler.commands.context import NodeContext, RunOptions
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core.errors import FetchError, StoreError
from reconciler.core.swarm import Swarm
from reconciler.fetch import sources
from reconciler.fetch.bundle import Bundle, BundleFetcher
from reconciler.fetch.downloader import Aria2Fetcher, OfflineFetcher
from reconciler.fetch.host_health import HostHealth, HostRecord
from reconciler.fetch.seeding import Seeding
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Fetched, Fetcher, FetchFailed, Reporter, Want
from reconciler.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Generator

#: Older incidents do not count.
MEMORY_SECONDS = 30 * 86400.0


def fetcher(context: NodeContext, options: RunOptions, found: VerifiedLock, ledger: Ledger) -> Fetcher:
    """
    Return what fetches blobs, from the node's own mirrors too where the snapshot allows it; offline, what refuses to. Close it.

    Where the settings permit peers and the snapshot has torrents, peers are asked before all that.
    """
    lock = found.lock
    if options.bundle is not None:
        return BundleFetcher(Bundle(options.bundle), context.layout.staging)
    if options.offline:
        return OfflineFetcher()
    download = msgspec.structs.replace(context.download, signed_redirects=lock.redirects)
    if not lock.allow_node_fallback:
        download = msgspec.structs.replace(download, mirrors=(), fallback=())
    lied = ledger.lying_sources(context.clock() - timedelta(seconds=MEMORY_SECONDS))
    hosts = HostHealth(ledger.fact(_HOSTS, dict[str, HostRecord]) or {}, context.clock(), patient=options.patient)
    made = _RememberingFetcher(Aria2Fetcher(context.layout.staging, download, hosts), hosts, ledger)
    behind = FetcherWithHistory(made, lied) if lied else made
    peers = found.verified.snapshot.swarm
    return _with_peers(behind, context, download, peers, found, ledger, lied) if peers and context.swarm.enabled else behind


def _with_peers(
    behind: Fetcher, context: NodeContext, download: FetchSettings, swarm: Swarm, found: VerifiedLock, ledger: Ledger,
    lied: frozenset[tuple[str, str]],
) -> Fetcher:  # fmt: skip
    from reconciler.fetch.swarm import SwarmContext, SwarmFetcher
    from reconciler.fetch.swarm_folder import PEERS

    return SwarmFetcher(
        behind,
        SwarmContext(
            settings=context.swarm,
            swarm=swarm,
            staging=context.layout.staging,
            torrents=context.layout.root / "cache" / "torrents",
            templates=(*found.verified.snapshot.sources.fallback, *download.fallback),
            blob_path=context.layout.blob,
            memory=_SeedingMemory(ledger),
            now=context.clock,
            refused=frozenset(blob for blob, source in lied if source == PEERS),
        ),
    )


class _SeedingMemory:
    """What the node seeds, as a fact of the *ledger*: to lose it costs some further hours of seeding."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def read(self) -> dict[str, Seeding]:
        """Return what is remembered."""
        return self._ledger.fact(_SEEDING, dict[str, Seeding]) or {}

    def write(self, found: dict[str, Seeding]) -> None:
        """Remember *found*."""
        with contextlib.suppress(StoreError):
            self._ledger.set_fact(_SEEDING, found or None)


#: A fact of the ledger: hosts that gave nothing in the last runs.
_HOSTS = "hosts"
#: A fact of the ledger: blobs that are given to peers.
_SEEDING = "seeding"


class _RememberingFetcher:
    """Fetches through *fetcher*, and lets the next run know which *hosts* gave nothing."""

    def __init__(self, fetcher: Fetcher, hosts: HostHealth, ledger: Ledger) -> None:
        self._fetcher, self._hosts, self._ledger = fetcher, hosts, ledger

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*."""
        return self._fetcher.fetch(wants, report)

    def close(self) -> None:
        """End what the fetcher started, and remember; idempotent."""
        self._fetcher.close()
        found = self._hosts.after()
        if found != (self._ledger.fact(_HOSTS, dict[str, HostRecord]) or {}):
            with contextlib.suppress(StoreError):  # it costs a request, and must not hide how the run ended
                self._ledger.set_fact(_HOSTS, found or None)


class FetcherWithHistory:
    """Fetches through *fetcher*. *lied*: pairs of the digest of a blob and a source that gave wrong bytes, as incidents name them."""

    def __init__(self, fetcher: Fetcher, lied: frozenset[tuple[str, str]]) -> None:
        self._fetcher = fetcher
        self._lied = lied

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*: from sources without a record first, then from the others."""
        suspects = {want.digest: self._suspects(want) for want in wants}
        left = []
        outcomes = self._fetcher.fetch([_without(want, suspects[want.digest]) for want in wants], report)
        with contextlib.closing(cast("Generator[Fetched | FetchFailed]", outcomes)):  # closing this iterator closes that one
            for outcome in outcomes:
                if isinstance(outcome, FetchFailed) and isinstance(outcome.error, FetchError) and suspects[outcome.digest]:
                    left.append(outcome.digest)
                else:
                    yield msgspec.structs.replace(outcome, more=False)  # the next one may not be passed on
        again = [msgspec.structs.replace(want, sources=suspects[want.digest]) for want in wants if want.digest in left]
        if again:
            yield from self._fetcher.fetch(again, report)

    def _suspects(self, want: Want) -> tuple[str, ...]:
        """Return the sources of *want* that gave wrong bytes before, unless there are no others."""
        found = tuple(url for url in want.sources if (want.digest, sources.redact(url)) in self._lied)
        return found if len(found) < len(want.sources) else ()

    def close(self) -> None:
        """End what the fetcher started; idempotent."""
        self._fetcher.close()


def _without(want: Want, suspects: tuple[str, ...]) -> Want:
    return msgspec.structs.replace(want, sources=tuple(url for url in want.sources if url not in suspects))
