"""Adapters joined to ports. Whatever is started here is ended here, in the opposite order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from reconciler.commands import load_lock, source_history
from reconciler.commands.load_lock import VerifiedLock
from reconciler.commands.options import Clock, Options
from reconciler.core import units
from reconciler.fetch.downloader import Aria2Fetcher, OfflineFetcher
from reconciler.fetch.hashing import Hashers
from reconciler.fetch.settings import FetchSettings
from reconciler.hooks import CommandHooks
from reconciler.ports import Event, Fetcher, Ports, Reporter, Swapped, Tester, Unpacker
from reconciler.settings import Settings
from reconciler.store.blobs import Blobs
from reconciler.store.generations import Generations, path_of
from reconciler.store.housekeeping import StoreHousekeeping
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger
from reconciler.store.trees import Trees


@contextlib.contextmanager
def ports(
    settings: Settings, options: Options, found: VerifiedLock, ledger: Ledger, report: Reporter, actor: str, now: Clock
) -> Iterator[Ports]:
    """Give the ports of a run; the caller holds the store."""
    layout = load_lock.store_layout(settings)
    report = _historian(report, ledger, found.lock_digest, actor, now)
    lied = ledger.lying_sources(now() - timedelta(seconds=source_history.MEMORY_SECONDS))
    own = found.lock.allow_node_fallback
    with hashing() as hash_file, contextlib.closing(fetcher(settings, layout, options, own_mirrors=own)) as fetching:
        blobs = Blobs(layout, ledger, hash_file, now)
        yield Ports(
            blobs=blobs,
            trees=Trees(layout, ledger, blobs, unpacker(settings)),
            generations=Generations(layout),
            ledger=ledger,
            housekeeping=StoreHousekeeping(layout, ledger, found.lock, settings.policy, now),
            hooks=hooks(settings, layout, report),
            fetcher=source_history.FetcherWithHistory(fetching, lied) if lied else fetching,
            tester=tester(settings),
            report=report,
            now=now,
            tree_path=layout.tree,
            active_path=path_of,
        )


class _HashFile:
    """Hashing for the store's one writer, from any of its threads, one file at a time."""

    def __init__(self, hashers: Hashers) -> None:
        self._hashers = hashers
        self._guard = threading.Lock()

    def __call__(self, path: Path, algorithm: str) -> str:
        with self._guard:
            return self._hashers.digest(path, algorithm)


@contextlib.contextmanager
def hashing() -> Iterator[_HashFile]:
    """Give a function that hashes a file in a process of its own."""
    with contextlib.closing(Hashers(1)) as hashers:
        yield _HashFile(hashers)


def fetcher(settings: Settings, layout: Layout, options: Options, *, own_mirrors: bool) -> Fetcher:
    """Return what fetches blobs, from the node's *own_mirrors* too where the network allows it; offline, what says that it may not."""
    if options.offline:
        return OfflineFetcher()
    return Aria2Fetcher(layout.staging, fetch_settings(settings, own_mirrors=own_mirrors))


def fetch_settings(settings: Settings, *, own_mirrors: bool) -> FetchSettings:
    """Return the download settings in plain units."""
    download = settings.download
    return FetchSettings(
        fallback=download.fallback if own_mirrors else (),
        allowed_hosts=download.allowed_hosts,
        allow_http=download.allow_http,
        connections=download.connections,
        concurrent=download.concurrent,
        limit_bytes=units.size(download.limit),
        min_rate_bytes=units.size(download.min_rate),
        timeout_seconds=units.seconds(download.timeout),
        proxy=download.proxy,
        ca_file=settings.path(download.ca_file) if download.ca_file else None,
        netrc=settings.path(download.netrc) if download.netrc else None,
    )


def tester(settings: Settings) -> Tester:
    """Return what runs test jobs."""
    from reconciler.runtime.smoke_test import SandboxedTester

    return SandboxedTester(
        settings.store_path / "cache",
        sandbox=settings.smoke.sandbox,
        timeout_seconds=units.seconds(settings.smoke.timeout),
        runtimes=settings.runtime,
    )


def unpacker(settings: Settings) -> Unpacker:
    """Return what takes archives apart."""
    from reconciler.unpack.in_sandbox import SandboxedUnpacker

    return SandboxedUnpacker(settings.store_path / "cache", settings.smoke.sandbox)


def hooks(settings: Settings, layout: Layout, report: Reporter) -> CommandHooks:
    """Return what asks the operator's hooks."""
    hooks = settings.hooks
    return CommandHooks(
        activated=settings.command(hooks.activated),
        healthy=settings.command(hooks.healthy),
        healthy_seconds=units.seconds(hooks.healthy_timeout),
        folder=Path(settings.base),
        index=lambda generation: layout.generations / str(generation.number) / "index.json",
        report=report,
    )


def _historian(report: Reporter, ledger: Ledger, lock: str, actor: str, now: Clock) -> Reporter:
    """Return a reporter that also keeps every swap."""

    def both(event: Event) -> None:
        if isinstance(event, Swapped):
            ledger.record_change(
                Change(
                    at=now(),
                    generation=event.generation,
                    actor=actor,
                    what=event.what,
                    lock=lock,
                    added=event.added,
                    removed=event.removed,
                )
            )
        report(event)

    return both
