"""
Reserved space, so that models that the snapshot no longer lists stop serving although the disk is full.

Before a model leaves ``active``, the ledger, the trust state and a new generation are written, and ``gc`` records what it deletes: each
needs a few blocks. Where other programs filled the disk completely, a run deletes this file first, and makes it again once there is space.
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
    """
    Delete the reserve at *path* for this run if the disk is full, and make it again afterwards; the caller holds the store.

    Raises nothing of its own: a reserve that cannot be made stops no run.
    """
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
