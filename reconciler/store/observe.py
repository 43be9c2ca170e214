"""
What is on the node, as a value. Reads and changes nothing, not even a time stamp.

A plan must not hash: a blob counts as good while the file is the very one (inode, size, time of change) that was hashed and found
good. Anything else is unknown and is hashed by ``apply`` before it is used. A mode is no evidence of anything (DVC's cache was
fooled by it).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from reconciler import digest
from reconciler.errors import StoreError
from reconciler.state import BlobSeen, Generation, NodeState, TreeSeen
from reconciler.store import generations
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing, Verification


def node_state(layout: Layout, ledger: Ledger) -> NodeState:
    """
    Return the state of the store at *layout*, with what *ledger* remembers.

    Raises:
        StoreError: the store is not a folder, or cannot be read.
    """
    if layout.root.exists() and not layout.root.is_dir():
        raise StoreError(f"the store {layout.root} is not a folder", hint="set [store] path to a folder, or move the file away")
    active, drift = _active(layout)
    known = ledger.verifications()
    found = _scan(layout.blobs)
    blobs = {name: _blob(seen, known.get(name)) for name, seen in found.items()}
    trees = {recipe: _tree(layout, recipe, tree, listing, found) for recipe, (tree, listing) in ledger.trees().items()}
    lost = [f"blob {name} is gone" for name in sorted(known.keys() - found.keys())]
    damaged = [f"blob {name} is not the file that was verified" for name, seen in sorted(blobs.items()) if seen.damaged]
    torn = [f"tree {seen.digest} is damaged" for seen in trees.values() if seen.damaged]
    return NodeState(
        active=active,
        blobs=blobs,
        trees={recipe: seen for recipe, seen in trees.items() if layout.tree(seen.digest).is_dir()},
        archived={name: BlobSeen(size=seen.st_size) for name, seen in _scan(layout.cold / "blobs").items()},
        records=ledger.records(),
        passed=ledger.passed(),
        drift=(*drift, *lost, *damaged, *torn),
        unfinished=bool(ledger.fact("running", bool)),
    )


def _active(layout: Layout) -> tuple[Generation, tuple[str, ...]]:
    """Return the active generation; a damaged one is as good as none, and apply makes a new one."""
    try:
        return generations.current(layout), ()
    except StoreError as error:
        return Generation(), (error.message,)


def _scan(folder: Path) -> dict[str, os.stat_result]:
    """Return what lies under *folder*/<algorithm>/<2 hex>/<hex>, by digest."""
    found = {}
    for algorithm in digest.HEX_LENGTHS:
        for shelf in _entries(folder / algorithm):
            for entry in _entries(shelf.path):
                name = f"{algorithm}:{entry.name}"
                if digest.is_digest(name) and entry.name.startswith(shelf.name):
                    found[name] = entry.stat(follow_symlinks=False)
    return found


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _blob(seen: os.stat_result, known: Verification | None) -> BlobSeen:
    if not stat.S_ISREG(seen.st_mode) or (known is not None and seen.st_size != known.size):
        return BlobSeen(size=seen.st_size, damaged=True)
    same = known is not None and (seen.st_ino, seen.st_mtime_ns) == (known.inode, known.mtime_ns)
    return BlobSeen(size=seen.st_size, verified_at=known.verified_at if known is not None and same else None)


def _tree(layout: Layout, recipe: str, name: str, listing: tuple[Listing, ...], found: dict[str, os.stat_result]) -> TreeSeen:
    folder = layout.tree(name)
    return TreeSeen(
        digest=name,
        recipe=recipe,
        blobs=tuple(sorted({entry.digest for entry in listing})),
        bytes=sum(entry.size for entry in listing),
        damaged=not all(_same_file(folder, entry, found) for entry in listing),
    )


def _same_file(folder: Path, entry: Listing, found: dict[str, os.stat_result]) -> bool:
    blob = found.get(entry.digest)
    try:
        seen = os.lstat(f"{folder}/{entry.path}")
    except OSError:
        return False
    return blob is not None and (seen.st_dev, seen.st_ino) == (blob.st_dev, blob.st_ino)
