"""
What is on a node, as a value: what was observed of the store and what the ledger remembers of it.

Nothing here reads a disk; ``store.observe`` makes these values. Which version a bare name leads to (SPEC 7) depends on the active set
and the lock alone, so that every node with the same ones gives the same answer (``with_current``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from msgspec import Struct, structs

from reconciler.core import digest
from reconciler.core.snapshot import Runtime
from reconciler.core.vocabulary import Task

#: The network's five states, and ``absent``: listed, nothing on the node yet.
ModelState = Literal["absent", "pending", "active", "inactive", "failed", "archived"]


class BlobSeen(Struct, frozen=True, kw_only=True):
    """A blob that has its name, and whether its bytes are known to be good."""

    size: int
    #: When its bytes were last hashed and found good, for the very file that is there now; None: not known, it must be hashed.
    verified_at: datetime | None = None
    #: Its bytes were hashed and found to be others, or it is no plain file of the signed size.
    damaged: bool = False


class TreeSeen(Struct, frozen=True, kw_only=True):
    """A model's folder: its digest, what it was made from and which blobs it is made of."""

    digest: str
    recipe: str
    blobs: tuple[str, ...]
    bytes: int
    #: A file of it is missing, is another file than its blob, or one too many is there.
    damaged: bool = False


class Passed(Struct, frozen=True, kw_only=True):
    """A test job that passed: for which tree and job, on what, and when."""

    tree: str
    smoke: str
    engine: str
    engine_version: str
    device: str
    at: datetime
    #: Files of the tree that the test loaded, and those that it could not, sorted.
    exercised: tuple[str, ...] = ()
    not_exercised: tuple[str, ...] = ()
    load_seconds: float = 0.0
    tokens_per_second: float = 0.0
    #: What really ran it, as its report says: a node with a GPU may test on the CPU. Empty: from before this was kept.
    ran_on: str = ""
    gpu_layers: int = 0
    #: As in ``TestReport``.
    compared: int = 0


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the ledger remembers of a model."""

    id: str
    state: ModelState
    #: The recipe that *state* speaks of.
    recipe: str = ""
    #: The blobs that the recipe is made from.
    blobs: tuple[str, ...] = ()
    reason: str = ""
    attempts: int = 0
    last_error: str = ""
    since: datetime | None = None
    #: Since when no snapshot lists it.
    unlisted_since: datetime | None = None
    #: When the operator's ``healthy`` hook said no to the node with it, where that is why it failed.
    unhealthy_at: datetime | None = None


class ActiveModel(Struct, frozen=True, kw_only=True):
    """A model that is eligible for job routing, as ``active/index.json`` names it."""

    id: str  #: Model id.
    tasks: tuple[Task, ...]  #: What it is for.
    runtime: Runtime  #: The engine that it was tested with.
    #: The model's folder, relative to ``active``.
    path: str
    entrypoint: str  #: The file that the engine is given, relative to `path`.
    bytes: int  #: Size of its files.
    tree: str  #: Digest of its tree.
    #: Whether ``active/names/<name>`` leads to it.
    current: bool = False


class Generation(Struct, frozen=True, kw_only=True):
    """A numbered set of active models, by id; number 0 is the empty set of a new store."""

    number: int = 0
    entries: dict[str, ActiveModel] = {}

    def tree_of(self, model: str) -> str | None:
        """Return the tree under which *model* is active, or None."""
        entry = self.entries.get(model)
        return entry.tree if entry else None

    @property
    def digest(self) -> str:
        """The SHA-256 over the sorted (id, tree) pairs: two nodes with the same one serve the same bytes."""
        return digest.of("".join(f"{model} {self.entries[model].tree}\n" for model in sorted(self.entries)).encode())


class ServerState(Struct, frozen=True, kw_only=True):
    """What a configured server was last told of, as ``serving.json`` says it (SPEC 7)."""

    name: str  #: As in the settings.
    kind: str  #: As in the settings.
    generation: int  #: The generation that it serves, as far as is known; 0: none yet.
    at: datetime | None = None  #: When it took that generation.
    #: Why it does not have the active generation; empty if it has.
    error: str = ""


class NodeState(Struct, frozen=True, kw_only=True, dict=True):
    """Everything that a plan is computed against."""

    active: Generation = Generation()
    blobs: dict[str, BlobSeen] = {}
    #: Trees by recipe.
    trees: dict[str, TreeSeen] = {}
    #: Digests of blobs that lie in cold storage.
    archived: dict[str, BlobSeen] = {}
    records: dict[str, Record] = {}
    #: The last passed test by model id.
    passed: dict[str, Passed] = {}
    #: Ways in which the store differs from what the last run left.
    drift: tuple[str, ...] = ()
    #: Active models whose link in the active generation does not lead to their tree.
    misdirected: tuple[str, ...] = ()
    #: ``active`` leads to no complete generation, or to one that holds more than its index says.
    active_damaged: bool = False
    #: A run was interrupted; the next one finishes it.
    unfinished: bool = False
    #: What a rollback took back, and is not brought again: recipes by model id.
    held: dict[str, str] = {}
    #: The last generation that the servers and hooks were told of, where an interrupted run swapped in another one after it.
    announced: Generation | None = None

    @functools.cached_property
    def newest_passes(self) -> dict[tuple[str, str], Passed]:
        """Return the newest passed test of each (tree, test job): a pass counts for what was tested, under whatever id."""
        return {(passed.tree, passed.smoke): passed for passed in sorted(self.passed.values(), key=lambda passed: passed.at)}

    @functools.cached_property
    def damaged_trees(self) -> frozenset[str]:
        """Return the digests of the trees that were observed not to be intact; one of unknown files is not said to be."""
        trees, blobs = self.trees.values(), self.blobs
        return frozenset(tree.digest for tree in trees if tree.damaged or any(is_damaged(name, blobs) for name in tree.blobs))


def is_damaged(name: str, blobs: Mapping[str, BlobSeen]) -> bool:
    """Return whether the blob *name* is not among *blobs*, or was observed to be damaged."""
    seen = blobs.get(name)
    return seen is None or seen.damaged


_RUNS = re.compile(r"(\d+)")


def with_current(
    entries: Mapping[str, ActiveModel], chosen: Mapping[str, str], replacements: Mapping[str, frozenset[str]]
) -> dict[str, ActiveModel]:
    """
    Return *entries* with ``current`` set on one version of each name, and on no other.

    It is the version that the snapshot *chosen* for the name, if that is active; else, of the active versions that no other active one
    replaces, the highest in natural order.
    """
    by_name: dict[str, list[str]] = {}
    for model in entries:
        by_name.setdefault(model.partition(":")[0], []).append(model)
    current = {
        models[0] if len(models) == 1 else _current(sorted(models), chosen.get(name), entries, replacements)
        for name, models in by_name.items()
    }
    return {
        model: entry if entry.current == (model in current) else structs.replace(entry, current=model in current)
        for model, entry in entries.items()
    }


def _current(models: list[str], version: str | None, entries: Mapping[str, ActiveModel], replacements: Mapping[str, frozenset[str]]) -> str:
    for model in models:
        if model.partition(":")[2] == version:
            return model
    standing = [model for model in models if not replacements.get(model, frozenset()) & entries.keys()]
    return max(standing or models, key=natural)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a key that orders numbers in a text by their value: ``v10`` after ``v9``."""
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in _RUNS.split(text)]
