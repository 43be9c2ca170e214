"""
Generations: numbered folders of links to trees, of which one is active.

Rules that hold here:

1. A generation is complete and synced before ``active`` leads to it; the swap is one rename of one link.
2. Links are relative, so that a store can be moved or mounted elsewhere.
3. Earlier generations stay, in a bounded number, for readers that are inside one and for rollbacks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core.errors import StoreError
from reconciler.core.state import ActiveModel, Generation
from reconciler.store import atomic, index
from reconciler.store.index import Describe
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger


class _Entries(Struct, frozen=True, kw_only=True):
    """What of an index makes the generation; the rest describes it (``store.index``)."""

    generation: int
    models: tuple[ActiveModel, ...]


class Generations:
    """The generations of one store, for its one writer; *describe* makes the index of each."""

    def __init__(self, layout: Layout, describe: Describe | None = None) -> None:
        self._layout = layout
        self._describe = describe

    def current(self) -> Generation:
        """Return the active generation; the empty one where it is damaged."""
        return current_or_empty(self._layout)

    def swap(self, entries: Mapping[str, ActiveModel]) -> Generation:
        """Make a generation of *entries*, point ``active`` to it, and return it."""
        number = max([0, *numbers(self._layout)]) + 1
        made = Generation(number=number, entries={model: entries[model] for model in sorted(entries)})
        with files.translate_errors(f"make generation {number}"):
            self._write(made)
            self._point_active_to(number)
        return made

    def reactivate(self, number: int) -> Generation:
        """Point ``active`` to an earlier generation again, and return it."""
        found = read(self._layout, number)
        with files.translate_errors(f"return to generation {number}"):
            if self._describe is not None:
                index.write(self._layout, self._describe(found))  # before the swap: it says when the set became active
            self._point_active_to(number)
        return found

    def _point_active_to(self, number: int) -> None:
        active = self._layout.active
        if active.is_dir() and not active.is_symlink():  # made by a copy of the store that followed links; a rename cannot replace it
            aside = active.with_name("active.damaged")
            atomic.delete(aside)
            atomic.rename(active, aside)
        atomic.symlink(f"generations/{number}", active)

    def _write(self, made: Generation) -> None:
        folder = self._layout.generations / f".{made.number}.{os.urandom(6).hex()}.tmp"
        atomic.make_folder(folder)
        try:
            for entry in made.entries.values():
                self._link(folder, entry)
            if any(entry.current for entry in made.entries.values()):
                atomic.make_folder(folder / "names")
            for path, target in _names(made).items():
                atomic.new_symlink(target, folder / path)
            atomic.write(folder / "index.json", index.encode((self._describe or index.bare)(made)), 0o444)
            atomic.sync_tree(folder)
            atomic.rename(folder, self._layout.generations / str(made.number))
        finally:
            atomic.delete(folder)

    def _link(self, folder: Path, entry: ActiveModel) -> None:
        path = folder / entry.path
        atomic.make_folder(path.parent)
        atomic.new_symlink(target_of(self._layout, entry), path)  # in a temporary folder, which is synced and renamed afterwards


def _names(made: Generation) -> dict[str, str]:
    """Return the links of the stable names, by their paths in a generation, with what they say."""
    return {f"names/{model.partition(':')[0]}": f"../{entry.path}" for model, entry in made.entries.items() if entry.current}


def target_of(layout: Layout, entry: ActiveModel) -> str:
    """Return the target of *entry*'s link in a generation: the relative path to its tree."""
    return f"../../../../{layout.tree_from_root(entry.tree)}"


def path_of(model: str) -> str:
    """Return where *model*'s folder lies, relative to ``active``."""
    name, _, version = model.partition(":")
    return f"models/{name}/{version}"


def current(layout: Layout) -> Generation:
    """
    Return the generation that ``active`` points to; the empty one where there is none yet.

    Raises:
        DamagedGeneration: ``active`` does not point to a whole generation.
        StoreError: it cannot be read.
    """
    try:
        target = layout.active.readlink()
    except FileNotFoundError:
        return Generation()
    except OSError as error:
        kind = DamagedGeneration if error.errno == errno.EINVAL else StoreError
        raise kind(f"active cannot be read as a link: {error.strerror}") from None
    if target.parent != Path("generations") or not target.name.isascii() or not target.name.isdecimal():
        raise DamagedGeneration(f"active points to {str(target)[:100]!r}, which is no generation")
    return read(layout, int(target.name))


