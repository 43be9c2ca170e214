"""
Connects adapters to the ports of a run.

Rules that hold here:

1. Whatever is started here is ended here, in the opposite order.
2. What a run without changes does not need is imported and made at its first use (``at_first_use``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reconciler import ports as port
from reconciler.commands import at_first_use, serve
from reconciler.commands.at_first_use import AtFirstUse
from reconciler.commands.context import Clock, NodeContext, RunOptions
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core.events import Announced, Event
from reconciler.hooks import CommandHooks
from reconciler.ports import Ports, Reporter, Tester, Unpacker
from reconciler.store.generations import Generations, path_of
from reconciler.store.housekeeping import StoreHousekeeping
from reconciler.store.ledger import Change, Ledger

if TYPE_CHECKING:
    from reconciler.fetch.hashing import Hashers
    from reconciler.store.blobs import Blobs


@contextlib.contextmanager
def ports(context: NodeContext, options: RunOptions, found: VerifiedLock, ledger: Ledger, report: Reporter, actor: str) -> Iterator[Ports]:
    """Give the ports of a run; the caller holds the store."""
    layout, now = context.layout, context.clock
    report = with_history(report, ledger, found.lock_digest, actor, now)
    with hashing() as hash_file, _fetching(context, options, found, ledger) as fetcher:
        blobs = AtFirstUse(lambda: _blobs(context, ledger, hash_file))
        yield Ports(
            blobs=at_first_use.Blobs(blobs),
            trees=at_first_use.Trees(AtFirstUse(lambda: _trees(context, ledger, blobs()))),
            generations=Generations(layout, serve.describer(context, found, ledger)),
            ledger=ledger,
            housekeeping=StoreHousekeeping(layout, ledger, found.lock, context.policy, now),
            servers=serve.follower(context, found, ledger, report),
            hooks=hooks(context, ledger, report),
            fetcher=fetcher,
            tester=at_first_use.Tester(AtFirstUse(lambda: tester(context, ledger))),
            report=report,
            now=now,
            tree_path=layout.tree,
            active_path=path_of,
        )


@contextlib.contextmanager
def _fetching(context: NodeContext, options: RunOptions, found: VerifiedLock, ledger: Ledger) -> Iterator[port.Fetcher]:
    """Give what fetches blobs; at the end it is closed, if it was made, or if the node has peers: closing it sees to what is seeded."""

    def make() -> port.Fetcher:
        from reconciler.commands import blob_sources

        return blob_sources.fetcher(context, options, found, ledger)

    fetcher = AtFirstUse(make)
    try:
        yield at_first_use.Fetcher(fetcher)
    finally:
        for made in (fetcher(),) if context.swarm.enabled else fetcher.made:
            made.close()


def _blobs(context: NodeContext, ledger: Ledger, hash_file: _FileHasher) -> Blobs:
    from reconciler.store.blobs import Blobs

    return Blobs(context.layout, ledger, hash_file, context.clock)


def _trees(context: NodeContext, ledger: Ledger, blobs: Blobs) -> port.Trees:
    from reconciler.store.trees import Trees

    return Trees(context.layout, ledger, blobs, unpacker(context))


class _FileHasher:
    """Hashing for the store's one writer, from any of its threads, one file at a time."""

    def __init__(self, hashers: AtFirstUse[Hashers]) -> None:
        self._hashers = hashers
        self._guard = threading.Lock()

    def __call__(self, path: Path, algorithm: str) -> str:
        hashers = self._hashers()
        with self._guard:
            return hashers.digest(path, algorithm)


@contextlib.contextmanager
def hashing() -> Iterator[_FileHasher]:
    """Give a function that hashes a file in a process of its own, which is started at the first file."""

    def make() -> Hashers:
        from reconciler.fetch.hashing import Hashers

        return Hashers(1)

    hashers = AtFirstUse(make)
    try:
        yield _FileHasher(hashers)
    finally:
        for made in hashers.made:
            made.close()


def tester(context: NodeContext, ledger: Ledger) -> Tester:
    """Return what runs test jobs; *ledger* tells which servers have served a model here."""
    from reconciler.runtime.smoke_test import SandboxedTester

    return SandboxedTester(
        context.layout.root / "cache",
        sandbox=context.sandbox,
        timeout_seconds=context.test_seconds,
        runtimes=context.runtimes,
        served=ledger.served,
    )


def unpacker(context: NodeContext) -> Unpacker:
    """Return what unpacks archives."""
    from reconciler.unpack.in_sandbox import SandboxedUnpacker

    return SandboxedUnpacker(context.layout.root / "cache", context.sandbox)


def hooks(context: NodeContext, ledger: Ledger, report: Reporter) -> CommandHooks:
    """Return what runs the operator's hooks."""
    return CommandHooks(
        activated=context.activated_hook,
        healthy=context.healthy_hook,
        healthy_seconds=context.healthy_seconds,
        folder=context.folder,
        index=lambda generation: context.layout.generations / str(generation.number) / "index.json",
        memory=ledger,
        now=context.clock,
        report=report,
    )


def with_history(report: Reporter, ledger: Ledger, lock: str, actor: str, now: Clock) -> Reporter:
    """Return a reporter that also writes every announced set to the history."""

    def both(event: Event) -> None:
        if isinstance(event, Announced):
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
