"""
Hashing what the store and cold storage hold, all of it or a share, and remembering what was found. Never asks the network.

What is damaged loses its standing at once: a blob is marked, so that the next plan says ``repair``; a copy in cold storage is set aside,
so that nobody counts on it.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler.commands import load_lock, lock
from reconciler.commands.options import Clock, wall_clock
from reconciler.core.errors import StoreError
from reconciler.core.state import NodeState
from reconciler.fetch.hashing import Checked, Hashers
from reconciler.ports import Event, HashProgress, Incident, Notice, Reporter
from reconciler.settings import Settings
from reconciler.store import blobs, generations, observe
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Verification
from reconciler.store.trees import files_of, is_linked


class Damage(Struct, frozen=True, kw_only=True):
    """Something in the store that is not what it was."""

    kind: str
    name: str
    detail: str


class Verified(Struct, frozen=True, kw_only=True):
    """What a scrub found."""

    schema: int = 1
    checked: int
    bytes: int
    damage: tuple[Damage, ...]
    repaired: bool = False


class _File(Struct, frozen=True):
    """A file that has a digest's name, and when it was hashed last, in seconds since the epoch; never is minus infinity."""

    name: str
    size: int
    path: Path
    hashed_at: float
    cold: bool


class _Scene(Struct, frozen=True):
    """A store that is held, and who hears of it."""

    layout: Layout
    ledger: Ledger
    report: Reporter
    clock: Clock


#: When each copy in cold storage was hashed last, in the ledger.
_COLD = "cold"


def verify(
    settings: Settings,
    report: Reporter,
    *,
    sample: float = 1.0,
    rate: int = 0,
    workers: int | None = None,
    progress: bool = False,
    lock_timeout_seconds: float = 0.0,
    clock: Clock = wall_clock,
) -> Verified:
    """
    Hash the store, or a *sample* of it, the longest unchecked first. *rate* is bytes a second, 0: no limit.

    With *progress* it is reported how far it is.

    Raises:
        TrustError: there is a lock, and it is not the network's word; one that has merely expired is.
        StoreBusy, StoreError: as their names say.
    """
    layout = load_lock.store_layout(settings)
    with lock.open_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        if settings.path(settings.network.lockfile).exists():
            with lock.log_trust_errors(ledger, clock()):
                load_lock.load_verified_lock(settings)
        else:
            report(Notice(level="warning", text="there is no lock: what the store holds is compared with the names of its blobs alone"))
        state = observe.node_state(layout, ledger)
        damage = [*_lost(layout, ledger, state), *_torn(layout, ledger), *_misled(layout, state)]
        chosen = _chosen(_files(layout, ledger, state), sample)
        scene = _Scene(layout, ledger, report, clock)
        tally = _Tally(report if progress else _unheard, sum(file.size for file in chosen))
        with contextlib.closing(Hashers(workers)) as hashers, contextlib.closing(tally):
            for cold, recorded in ((False, _recorded), (True, _recorded_cold)):
                files = [(file.name, file.size, file.path) for file in chosen if file.cold == cold]
                for done in hashers.check_many(files, tally.moved, rate):
                    tally.ended(done.digest, done.size)
                    damage += recorded(done, scene)
        _forget(scene, state)
    return Verified(checked=len(chosen), bytes=sum(file.size for file in chosen), damage=tuple(damage))


def _unheard(_event: Event) -> None:
    """Nobody asked for progress."""


