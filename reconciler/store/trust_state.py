"""
What this store has accepted of the network: the trust state, the newer roots, and the last accepted envelopes by digest.

Rules that hold here:

1. The trust state is written, durably, before the first change that a snapshot causes; a crash cannot let an older one in.
2. It stands twice, in a file of its own and in the ledger. The newer copy counts, by what was signed and never by a local time
   (``TrustState.order``), so that bringing back an old copy of one gains nothing. If both are gone on a store that was used,
   nothing is accepted until a person says so (``reconcile trust init``): without a record, an old snapshot could be replayed.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core.errors import TrustStateLost
from reconciler.core.trust import TrustState
from reconciler.store import atomic
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

#: A quarter of a year of daily snapshots.
ENVELOPES = 100


def read(layout: Layout, ledger: Ledger) -> TrustState:
    """
    Return the trust state of a store; an empty one for a store that was never used.

    Raises:
        TrustStateLost: both copies are gone or damaged on a store that was used.
    """
    found = [trust_state for trust_state in (in_file(layout), ledger.trust_state()) if trust_state is not None]
    if found:
        return max(found, key=lambda one: one.order)
    with files.translate_errors(f"read {layout.root}"):
        used = layout.used
    if used:
        raise TrustStateLost(f"{_path(layout)} and its copy in the ledger are gone or damaged, on a store that was used")
    return TrustState()


def write(layout: Layout, ledger: Ledger, trust_state: TrustState) -> None:
    """Write both copies, durably."""
    atomic.make_folder(layout.trust)
    atomic.write(_path(layout), msgspec.json.encode(trust_state))
    ledger.set_fact("floor", trust_state)


def in_file(layout: Layout) -> TrustState | None:
    """Return the copy in the file, or None if that is gone or damaged."""
    try:
        found = msgspec.json.decode(atomic.read(_path(layout)), type=TrustState)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.version else None  # an empty object decodes well, and is no memory of anything


def _path(layout: Layout) -> Path:
    return layout.trust / "floor.json"


def roots(layout: Layout) -> tuple[bytes, ...]:
    """Return the envelopes of the roots that followed the pinned one, in the order of their versions."""
    folder = layout.trust / "roots"
    with files.translate_errors(f"read {folder}"):
        if not folder.is_dir():
            return ()
        found = sorted((int(path.stem), path) for path in folder.glob("*.json") if path.stem.isascii() and path.stem.isdecimal())
        return tuple(atomic.read(path) for _, path in found)


def keep_root(layout: Layout, version: int, envelope: bytes) -> None:
    """Keep the envelope of root *version*, durably: a crash after this is a resume."""
    folder = layout.trust / "roots"
    atomic.make_folder(folder)
    atomic.write(folder / f"{version}.json", envelope)


def keep_envelope(layout: Layout, envelope: bytes) -> None:
    """Keep an accepted snapshot's envelope by its digest, as evidence; the oldest go first, since a node runs for years."""
    folder = layout.trust / "snapshots"
    path = folder / f"{digests.of(envelope).replace(':', '-')}.json"
    with files.translate_errors(f"keep {path.name}"):
        if path.exists():
            return
        atomic.make_folder(folder)
        atomic.write(path, envelope, 0o444)
        others = sorted((kept for kept in folder.glob("*.json") if kept != path), key=lambda kept: kept.lstat().st_mtime_ns)
        for old in others[: 1 - ENVELOPES]:
            atomic.delete(old)
