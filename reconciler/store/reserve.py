"""
Room that is kept for the day on which the disk is full: what the network took away must stop serving then, too.

Ledger, floor and a new generation are written before a model leaves ``active``, and ``gc`` notes what it deletes: all of them need a few
blocks. Where other programs filled the disk to its last one, a run lets go of this file first, and makes it again when there is room.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from reconciler.core.errors import StoreError
from reconciler.store import atomic

#: Enough for a generation of ten thousand models, and the ledger's journal.
BYTES = 4 << 20


@contextlib.contextmanager
def released_when_full(path: Path) -> Iterator[None]:
    """Let go of the ballast at *path* while this run needs its room, and make it again; neither stops a run. The caller holds the store."""
    with contextlib.suppress(OSError, StoreError):
        if _free(path) < BYTES:
            atomic.delete(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, StoreError):
            if not _is_whole(path) and _free(path) >= 4 * BYTES:
                atomic.reserve(path, BYTES)


def _free(path: Path) -> int:
    seen = os.statvfs(path.parent)
    return seen.f_bavail * seen.f_frsize


def _is_whole(path: Path) -> bool:
    try:
        return path.lstat().st_blocks * 512 >= BYTES  # not its size: a copy may be all holes
    except FileNotFoundError:
        return False
