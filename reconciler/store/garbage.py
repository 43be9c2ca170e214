"""
Garbage collection: what nobody needs any more is found and deleted.

What is needed is computed from roots and never from age alone: the active generation and the kept ones, the trees and blobs of listed
models, and those of unlisted models within their grace period. The store is locked meanwhile, so no other process adds to it. What is at
no digest's place is neither needed nor garbage: it is nobody's, and stays (``observe.unexpected_paths``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core import units
from reconciler.core.errors import StoreError
from reconciler.core.lock import Lock
from reconciler.core.node import Policy
from reconciler.core.state import Generation, Record
from reconciler.store import atomic, generations, observe, serving
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing
from reconciler.store.trees import files_of

#: So many are forgotten in one transaction and deleted together: on a full disk, a larger one would want more room than is set aside.
_TOGETHER = 64
#: A partial download is deleted after so many seconds without a change: until then a later run may continue it.
PARTIAL_SECONDS = 7 * 86400.0
#: A damaged copy in cold storage is kept for so many seconds, for people to examine.
ASIDE_SECONDS = 7 * 86400.0


class Garbage(Struct, frozen=True, kw_only=True):
    """Something that may be deleted, why, and the bytes that this frees."""

    kind: str
    name: str
    bytes: int
    reason: str


class GarbageCollector:
    """Finds and deletes what nobody needs in one store, for its one writer."""

    def __init__(self, layout: Layout, ledger: Ledger, lock: Lock, policy: Policy, now: Callable[[], datetime]) -> None:
        self._layout = layout
        self._ledger = ledger
        self._lock = lock
        self._policy = policy
        self._now = now
        #: A generation of a higher number was swapped in by the run that this collector is made for.
        self._newest_before = max(generations.numbers(layout), default=0)

    def collect(self) -> None:
        """Delete what nothing needs, and forget what is missing, so that it is reported as drift only once."""
        self.free(self.garbage())
        with files.translate_errors("look through the store"):
            # What a scan finds need not be asked for name by name, which takes ten times as long.
            folders = {name for name, seen in observe.scan(self._layout.trees).items() if stat.S_ISDIR(seen.st_mode)}
            blobs = observe.scan(self._layout.blobs)
            trees = {tree for tree, _ in self._ledger.trees().values()} - folders
            names = self._ledger.verifications().keys() - blobs.keys()
            lost = [tree for tree in trees if not self._layout.tree(tree).is_dir()]
            gone = [name for name in names if not os.path.lexists(self._layout.blob(name))]
        if lost:
            self._ledger.forget_trees(lost)
        if gone:
            self._ledger.forget_blobs(gone)

    def garbage(self) -> tuple[Garbage, ...]:
        """Return everything that may be deleted, and why; changes nothing."""
        with files.translate_errors("look through the store"):
            gone = self._expired_generations()
            roots = self._roots(gone)
            stale = (self._of_generation(number) for number in gone)
            return (*stale, *self._trees(roots), *self._blobs(roots), *self._cold(), *self._aside(), *self._partials())

    def free(self, garbage: tuple[Garbage, ...], *, at_most: int | None = None) -> int:
        """Delete *garbage* in its order until *at_most* bytes are freed; return how many are."""
        freed, chosen = 0, list[Garbage]()
        for one in garbage:
            if at_most is not None and freed >= at_most:
                break
            chosen.append(one)
            freed += one.bytes
        for kind, alike in itertools.groupby(chosen, key=lambda one: one.kind):
            names = [one.name for one in alike]
            for start in range(0, len(names), _TOGETHER):
                self._delete(kind, names[start : start + _TOGETHER])
        return freed

    def _delete(self, kind: str, names: list[str]) -> None:
        """Delete all of one *kind*: first what is remembered of them, since a half-deleted tree must not count as a missing one."""
        match kind:
            case "generation":
                atomic.delete(*(self._layout.generations / name for name in names))
            case "tree":
                self._ledger.forget_trees(names)
                atomic.delete(*map(self._layout.tree, names))
            case "blob":
                self._ledger.forget_blobs(names)
                atomic.delete(*map(self._layout.blob, names))
            case "cold":
                atomic.delete(*map(self._layout.cold_blob, names))
            case "aside":
                atomic.delete(*(self._layout.cold / "blobs" / name for name in names))
            case _:
                atomic.delete(*(self._layout.staging / name for name in names))

    # -- roots -------------------------------------------------------------------------------------

    def _expired_generations(self) -> list[int]:
        """
        Return generations past the bound, and those with models that are not listed and that stopped serving a grace period ago.

        What a server was last told of is not among them: it reads from those trees until it follows.
        """
        found, current = generations.numbers(self._layout), generations.current_or_empty(self._layout).number
        in_use = {current, *(server.generation for server in serving.read(self._layout).servers)}
        kept = self._kept_steps(found)
        return [number for number in found if number not in in_use and (number not in kept or self._is_expired(number, found))]

    def _kept_steps(self, found: list[int]) -> set[int]:
        """
        Return the last sets that runs ended with, as many as are kept, of the generations *found*.

        What was swapped in since the last set but one is kept too, because readers may still be inside: all by this run, and as many of
        earlier runs, which may each have gone back to the same set.
        """
        bound, steps = self._policy.generations, generations.steps(found, self._ledger)
        last = steps[-2] if steps[1:] else 0
        passed = [number for number in found if last < number <= self._newest_before and number not in steps]
        return {*steps[-bound:], *passed[-bound:], *(number for number in found if number > self._newest_before)}

    def _is_expired(self, number: int, found: list[int]) -> bool:
        try:
            held = generations.read(self._layout, number)
        except StoreError:
            return True
        if not self._holds_unlisted(held):
            return False
        later = [other for other in found if other > number]
        ended = (self._layout.generations / str(later[0] if later else number)).stat().st_mtime
        return self._now().timestamp() - ended >= self._policy.grace_seconds

    def _holds_unlisted(self, held: Generation) -> bool:
        here = {record.id for record in self._leaving()}
        wanted = {model.recipe for model in self._lock.model if model.state == "enabled" or (model.state == "retired" and model.id in here)}
        trees = {tree for recipe, (tree, _) in self._ledger.trees().items() if recipe in wanted}
        return any(entry.tree not in trees for entry in held.entries.values())

    def _roots(self, gone: list[int]) -> tuple[set[str], set[str]]:
        """Return the trees and the blobs that are needed."""
        by_recipe = self._ledger.trees()
        records = self._ledger.records()
        archived = {model.id for model in self._lock.model if model.state == "archived" and _is_archived(records.get(model.id))}
        trees = self._trees_of(self._kept(gone), archived)
        blobs: set[str] = set()
        for model in self._lock.model:
            record = records.get(model.id)
            if model.id in archived:
                # A blob that it shared with a model that was removed since was never moved.
                blobs.update(name for name in model.blobs if digests.is_digest(name) and not self._layout.cold_blob(name).exists())
                continue
            if model.state == "retired":  # never installed anew: it is needed while it serves, and for the grace period after
                continue
            if model.state != "archived" or (record is not None and record.recipe == model.recipe):
                blobs.update(model.blobs)
                trees.update(_tree_of(model.recipe, by_recipe))
        for record in self._leaving():
            blobs.update(record.blobs)
            trees.update(_tree_of(record.recipe, by_recipe))
        blobs.update(entry.digest for tree, listing in by_recipe.values() if tree in trees for entry in listing)
        blobs.update(self._made_of(trees - {tree for tree, _ in by_recipe.values()}))
        return trees, blobs

    def _trees_of(self, kept: list[Generation], archived: set[str]) -> set[str]:
        """Return the trees that generations need. Of *archived* models only the active one's: their other trees were deleted."""
        current = generations.current_or_empty(self._layout).number
        found = [(held.number, model, entry) for held in kept for model, entry in held.entries.items()]
        return {entry.tree for number, model, entry in found if number == current or model not in archived}

    def _leaving(self) -> list[Record]:
        """Return the records of unlisted and retired models that serve or are within their grace period."""
        listed, now = {model.id for model in self._lock.model if model.state != "retired"}, self._now()
        return [
            record
            for record in self._ledger.records().values()
            if record.id not in listed
            and (record.unlisted_since is None or units.age_seconds(record.unlisted_since, now) < self._policy.grace_seconds)
        ]

    def _made_of(self, trees: set[str]) -> set[str]:
        """Return the blobs of *trees* whose listings were lost with the ledger, found by their hard links."""
        folders = [folder for folder in map(self._layout.tree, trees) if folder.is_dir()]
        links = {_identity((folder / path).lstat()) for folder in folders for path in files_of(folder)}
        return {name for name, seen in observe.scan(self._layout.blobs).items() if _identity(seen) in links} if links else set()

    def _kept(self, gone: list[int]) -> list[Generation]:
        kept: list[Generation] = []
        for number in generations.numbers(self._layout):
            with contextlib.suppress(StoreError):
                if number not in gone:
                    kept.append(generations.read(self._layout, number))
        return kept

    # -- garbage -----------------------------------------------------------------------------------

    def _of_generation(self, number: int) -> Garbage:
        return Garbage(
            kind="generation", name=str(number), bytes=0, reason="past the number that is kept, or of models that are not listed"
        )

    def _trees(self, roots: tuple[set[str], set[str]]) -> list[Garbage]:
        return [
            Garbage(kind="tree", name=name, bytes=0, reason="no listed model or kept generation needs it")
            for name, seen in sorted(observe.scan(self._layout.trees).items())
            if name not in roots[0] and stat.S_ISDIR(seen.st_mode)
        ]

    def _blobs(self, roots: tuple[set[str], set[str]]) -> list[Garbage]:
        return [
            Garbage(kind="blob", name=name, bytes=seen.st_size, reason="no listed model, kept generation or grace period needs it")
            for name, seen in sorted(observe.scan(self._layout.blobs).items())
            if name not in roots[1]
        ]

    def _cold(self) -> list[Garbage]:
        """Return blobs in cold storage whose model is not listed and past its grace period, or is installed again."""
        back = {name for model in self._lock.model if model.state != "archived" for name in model.blobs}
        needed = {*self._lock.blob, *(name for record in self._leaving() for name in record.blobs)}
        return [
            Garbage(kind="cold", name=name, bytes=seen.st_size, reason="in cold storage, and no archived model needs it")
            for name, seen in sorted(observe.scan(self._layout.cold / "blobs").items())
            if name not in needed or (name in back and self._layout.blob(name).is_file())
        ]

    def _aside(self) -> list[Garbage]:
        """Return damaged copies in cold storage that were kept long enough."""
        folder = self._layout.cold / "blobs"
        return [
            Garbage(kind="aside", name=str(path.relative_to(folder)), bytes=seen.st_size, reason="damaged, and set aside for a week")
            for path, seen in ((path, path.lstat()) for path in sorted(folder.glob("*/*/.*.damaged")))
            if self._now().timestamp() - seen.st_ctime > ASIDE_SECONDS
        ]

    def _partials(self) -> list[Garbage]:
        """Return partial downloads of blobs that are not listed, or complete, or that no run continued for long."""
        here = {name for name, seen in observe.scan(self._layout.blobs).items() if stat.S_ISREG(seen.st_mode)}
        good = {name for name, seen in self._ledger.verifications().items() if seen.size >= 0 and name in here}
        wanted = {name.replace(":", "-") for name in self._lock.blob.keys() - good}
        now = self._now().timestamp()
        return [
            Garbage(kind="partial", name=path.name, bytes=bytes_of(path), reason="a partial download that no run continues")
            for path in _folders(self._layout.staging)
            if digests.is_digest(path.name.replace("-", ":", 1))
            and (path.name not in wanted or now - path.stat().st_mtime > PARTIAL_SECONDS)
        ]


def _tree_of(recipe: str, trees: dict[str, tuple[str, tuple[Listing, ...]]]) -> tuple[str, ...]:
    return (trees[recipe][0],) if recipe in trees else ()


def _is_archived(record: Record | None) -> bool:
    return record is not None and record.state == "archived"


def _identity(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_dev, seen.st_ino


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.is_symlink())


def bytes_of(folder: Path) -> int:
    """Return the size of the plain files in *folder*, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