class DamagedGeneration(StoreError):
    """``active`` or a generation is not what was written. It counts as missing; an unreadable disk is another error, and does not."""

    hint = "run `reconcile apply`: it makes a new one"


def current_or_empty(layout: Layout) -> Generation:
    """Return the active generation; the empty one where there is none yet, or where it is damaged."""
    try:
        return current(layout)
    except DamagedGeneration:
        return Generation()


def misdirected(layout: Layout, found: Generation) -> tuple[str, ...]:
    """Return the models of a generation whose link does not point to their tree."""
    folder = f"{layout.generations}/{found.number}"
    return tuple(model for model, entry in found.entries.items() if not _links_to(f"{folder}/{entry.path}", target_of(layout, entry)))


def unexpected_entries(layout: Layout, found: Generation) -> tuple[str, ...]:
    """Return the paths in a generation that its index does not list, and links in the place of its folders or its index."""
    if not found.number:
        return ()
    folder = f"{layout.generations}/{found.number}"
    if os.path.islink(folder):  # noqa: PTH114  text, as below
        return (".",)
    named = _names(found)
    links = {*(entry.path for entry in found.entries.values()), *named}
    wrong = [path for path, target in named.items() if not _links_to(f"{folder}/{path}", target)]
    return tuple(sorted([*wrong, *_unexpected(folder, "", links, {"models", *(path.rpartition("/")[0] for path in links)})]))


def _unexpected(folder: str, prefix: str, links: set[str], folders: set[str]) -> Iterator[str]:
    try:
        with os.scandir(f"{folder}/{prefix}") as found:
            entries = list(found)
    except OSError as error:
        if error.errno not in _MISSING:  # a run that holds the store may delete it meanwhile
            raise
        return
    for entry in entries:
        path = prefix + entry.name
        if path in links:
            continue
        if path in folders and entry.is_dir(follow_symlinks=False):
            yield from _unexpected(folder, f"{path}/", links, folders)
        elif not (path == "index.json" and entry.is_file(follow_symlinks=False)):
            yield path


def _links_to(path: str, target: str) -> bool:
    try:
        return os.readlink(path) == target  # noqa: PTH115  Path tidies what a link says; this is a comparison of bytes
    except OSError as error:
        if error.errno not in {*_MISSING, errno.EINVAL}:
            raise
        return False


_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def read(layout: Layout, number: int) -> Generation:
    """
    Return the generation *number*.

    Raises:
        DamagedGeneration: there is none, or its index is not what was written.
        StoreError: the disk refused.
    """
    path = layout.generations / str(number) / "index.json"
    try:
        found = msgspec.json.decode(atomic.read(path), type=_Entries)
    except OSError as error:
        kind = DamagedGeneration if error.errno in _MISSING else StoreError
        raise kind(f"active: generation {number} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise DamagedGeneration(f"active: the index of generation {number} is damaged: {error}") from None
    if found.generation != number or any(entry.path != path_of(entry.id) or ".." in entry.path for entry in found.models):
        raise DamagedGeneration(f"active: the index of generation {number} belongs to another")
    return Generation(number=number, entries={entry.id: entry for entry in found.models})


def steps(found: Iterable[int], ledger: Ledger) -> list[int]:
    """
    Return those of the generations *found* with which a run ended, in order: it announced them, and the node was healthy with them.

    Of those before the history begins nothing is known, and each counts: the ledger may have been lost.
    """
    announced = {change.generation for change in ledger.history()}
    return sorted(number for number in found if number in announced or number < min(announced, default=number + 1))


def numbers(layout: Layout) -> list[int]:
    """Return the numbers of the existing generations, in order."""
    try:
        names = [path.name for path in layout.generations.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot read {layout.generations}: {error.strerror}") from error
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())
