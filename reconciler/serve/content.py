"""
One configured server, and what it is to read, as values; and writing it.

Rules that hold here:

1. Nothing is written that has its bytes already: some servers load a model once more for each change that they see.
2. Each file appears whole, by one rename. In a folder, what names others is written after them and deleted before them.
3. Of a folder, only what was written here is replaced or deleted: ``.NAME.reconcile.json`` beside it lists that. A file of somebody else
   in the way is an error, except where its name is the digest of its bytes (``shared``): then it is what would be written.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core.errors import ServeFailed
from reconciler.store import atomic


class Entry(Struct, frozen=True, kw_only=True):
    """A file with *data*, or a link to the absolute path *target*; *path* is relative, empty for the server's one file."""

    path: str = ""
    data: bytes = b""
    target: str = ""
    #: The name is the digest of the bytes.
    shared: bool = False


class Content(Struct, frozen=True, kw_only=True):
    """All that a server is to read, in the order of writing."""

    entries: tuple[Entry, ...] = ()
    #: What the server gets with its reload: the index of its models.
    given: bytes = b""
    #: The names by which clients may ask for models, in the server's own words; for servers that list them.
    names: tuple[str, ...] = ()
    #: Why models that it should get are left out: what it reads cannot say them.
    left_out: tuple[str, ...] = ()


def is_written(content: Content, root: Path) -> bool:
    """Return whether *content* lies at *root*, and nothing else that was written here."""
    try:
        stale = {*_listed(root)} - {entry.path for entry in content.entries} if root.is_dir() else set()
        return not stale and all(_is_there(entry, root) for entry in content.entries)
    except OSError:
        return False


def write(content: Content, root: Path) -> None:
    """
    Write *content* at *root*, a file or a folder.

    Raises:
        ServeFailed: a file of somebody else is in the way.
        StoreError: the disk refused.
    """
    with files.translate_errors(f"write for a server at {root}", root):
        if any(entry.path for entry in content.entries) or root.is_dir():
            _write_folder(content, root)
            return
        for entry in content.entries:
            if not _is_there(entry, root):
                atomic.make_folder(root.parent)
                atomic.clear_interrupted(root)
                atomic.write(root, entry.data)


def _write_folder(content: Content, root: Path) -> None:
    atomic.make_folder(root)
    before = _listed(root)
    wanted = tuple(entry for entry in content.entries if not _is_of_others(entry, root, before))
    paths = tuple(entry.path for entry in wanted)
    for place in (list_of(root), *(root / path for path in {*paths, *before})):
        atomic.clear_interrupted(place)
    # Before any of it is written: an interrupted run leaves nothing unlisted.
    _write_list(root, (*paths, *(path for path in before if path not in paths)))
    for entry in wanted:
        if not _is_there(entry, root):
            _write_entry(entry, root)
    for path in reversed(before):
        if path not in paths:
            _delete(root, path)
    _write_list(root, paths)


def _is_of_others(entry: Entry, root: Path, ours: tuple[str, ...]) -> bool:
    """Return whether somebody else keeps the same bytes at *entry*'s place; raise where they keep others there."""
    place = root / entry.path
    if entry.path in ours or not os.path.lexists(place):
        return False
    if entry.shared or _is_there(entry, root):
        return entry.shared
    raise ServeFailed(
        f"{place} is there already, and was not written by reconcile",
        hint="move it away, or give the server another path in its [[serve]] table",
    )


def _is_there(entry: Entry, root: Path) -> bool:
    place = root / entry.path if entry.path else root
    try:
        if entry.target:
            return os.readlink(place) == entry.target  # noqa: PTH115  a comparison of bytes
        return stat.S_ISREG(place.lstat().st_mode) and atomic.read(place) == entry.data
    except OSError:
        return False


def _write_entry(entry: Entry, root: Path) -> None:
    place = root / entry.path
    atomic.make_folder(place.parent)
    if entry.target:
        atomic.symlink(entry.target, place)
    else:
        atomic.write(place, entry.data)


def _delete(root: Path, path: str) -> None:
    """Delete what was written at *path*, and the folders above it that are empty then."""
    atomic.delete(root / path)
    for parent in (root / path).parents:
        if parent == root or not parent.is_dir() or any(parent.iterdir()):
            break
        atomic.delete(parent)


def list_of(root: Path) -> Path:
    """Return the file that lists what was written in the folder *root*; beside it, because servers look at all that is in it."""
    return root.with_name(f".{root.name}.reconcile.json")


def _listed(root: Path) -> tuple[str, ...]:
    """Return the paths that were written in the folder *root*; none where its list is missing or damaged."""
    try:
        found = msgspec.json.decode(atomic.read(list_of(root)), type=tuple[str, ...])
    except (OSError, msgspec.DecodeError):
        return ()
    return tuple(path for path in found if path and not path.startswith("/") and ".." not in path.split("/"))


def _write_list(root: Path, paths: tuple[str, ...]) -> None:
    data = msgspec.json.encode(paths)
    try:
        same = atomic.read(list_of(root)) == data
    except FileNotFoundError:
        same = False
    if not same:
        atomic.write(list_of(root), data)


class Server(Struct, frozen=True, kw_only=True):
    """A server that follows the active set."""

    #: Unique on this node.
    name: str
    kind: str
    #: The file or the folder that is written for it; None: nothing is.
    path: Path | None = None
    #: How it is told: a URL, or a command; empty: by the change of its file alone.
    reload: str | tuple[str, ...] = ""
    #: Ids, names or tasks (``task:chat``) of the models that it gets; empty: all.
    models: tuple[str, ...] = ()
    #: Passed on to what is written for it.
    options: dict[str, Any] = {}
    #: How long a reload that would unload a busy model waits for it at most.
    drain_seconds: float = 300.0
    #: Where its command runs.
    folder: Path = Path()
