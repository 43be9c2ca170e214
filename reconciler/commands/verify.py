"""
Hashes the files of the store and of cold storage, all or a share, and records the result. It never asks the network.

Damage is recorded at once: a blob is marked, so that the next plan says ``repair``; a copy in cold storage is set aside, so that
nothing is restored from it. What is good is recorded together, a second's worth at most: each record is synced, which takes as long as
hashing a MiB.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler.commands import load_lock, node_trust
from reconciler.commands.context import Clock, NodeContext, hold_store
from reconciler.core.errors import StoreError
from reconciler.core.events import Event, HashProgress, Incident, Notice
from reconciler.core.state import NodeState
from reconciler.fetch.hashing import Checked, Hashers
from reconciler.ports import Reporter
from reconciler.store import blobs, generations, observe
from reconciler.store.layout import Layout
from reconciler.store.ledger import COLD_VERIFIED, Ledger, Verification
from reconciler.store.trees import files_of, is_linked


class Damage(Struct, frozen=True, kw_only=True):
    """Something in the store that is missing, or is not what its name says."""

    kind: str
    name: str
    detail: str


class Verified(Struct, frozen=True, kw_only=True):
    """What was hashed, and the damage that was found."""

    schema: int = 1
    checked: int
    bytes: int
    damage: tuple[Damage, ...]
    #: Paths where only blobs and trees belong, and that are neither: nothing uses them, and nothing deletes them.
    unexpected: tuple[str, ...] = ()
    repaired: bool = False


class _File(Struct, frozen=True):
    """A file that is named by its digest. *hashed_at*: seconds since the epoch; minus infinity: never."""

    name: str
    size: int
    path: Path
    hashed_at: float
    cold: bool


class _Store(Struct, frozen=True):
    """The store that is held, and where findings are reported."""

    layout: Layout
    ledger: Ledger
    report: Reporter
    clock: Clock


def verify(
    context: NodeContext,
    report: Reporter,
    *,
    sample: float = 1.0,
    rate: int = 0,
    workers: int | None = None,
    progress: bool = False,
    lock_timeout_seconds: float = 0.0,
) -> Verified:
    """
    Hash the files of the store, or a *sample* of them (0 to 1), those not hashed for longest first.

    *rate* is in bytes a second, 0: no limit. With *progress*, the progress is reported.

    Raises:
        TrustError: there is a lock, and it is not one that the network signed; an expired one is accepted.
        StoreBusy, StoreError: as their names say.
    """
    layout = context.layout
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        _check_lock(context, ledger, report)
        state = observe.node_state(layout, ledger)
        damage = [*_missing(layout, ledger, state), *_damaged_trees(layout, ledger), *_damaged_active(layout, state)]
        chosen = _chosen(_files(layout, ledger, state), sample)
        store = _Store(layout, ledger, report, context.clock)
        tracker = _Progress(report if progress else _ignore, sum(file.size for file in chosen))
        with contextlib.closing(Hashers(workers)) as hashers, contextlib.closing(tracker), contextlib.closing(_Records(store)) as records:
            for cold, record in ((False, records.add), (True, records.add_cold)):
                files = [(file.name, file.size, file.path) for file in chosen if file.cold == cold]
                for done in hashers.check_many(files, tracker.hashed, rate):
                    tracker.finished(done.digest, done.size)
                    damage += record(done)
        _forget_removed(store, state)
        unexpected = _unexpected(layout)
    for path in unexpected:
        report(Notice(level="warning", text=f"{path} is no blob and no tree: nothing uses it and nothing deletes it; move it away"))
    return Verified(
        checked=len(chosen), bytes=sum(file.size for file in chosen), damage=tuple(damage), unexpected=tuple(map(str, unexpected))
    )


def _unexpected(layout: Layout) -> list[Path]:
    folders = (layout.blobs, layout.trees, layout.cold / "blobs")
    return [folder / path for folder in folders for path in observe.unexpected_paths(folder)]


def _check_lock(context: NodeContext, ledger: Ledger, report: Reporter) -> None:
    if not context.lock_path.exists():
        report(Notice(level="warning", text="there is no lock: the store's files are only compared with the names of its blobs"))
        return
    with node_trust.refusals_logged(ledger, context.clock()):
        load_lock.load_verified_lock(context)


def _ignore(_event: Event) -> None:
    """Report nothing: no progress was asked for."""


class _Progress:
    """Reports how many of *total* bytes are hashed."""

    def __init__(self, report: Reporter, total: int) -> None:
        self._report, self._total = report, total
        self._finished = 0
        self._open: dict[str, int] = {}

    def hashed(self, name: str, done: int, _size: int) -> None:
        """Count *done* bytes of the file *name*, which is being hashed."""
        self._open[name] = done
        self._send(self._finished + sum(self._open.values()))

    def finished(self, name: str, size: int) -> None:
        """Count the file *name* as a whole."""
        self._open.pop(name, None)
        self._finished += size
        self._send(self._finished + sum(self._open.values()))

    def close(self) -> None:
        """Report the total: files that shrank or vanished meanwhile count as done."""
        self._send(self._total)

    def _send(self, done: int) -> None:
        self._report(HashProgress(done=min(done, self._total), total=self._total))


def ages(context: NodeContext) -> list[float]:
    """Return for each file that ``verify`` may hash the seconds since it was hashed; infinity where it never was."""
    now, layout = context.clock(), context.layout
    with Ledger.reading(layout.ledger) as ledger:
        return [now.timestamp() - file.hashed_at for file in _files(layout, ledger, observe.node_state(layout, ledger))]


def _files(layout: Layout, ledger: Ledger, state: NodeState) -> list[_File]:
    hot = {name: seen.verified_at for name, seen in ledger.verifications().items()}
    cold = ledger.fact(COLD_VERIFIED, dict[str, datetime]) or {}
    return [
        *(_File(name, seen.size, layout.blob(name), _seconds(hot.get(name)), False) for name, seen in state.blobs.items()),
        *(_File(name, seen.size, layout.cold_blob(name), _seconds(cold.get(name)), True) for name, seen in state.archived.items()),
    ]


def _seconds(at: datetime | None) -> float:
    return at.timestamp() if at else -math.inf


def _chosen(files: list[_File], sample: float) -> list[_File]:
    """Return the share of *files* that was not hashed for longest; those never hashed come first."""
    random.shuffle(files)  # among equals: a store whose blobs came together must not always begin with the same
    files.sort(key=lambda file: file.hashed_at)
    return files[: max(1, round(len(files) * sample))] if files else []


def _damaged_active(layout: Layout, state: NodeState) -> Iterator[Damage]:
    """Yield what is wrong with ``active``."""
    gone = ["it is gone"] if not os.path.lexists(layout.active) and generations.numbers(layout) else []
    for text in (*gone, *(text for text in state.drift if "active" in text)):
        yield Damage(kind="active", name="active", detail=text)


def _missing(layout: Layout, ledger: Ledger, state: NodeState) -> Iterator[Damage]:
    """Yield blobs and trees that the ledger knows, or that active links lead to, and that are gone."""
    for name in sorted(ledger.verifications().keys() - state.blobs.keys()):
        yield Damage(kind="blob", name=name, detail="it is gone")
    known = {tree for tree, _ in ledger.trees().values()}
    for tree in sorted(known | {entry.tree for entry in state.active.entries.values()}):
        if not layout.tree(tree).is_dir():
            yield Damage(kind="tree", name=tree, detail="it is gone")


def _damaged_trees(layout: Layout, ledger: Ledger) -> Iterator[Damage]:
    for tree, listing in dict(ledger.trees().values()).items():
        folder = layout.tree(tree)
        if not folder.is_dir():
            continue
        for entry in listing:
            if not is_linked(folder / entry.path, layout.blob(entry.digest)):
                yield Damage(kind="tree", name=tree, detail=f"{entry.path} is not the blob {entry.digest}")
        for extra in sorted({*files_of(folder)} - {entry.path for entry in listing}):
            yield Damage(kind="tree", name=tree, detail=f"{extra} does not belong there")


# -- what was found --------------------------------------------------------------------------------


#: Good files that are recorded together: at most so many, and so many seconds after the last record.
_TOGETHER, _TOGETHER_SECONDS = 64, 1.0


class _Records:
    """Records what was found of each file; closing it records the rest, also where hashing was interrupted."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._good: dict[str, Verification] = {}
        self._good_cold: dict[str, datetime] = {}
        self._recorded_at = time.monotonic()

    def add(self, done: Checked) -> list[Damage]:
        """Record a blob of the store; return the damage."""
        now = self._store.clock()
        if done.ok:
            self._good[done.digest] = Verification(size=done.size, inode=done.inode, mtime_ns=done.mtime_ns, verified_at=now)
            self._record_some()
            return []
        # A size that no file has marks the blob as damaged until it is replaced: the file itself stays, to be looked at.
        self._store.ledger.record_verified({done.digest: Verification(size=-1, inode=0, mtime_ns=0, verified_at=now)})
        return [_logged("blob", done, done.error or f"its bytes hash to {done.found}", self._store)]

    def add_cold(self, done: Checked) -> list[Damage]:
        """Record a copy in cold storage; return the damage."""
        if done.ok:
            self._good_cold[done.digest] = self._store.clock()
            self._record_some()
            return []
        if not done.found:  # a process without memory, or a disk that is away, says nothing about the bytes
            return [_logged("cold", done, f"its copy in cold storage cannot be read, and stays: {done.error}", self._store)]
        try:
            blobs.set_aside(self._store.layout, done.digest)
            after = "it is set aside, and downloaded if the network lists it again"
        except StoreError as error:
            after = f"it stays: {error.message}"
        return [_logged("cold", done, f"its copy in cold storage hashes to {done.found}; {after}", self._store)]

    def close(self) -> None:
        """Record what is good and not recorded yet."""
        self._record_good()

    def _record_good(self) -> None:
        ledger, self._recorded_at = self._store.ledger, time.monotonic()
        if self._good:
            ledger.record_verified(self._good)
        if self._good_cold:
            known = ledger.fact(COLD_VERIFIED, dict[str, datetime]) or {}
            ledger.set_fact(COLD_VERIFIED, known | self._good_cold)
        self._good, self._good_cold = {}, {}

    def _record_some(self) -> None:
        together = len(self._good) + len(self._good_cold)
        if together >= _TOGETHER or time.monotonic() - self._recorded_at >= _TOGETHER_SECONDS:
            self._record_good()


def _logged(kind: str, done: Checked, detail: str, store: _Store) -> Damage:
    incident = Incident(kind="blob-damaged", blob=done.digest, detail=detail)
    store.ledger.log_incident(incident, store.clock())
    store.report(incident)
    return Damage(kind=kind, name=done.digest, detail=detail)


def _forget_removed(store: _Store, state: NodeState) -> None:
    """Forget the times of copies that have left cold storage."""
    known = store.ledger.fact(COLD_VERIFIED, dict[str, datetime]) or {}
    left = {name: at for name, at in known.items() if name in state.archived}
    if left != known:
        store.ledger.set_fact(COLD_VERIFIED, left)
