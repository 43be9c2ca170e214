"""Connects adapters to the ports of a run. Whatever is started here is ended here, in the opposite order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from reconciler.commands import blob_sources, serve
from reconciler.commands.context import Clock, NodeContext, RunOptions
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core.events import Announced, Event
from reconciler.fetch.hashing import Hashers
from reconciler.hooks import CommandHooks
from reconciler.ports import Ports, Reporter, Tester, Unpacker
from reconciler.store.blobs import Blobs
from reconciler.store.generations import Generations, path_of
from reconciler.store.housekeeping import StoreHousekeeping
from reconciler.store.ledger import Change, Ledger
from reconciler.store.trees import Trees


@contextlib.contextmanager
def ports(context: NodeContext, options: RunOptions, found: VerifiedLock, ledger: Ledger, report: Reporter, actor: str) -> Iterator[Ports]:
    """Give the ports of a run; the caller holds the store."""
    layout, now = context.layout, context.clock
    report = with_history(report, ledger, found.lock_digest, actor, now)
    with hashing() as hash_file, contextlib.closing(blob_sources.fetcher(context, options, found, ledger)) as fetching:
        blobs = Blobs(layout, ledger, hash_file, now)
        yield Ports(
            blobs=blobs,
            trees=Trees(layout, ledger, blobs, unpacker(context)),
            generations=Generations(layout, serve.describer(context, found, ledger)),
            ledger=ledger,
            housekeeping=StoreHousekeeping(layout, ledger, found.lock, context.policy, now),
            servers=serve.follower(context, found, ledger, report),
            hooks=hooks(context, ledger, report),
            fetcher=fetching,
            tester=tester(context, ledger),
            report=report,
            now=now,
            tree_path=layout.tree,
            active_path=path_of,
        )


class _FileHasher:
    """Hashing for the store's one writer, from any of its threads, one file at a time."""

    def __init__(self, hashers: Hashers) -> None:
        self._hashers = hashers
        self._guard = threading.Lock()

    def __call__(self, path: Path, algorithm: str) -> str:
        with self._guard:
            return self._hashers.digest(path, algorithm)


@contextlib.contextmanager
def hashing() -> Iterator[_FileHasher]:
    """Give a function that hashes a file in a process of its own."""
    with contextlib.closing(Hashers(1)) as hashers:
        yield _FileHasher(hashers)


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