class _Tally:
    """Reports how many bytes of *total* are hashed."""

    def __init__(self, report: Reporter, total: int) -> None:
        self._report, self._total = report, total
        self._ended = 0
        self._open: dict[str, int] = {}

    def moved(self, name: str, hashed: int, _size: int) -> None:
        """Hear how far one file is."""
        self._open[name] = hashed
        self._tell(self._ended + sum(self._open.values()))

    def ended(self, name: str, size: int) -> None:
        """Hear that one file is done."""
        self._open.pop(name, None)
        self._ended += size
        self._tell(self._ended + sum(self._open.values()))

    def close(self) -> None:
        """Say that it is over, whatever was counted."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        self._report(HashProgress(done=min(done, self._total), total=self._total))


def ages(settings: Settings, now: datetime) -> list[float]:
    """Return for each file that ``verify`` may look at the seconds since it was hashed; infinitely many where it never was."""
    layout = load_lock.store_layout(settings)
    with Ledger.reading(layout.ledger) as ledger:
        return [now.timestamp() - file.hashed_at for file in _files(layout, ledger, observe.node_state(layout, ledger))]


def _files(layout: Layout, ledger: Ledger, state: NodeState) -> list[_File]:
    hot = {name: seen.verified_at for name, seen in ledger.verifications().items()}
    cold = ledger.fact(_COLD, dict[str, datetime]) or {}
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


def _misled(layout: Layout, state: NodeState) -> Iterator[Damage]:
    """Yield what is wrong with ``active``."""
    gone = ["it is gone"] if not os.path.lexists(layout.active) and generations.numbers(layout) else []
    for text in (*gone, *(text for text in state.drift if "active" in text)):
        yield Damage(kind="active", name="active", detail=text)


def _lost(layout: Layout, ledger: Ledger, state: NodeState) -> Iterator[Damage]:
    """Yield what was here, or what the active links lead to, and is gone."""
    for name in sorted(ledger.verifications().keys() - state.blobs.keys()):
        yield Damage(kind="blob", name=name, detail="it is gone")
    known = {tree for tree, _ in ledger.trees().values()}
    for tree in sorted(known | {entry.tree for entry in state.active.entries.values()}):
        if not layout.tree(tree).is_dir():
            yield Damage(kind="tree", name=tree, detail="it is gone")


def _torn(layout: Layout, ledger: Ledger) -> Iterator[Damage]:
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


def _recorded(done: Checked, scene: _Scene) -> list[Damage]:
    if done.ok:
        seen = Verification(size=done.size, inode=done.inode, mtime_ns=done.mtime_ns, verified_at=scene.clock())
        scene.ledger.record_verified(done.digest, seen)
        return []
    # A size that no file has marks the blob as damaged until it is replaced: the file itself stays, to be looked at.
    scene.ledger.record_verified(done.digest, Verification(size=-1, inode=0, mtime_ns=0, verified_at=scene.clock()))
    return [_logged("blob", done, done.error or f"its bytes hash to {done.found}", scene)]


def _recorded_cold(done: Checked, scene: _Scene) -> list[Damage]:
    if done.ok:
        known = scene.ledger.fact(_COLD, dict[str, datetime]) or {}
        scene.ledger.set_fact(_COLD, known | {done.digest: scene.clock()})
        return []
    if not done.found:  # a process without means, or a disk that is away, says nothing about the bytes
        return [_logged("cold", done, f"its copy in cold storage cannot be read, and stays: {done.error}", scene)]
    try:
        blobs.set_aside(scene.layout, done.digest)
        after = "it is set aside, and downloaded if the network lists it again"
    except StoreError as error:
        after = f"it stays: {error.message}"
    return [_logged("cold", done, f"its copy in cold storage hashes to {done.found}; {after}", scene)]


def _logged(kind: str, done: Checked, detail: str, scene: _Scene) -> Damage:
    incident = Incident(kind="blob-damaged", blob=done.digest, detail=detail)
    scene.ledger.log_incident(incident, scene.clock())
    scene.report(incident)
    return Damage(kind=kind, name=done.digest, detail=detail)


def _forget(scene: _Scene, state: NodeState) -> None:
    """Forget when copies were hashed that have left cold storage."""
    known = scene.ledger.fact(_COLD, dict[str, datetime]) or {}
    left = {name: at for name, at in known.items() if name in state.archived}
    if left != known:
        scene.ledger.set_fact(_COLD, left)
