"""
Generations: numbered folders of links, of which one is active.

Rules that hold here:

1. A generation is complete and synced before ``active`` leads to it; the swap is one rename of one link.
2. Links are relative, so that a store can be moved or mounted elsewhere.
3. Earlier generations stay, bounded, so that a reader in the middle of a path and a rollback find what they look for.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler.errors import StoreError
from reconciler.state import ActiveModel, Generation
from reconciler.store import durable
from reconciler.store.layout import Layout


class Index(Struct, frozen=True, kw_only=True):
    """What ``index.json`` says: the models eligible for job routing."""

    schema: int = 1
    generation: int
    models: tuple[ActiveModel, ...]


class Generations:
    """The generations of one store, for its one writer."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def current(self) -> Generation:
        """Return the active generation."""
        return current(self._layout)

    def swap(self, entries: Mapping[str, ActiveModel]) -> Generation:
        """Make a generation of *entries* and let ``active`` lead to it; return it."""
        number = max([*numbers(self._layout), self.current().number]) + 1 if self._layout.generations.is_dir() else 1
        made = Generation(number=number, entries={model: entries[model] for model in sorted(entries)})
        self._write(made)
        durable.symlink(f"generations/{number}", self._layout.active)
        return made

    def reactivate(self, number: int) -> Generation:
        """Let ``active`` lead to an earlier generation again; return it."""
        found = read(self._layout, number)
        durable.symlink(f"generations/{number}", self._layout.active)
        return found

    def prune(self, keep: int, expired: Callable[[Generation], bool]) -> tuple[int, ...]:
        """Delete all but the newest *keep* generations, and those that are *expired*; never the active one. Return their numbers."""
        now = self.current().number
        found = numbers(self._layout)
        gone = [number for number in found if number != now and (number not in found[-keep:] or expired(read(self._layout, number)))]
        for number in gone:
            durable.delete(self._layout.generations / str(number))
        return tuple(gone)

    def _write(self, made: Generation) -> None:
        folder = self._layout.generations / f".{made.number}.{secrets.token_hex(6)}.tmp"
        durable.make_folder(folder)
        try:
            for entry in made.entries.values():
                self._link(folder, entry)
            index = Index(generation=made.number, models=tuple(made.entries.values()))
            durable.write(folder / "index.json", msgspec.json.encode(index), 0o444)
            durable.sync_tree(folder)
            durable.rename(folder, self._layout.generations / str(made.number))
        finally:
            durable.delete(folder)

    def _link(self, folder: Path, entry: ActiveModel) -> None:
        path = folder / entry.path
        durable.make_folder(path.parent)
        tree = self._layout.tree(entry.tree).relative_to(self._layout.root)
        path.symlink_to(Path("../../../..", tree))  # of a folder that nobody sees yet; the swap syncs and names it


def path_of(model: str) -> str:
    """Return where *model*'s folder lies, relative to ``active``."""
    name, _, version = model.partition(":")
    return f"models/{name}/{version}"


def current(layout: Layout) -> Generation:
    """
    Return the generation that ``active`` leads to; the empty one where there is none yet.

    Raises:
        StoreError: ``active`` is no link to a generation, or that cannot be read.
    """
    try:
        target = layout.active.readlink()
    except FileNotFoundError:
        return Generation()
    except OSError as error:
        raise StoreError(f"{layout.active} is not a link: {error.strerror}", hint=_ACTIVE_HINT) from None
    if target.parent != Path("generations") or not target.name.isascii() or not target.name.isdecimal():
        raise StoreError(f"{layout.active} leads to {str(target)[:100]!r}, which is no generation", hint=_ACTIVE_HINT)
    return read(layout, int(target.name))


_ACTIVE_HINT = "run `reconcile rollback` to return to an earlier generation, or remove the link and run `reconcile apply`"


def read(layout: Layout, number: int) -> Generation:
    """
    Return the generation *number*.

    Raises:
        StoreError: there is none, or its index is damaged.
    """
    path = layout.generations / str(number) / "index.json"
    try:
        index = msgspec.json.decode(path.read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(f"generation {number} cannot be read: {error}", hint=_ACTIVE_HINT) from None
    return Generation(number=number, entries={entry.id: entry for entry in index.models})


def numbers(layout: Layout) -> list[int]:
    """Return the numbers of the generations that there are, in order."""
    if not layout.generations.is_dir():
        return []
    return sorted(int(path.name) for path in layout.generations.iterdir() if path.name.isascii() and path.name.isdecimal())
