"""
What is on the node, as a value.

Rules that hold here:

1. Observing changes nothing, not even a time stamp.
2. Observing does not hash. A blob counts as good while it is the same file (inode, size, modification time) that was hashed and found
   good; any other is hashed by ``apply`` before it is used. That a file is read-only does not make it good (DVC's cache trusts that, and
   is wrong); that it no longer is read-only means that somebody changed it.
3. What cannot be read is an error and never counts as damage, because damaged files are replaced.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from reconciler import files
from reconciler.core import digest
from reconciler.core.errors import StoreError
from reconciler.core.state import BlobSeen, Generation, NodeState, TreeSeen
from reconciler.store import generations, store_format
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing, Verification


def node_state(layout: Layout, ledger: Ledger) -> NodeState:
    """
    Return the state of the store at *layout*, with what *ledger* remembers.

    Raises:
        StoreError: the store is not a folder, or cannot be read.
    """
    with files.translate_errors(f"read the store {layout.root}"):
        if layout.root.exists() and not layout.root.is_dir():
            raise StoreError(f"the store {layout.root} is not a folder", hint="set [store] path to a folder, or move the file away")
        layout.check()
        store_format.check_store(layout)
        return _observe(layout, ledger)


def _observe(layout: Layout, ledger: Ledger) -> NodeState:
    active, drift = _active(layout)
    unexpected = generations.unexpected_entries(layout, active)
    active_damaged = bool(drift or unexpected)
    misdirected = generations.misdirected(layout, active)
    drift = (*drift, *(f"active: {path!r} does not belong there" for path in unexpected))
    if ledger.damaged:
        drift = (*drift, "the ledger cannot be read: bytes are hashed and models are tested again")
    drift = (*drift, *(f"active: the link of {model} does not lead to its tree" for model in misdirected))
    unfinished = bool(ledger.fact("running", bool))
    known = ledger.verifications()
    found = scan(layout.blobs)
    blobs = {name: _blob(seen, known.get(name)) for name, seen in found.items()}
    remembered = ledger.trees()
    trees = [_tree(layout, recipe, tree, listing, found) for recipe, (tree, listing) in remembered.items()]
    forgotten = {entry.tree for entry in active.entries.values()} - {tree for tree, _ in remembered.values()}
    trees += [_tree_from_disk(layout, tree, found) for tree in sorted(forgotten)]
    lost = [f"blob {name} is gone" for name in sorted(known.keys() - found.keys())]
    damaged = [f"blob {name} is not the file that was verified" for name, seen in sorted(blobs.items()) if seen.damaged]
    damaged_trees = [f"tree {seen.digest} is damaged" for seen in trees if seen.damaged]
    return NodeState(
        active=active,
        blobs=blobs,
        trees={seen.recipe: seen for seen in trees if not seen.damaged or layout.tree(seen.digest).is_dir()},
        archived={name: _blob(seen, None) for name, seen in scan(layout.cold / "blobs").items()},
        records=ledger.records(),
        passed=ledger.passed(),
        drift=(*drift, *lost, *damaged, *damaged_trees),
        misdirected=misdirected,
        active_damaged=active_damaged,
        unfinished=unfinished,
        held=ledger.fact("held", dict[str, str]) or {},
        announced=_last_announced(layout, ledger, active, unfinished=unfinished),
    )


def _last_announced(layout: Layout, ledger: Ledger, active: Generation, *, unfinished: bool) -> Generation | None:
    """Return the last generation in the history, if it is not the active one: a set is recorded when the hooks were told of it."""
    logged = ledger.history(1)
    number = logged[0].generation if logged else 0
    if number == active.number or not (logged or unfinished):  # without a history: the ledger was lost, or nothing was ever active
        return None
    try:
        return generations.read(layout, number) if number else Generation()
    except generations.DamagedGeneration:
        return None


def _active(layout: Layout) -> tuple[Generation, tuple[str, ...]]:
    """Return the active generation, and what is wrong with it: in place of a damaged one, the empty one."""
    try:
        return generations.current(layout), ()
    except generations.DamagedGeneration as error:
        return Generation(), (error.message,)


def scan(folder: Path) -> dict[str, os.stat_result]:
    """Return what is at *folder*/<algorithm>/<2 hex>/<hex>, by digest; links are not followed."""
    found = {}
    for algorithm in digest.HEX_LENGTHS:
        for prefix in _entries(folder / algorithm):
            for entry in _entries(prefix.path):
                name = f"{algorithm}:{entry.name}"
                if digest.is_digest(name) and entry.name[:2] == prefix.name:
                    try:
                        found[name] = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # deleted meanwhile by a run that holds the store
                        continue
    return found


def unexpected_paths(folder: Path) -> tuple[str, ...]:
    """Return the paths in *folder*, which holds blobs or trees, that are at no digest's place: ``scan`` does not see them."""
    return tuple(sorted(_unexpected(folder)))


def _unexpected(folder: Path) -> Iterator[str]:
    for algorithm in _entries(folder):
        if algorithm.name not in digest.HEX_LENGTHS or not algorithm.is_dir(follow_symlinks=False):
            yield algorithm.name
            continue
        for prefix in _entries(algorithm.path):
            path = f"{algorithm.name}/{prefix.name}"
            if not _PREFIX.fullmatch(prefix.name) or not prefix.is_dir(follow_symlinks=False):
                yield path
                continue
            for entry in _entries(prefix.path):
                is_placed = digest.is_digest(f"{algorithm.name}:{entry.name}") and entry.name[:2] == prefix.name
                if not is_placed and not _OWN.fullmatch(entry.name):
                    yield f"{path}/{entry.name}"


