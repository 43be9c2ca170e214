"""The ``Housekeeping`` port: recovery after an interrupted run, and the ways to quarantine, garbage collection and bug reports."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from reconciler import files
from reconciler.core.errors import InternalError, StoreError
from reconciler.core.lock import Lock
from reconciler.core.node import Policy
from reconciler.ports import TestReport
from reconciler.store import atomic
from reconciler.store.garbage import GarbageCollector
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

#: How the names begin of what a run has in staging and no later run continues.
_INTERRUPTED = ("unpack-", "tree-", "thaw-", "index-", "small-")


class StoreHousekeeping:
    """Housekeeping on a disk, for the store's one writer."""

    def __init__(self, layout: Layout, ledger: Ledger, lock: Lock, policy: Policy, now: Callable[[], datetime]) -> None:
        self._layout = layout
        self._policy = policy
        self._now = now
        self._garbage = GarbageCollector(layout, ledger, lock, policy, now)

    def recover(self) -> None:
        """Make the folders of a store, and delete what an interrupted run left; partial downloads stay, to be continued."""
        for folder in (self._layout.blobs, self._layout.trees, self._layout.generations):
            atomic.make_folder(folder)
        atomic.make_folder(self._layout.staging, 0o700)
        trust = self._layout.trust
        with files.translate_errors("clear what an interrupted run left"):
            left = [path for path in self._layout.staging.iterdir() if path.name.startswith(_INTERRUPTED)]
            for folder in (self._layout.root, self._layout.staging, self._layout.generations, trust, trust / "roots", trust / "snapshots"):
                left += folder.glob(".*.tmp")
            left += (self._layout.cold / "blobs").glob("*/*/.*.tmp")
        for path in left:
            atomic.delete(path)

    def quarantine(self, model: str, report: TestReport | None, detail: str, tree: str) -> None:
        """Keep a failed model's files with a record of what was expected and found; that they cannot be kept stops no run."""
        from reconciler.store import quarantine  # most runs have nothing to put there

        record = quarantine.QuarantineRecord(model=model, at=self._now(), detail=detail, tree=tree, report=report)
        with contextlib.suppress(StoreError):
            quarantine.keep(self._layout, record, self._policy.quarantine_bytes)

    def collect_garbage(self) -> None:
        """Delete what no listed model, kept generation or grace period needs."""
        self._garbage.collect()

    def report_bug(self, error: Exception, model: str) -> InternalError:
        """Write a report of *error*, which met *model*, and return the error that tells of it; raises nothing."""
        from reconciler.store import crash_report  # with all that describes a traceback

        return crash_report.internal_error(self._layout, error, {"command": "apply", "model": model}, self._now())


#: Enough for a generation of ten thousand models, and the ledger's journal.
RESERVE_BYTES = 4 << 20


@contextlib.contextmanager
def released_when_full(path: Path) -> Iterator[None]:
    """
    Delete the reserve at *path* for this run if the disk is full, and make it again afterwards; the caller holds the store.

    Raises nothing of its own: a reserve that cannot be made stops no run.
    """
    with contextlib.suppress(OSError, StoreError):
        if _free(path) < RESERVE_BYTES:
            atomic.delete(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, StoreError):
            if not _is_whole(path) and _free(path) >= 4 * RESERVE_BYTES:
                atomic.reserve(path, RESERVE_BYTES)


def _free(path: Path) -> int:
    seen = os.statvfs(path.parent)
    return seen.f_bavail * seen.f_frsize


def _is_whole(path: Path) -> bool:
    try:
        return path.lstat().st_blocks * 512 >= RESERVE_BYTES  # not its size: a copy may be all holes
    except FileNotFoundError:
        return False