_PREFIX = re.compile("[0-9a-f]{2}")
#: Copies in cold storage that are being made, or were set aside as damaged.
_OWN = re.compile(r"\.[0-9a-f]+\.(tmp|damaged)")


def _entries(path: Path | str | int) -> list[os.DirEntry[str]]:
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
    same = known is not None and (seen.st_ino, seen.st_mtime_ns, stat.S_IMODE(seen.st_mode)) == (known.inode, known.mtime_ns, 0o444)
    return BlobSeen(size=seen.st_size, verified_at=known.verified_at if known is not None and same else None)


def _tree(layout: Layout, recipe: str, name: str, listing: tuple[Listing, ...], found: dict[str, os.stat_result]) -> TreeSeen:
    return TreeSeen(
        digest=name,
        recipe=recipe,
        blobs=tuple(sorted({entry.digest for entry in listing})),
        bytes=sum(entry.size for entry in listing),
        damaged=not _is_intact(f"{layout.root}/{layout.tree_from_root(name)}", listing, found),
    )


def _tree_from_disk(layout: Layout, name: str, found: dict[str, os.stat_result]) -> TreeSeen:
    """
    Return an active tree that is missing in a lost ledger, as its hard links show it, so that its blobs can be hashed again.

    Its recipe is unknown; its own digest stands there, which is no model's recipe.
    """
    from reconciler.store.trees import digest_of  # it imports all that makes trees, which other plans do not need

    names = {(blob.st_dev, blob.st_ino): digest for digest, blob in found.items()}
    folder, listing = layout.tree(name), list[Listing]()
    for path in sorted(_paths(str(folder), str(folder))):
        try:
            seen = os.lstat(folder / path)
        except FileNotFoundError:  # deleted meanwhile by a run that holds the store
            continue
        if not stat.S_ISDIR(seen.st_mode):
            listing.append(Listing(path=path, digest=names.get((seen.st_dev, seen.st_ino), ""), size=seen.st_size))
    return TreeSeen(
        digest=name,
        recipe=name,
        blobs=tuple(sorted({entry.digest for entry in listing if entry.digest})),
        bytes=sum(entry.size for entry in listing),
        damaged=folder.is_symlink() or digest_of(tuple(listing)) != name,
    )


def _is_intact(folder: str, listing: tuple[Listing, ...], found: dict[str, os.stat_result]) -> bool:
    """Return whether *folder* holds hard links to the blobs of *listing*, nothing else, and no symbolic link for a folder."""
    try:
        handle = os.open(folder, _FOLDER)  # half the cost of opening each file by its long path
    except OSError as error:
        if error.errno in _NO_FOLDER:
            return False
        raise
    try:
        if not all(_same_file(handle, entry, found) for entry in listing):
            return False
        paths = {entry.path for entry in listing}
        above = set[str]().union(*(_parents(path) for path in paths if "/" in path))
        return _paths(folder, handle) == paths | above if above else set(os.listdir(handle)) == paths  # noqa: PTH208  of a descriptor
    except FileNotFoundError:  # deleted meanwhile by a run that holds the store
        return False
    finally:
        os.close(handle)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def _parents(path: str) -> set[str]:
    """Return the folders above the relative *path*."""
    parts = path.split("/")[:-1]
    return {"/".join(parts[: end + 1]) for end in range(len(parts))}


def _paths(folder: str, handle: int | str, prefix: str = "") -> set[str]:
    """Return the paths of everything in *folder*, whose descriptor or name is *handle*; links are listed and not followed."""
    found: set[str] = set()
    for entry in _entries(f"{folder}/{prefix}" if prefix else handle):
        found.add(prefix + entry.name)
        if entry.is_dir(follow_symlinks=False):
            found |= _paths(folder, handle, f"{prefix}{entry.name}/")
    return found


def _same_file(folder: int, entry: Listing, found: dict[str, os.stat_result]) -> bool:
    blob = found.get(entry.digest)
    try:
        seen = os.lstat(entry.path, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return blob is not None and (seen.st_dev, seen.st_ino) == (blob.st_dev, blob.st_ino)


# -- what is partly here -----------------------------------------------------------------------------


def partial_bytes(layout: Layout, sizes: Mapping[str, int]) -> dict[str, int]:
    """
    Return how many bytes of each blob of *sizes* lie in unfinished downloads, where there are any.

    It is what the file system has of them. A run continues from what it can prove, which may be a little less.
    """
    try:
        names = os.listdir(layout.staging)  # noqa: PTH208  a plan of a thousand models makes no paths for what it does not need
    except OSError:
        return {}
    found = {}
    for name in names:
        blob = name.replace("-", ":", 1)
        if digest.is_digest(blob) and blob in sizes and (held := _held(layout, name)):
            found[blob] = min(held, sizes[blob])
    return found


def _held(layout: Layout, name: str) -> int:
    most = 0
    try:
        with os.scandir(layout.staging / name) as attempts:
            for attempt in attempts:
                most = max(most, os.lstat(os.path.join(attempt.path, "data")).st_blocks * 512)  # noqa: PTH118  as above
    except OSError:  # it is finished or deleted meanwhile
        return most
    return most


def bytes_here(state: NodeState, sizes: Mapping[str, int], partial: Mapping[str, int]) -> int:
    """Return how many bytes of the blobs of *sizes* are on the node; damaged ones do not count."""
    total = 0
    for name in sizes:
        seen = state.blobs.get(name) or state.archived.get(name)
        total += sizes[name] if seen and not seen.damaged else partial.get(name, 0)
    return total
