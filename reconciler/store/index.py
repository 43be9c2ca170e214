"""
``active/index.json``: the models eligible for job routing, with all that a router asks about them (SPEC 7).

Rules that hold here:

1. A generation is what its links and the fields of ``ActiveModel`` say. The rest of the index describes it, is made from what the node
   knows when the index is written, and decides nothing: no plan reads it.
2. What a description needs of the files themselves (their headers) is read once for each tree, and taken from the index before after
   that: trees never change.
3. The active index is written anew, by one rename, when its description changes without a swap: the snapshot's expiry was extended, a
   model was tested again. A reader has the old index or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.state import ActiveModel, Generation, Passed
from reconciler.store import atomic, model_facts
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Listing
from reconciler.store.model_facts import ModelFacts


class IndexSnapshot(Struct, frozen=True, kw_only=True):
    """The snapshot that the active set follows."""

    version: int  #: Its version.
    digest: str  #: SHA-256 of its payload.
    expires_at: datetime  #: Until when it may be acted on.


class IndexFile(Struct, frozen=True, kw_only=True):
    """One file of a model."""

    path: str  #: Relative to the model's folder.
    role: str  #: What it is for.
    digest: str  #: Digest of its bytes.
    size: int  #: Its size in bytes.
    tested: bool  #: Whether the model's last passed test loaded it.


class IndexNeeds(Struct, frozen=True, kw_only=True):
    """What a model needs."""

    gpu_memory: int = 0  #: Bytes of memory on the GPU; 0: none.
    memory: int = 0  #: Bytes of main memory; 0: none.


class IndexTest(Struct, frozen=True, kw_only=True):
    """What a model's last passed test measured on this node."""

    at: datetime  #: When it passed.
    device: str  #: On what.
    engine: str  #: With which engine.
    engine_version: str  #: The engine's version.
    tokens_per_second: float  #: Tokens that it generated a second; 0: none.
    load_seconds: float  #: Time until the model was loaded.


class IndexModel(ActiveModel, frozen=True, kw_only=True):
    """A model that is eligible for job routing; null where a file does not say it."""

    name: str = ""  #: The id without its version.
    version: str = ""  #: The id's version.
    #: The model's folder, relative to the store. No swap changes what it leads to.
    resolved: str = ""
    files: tuple[IndexFile, ...] = ()  #: Its files, sorted by path.
    context_length: int | None = None  #: Tokens of context that it was trained with.
    quantization: str | None = None  #: The type of its weights, as in ``Q4_K_M``.
    parameters: int | None = None  #: How many weights it has.
    architecture: str | None = None  #: Its architecture.
    embedding_length: int | None = None  #: Components of its hidden state, and of its embeddings.
    chat_template: bool = False  #: Whether its files hold a chat template.
    needs: IndexNeeds = IndexNeeds()  #: What it needs, as the network says.
    tested: IndexTest | None = None  #: Its last passed test; null where none is known.


class Index(Struct, frozen=True, kw_only=True):
    """The content of ``index.json``."""

    schema: int = 1  #: Version of this form.
    generation: int  #: Number of the generation.
    network: str = ""  #: The network's name.
    snapshot: IndexSnapshot | None = None  #: The snapshot that the set follows.
    lock: str = ""  #: Digest of the lock.
    #: SHA-256 over the sorted (id, tree) pairs: two nodes with the same one serve the same bytes.
    active_digest: str = ""
    node: str = ""  #: The node's id; empty where it has none.
    swapped_at: datetime | None = None  #: When this set became active.
    models: tuple[IndexModel, ...]  #: Sorted by model id.


#: Makes the index of a generation.
Describe = Callable[[Generation], Index]


def bare(made: Generation) -> Index:
    """Return the index of *made* with nothing but what the generation itself says."""
    models = tuple(_named(entry, made_from=IndexModel) for entry in made.entries.values())
    return Index(generation=made.number, active_digest=made.digest, models=models)


def _named(entry: ActiveModel, *, made_from: type[IndexModel]) -> IndexModel:
    name, _, version = entry.id.partition(":")
    own = {field: getattr(entry, field) for field in ActiveModel.__struct_fields__}
    return made_from(**own, name=name, version=version)


def read(layout: Layout, number: int) -> Index | None:
    """Return the index of the generation *number*; None where it is not there, or damaged."""
    try:
        return msgspec.json.decode(atomic.read(layout.generations / str(number) / "index.json"), type=Index)
    except (OSError, msgspec.DecodeError):
        return None


class Describer:
    """Makes indexes from what *ledger* and *lock* know; *node* is the node's id."""

    def __init__(
        self, layout: Layout, ledger: Ledger, lock: Lock, lock_digest: str, *, now: Callable[[], datetime], node: str = ""
    ) -> None:
        self._layout = layout
        self._ledger = ledger
        self._lock = lock
        self._lock_digest = lock_digest
        self._now = now
        self._node = node
        self._listed = {model.id: model for model in lock.model}
        self._facts: dict[str, ModelFacts] = {}

    def __call__(self, made: Generation) -> Index:
        """Return the index of *made*, which becomes active now."""
        if not self._facts:
            self._remember_facts(self._read_active())
        return self._describe(made, self._now())

    def refresh(self, active: Generation) -> Index | None:
        """
        Write the index of the *active* generation anew where what it says has changed; return it, or None where there is none to renew.

        Raises:
            StoreError: the disk refused.
        """
        before = read(self._layout, active.number)
        if before is None:  # there is none yet, or it is damaged: the next swap makes one
            return None
        if not self._facts:
            self._remember_facts(before)
        after = self._describe(active, before.swapped_at or self._now())
        if after != before:
            write(self._layout, after)
        return after

    def _describe(self, made: Generation, swapped_at: datetime) -> Index:
        passed, listings = self._ledger.passed(), dict(self._ledger.trees().values())
        snapshot = self._lock.snapshot
        return Index(
            generation=made.number,
            network=self._lock.network,
            snapshot=IndexSnapshot(version=snapshot.version, digest=snapshot.digest, expires_at=snapshot.expires_at),
            lock=self._lock_digest,
            active_digest=made.digest,
            node=self._node,
            swapped_at=swapped_at,
            models=tuple(self._model(entry, passed, listings.get(entry.tree, ())) for entry in made.entries.values()),
        )

    def _remember_facts(self, known: Index | None) -> None:
        """Take what is known of trees from an index: reading a thousand headers at each swap would take minutes."""
        for model in known.models if known else ():
            if model.files:
                self._facts[_content(model)] = _facts_of(model)

    def _read_active(self) -> Index | None:
        try:
            number = int(os.readlink(self._layout.active).rpartition("/")[2])  # noqa: PTH115  a text is wanted
        except (OSError, ValueError):
            return None
        return read(self._layout, number)

    def _model(self, entry: ActiveModel, passed: dict[str, Passed], listing: tuple[Listing, ...]) -> IndexModel:
        facts = self._facts.get(_content(entry))
        if facts is None and listing:
            facts = model_facts.read(self._layout.tree(entry.tree), entry.entrypoint, listing)
            self._facts[_content(entry)] = facts
        listed, test = self._listed.get(entry.id), _pass_of(entry, passed)
        return msgspec.structs.replace(
            _named(entry, made_from=IndexModel),
            resolved=self._layout.tree_from_root(entry.tree),
            files=tuple(_file(one, entry, _roles(listed, facts), test) for one in listing),
            needs=IndexNeeds(gpu_memory=listed.gpu_memory, memory=listed.memory) if listed else IndexNeeds(),
            tested=_test(test) if test else None,
            **{field: getattr(facts, field) for field in model_facts.SHOWN if facts},
        )


def write(layout: Layout, index: Index) -> None:
    """Replace the index of an existing generation by *index*, with one rename; the generation's folder keeps its time."""
    folder, temporary = layout.generations / str(index.generation), layout.staging / f"index-{os.urandom(6).hex()}"
    atomic.make_folder(layout.staging)
    atomic.write(temporary, encode(index), 0o444)
    with files.translate_errors(f"write {folder / 'index.json'}"):
        before = folder.stat()
        atomic.rename(temporary, folder / "index.json")
        atomic.set_time(folder, before.st_mtime_ns)  # it says when the generation began to serve


def encode(index: Index) -> bytes:
    """Return the bytes of ``index.json``."""
    return msgspec.json.encode(index)


def _content(entry: ActiveModel) -> str:
    return f"{entry.tree} {entry.entrypoint}"


def _pass_of(entry: ActiveModel, passed: dict[str, Passed]) -> Passed | None:
    """Return the pass that *entry* serves with: its own, or the newest of the same tree."""
    own = passed.get(entry.id)
    if own is not None and own.tree == entry.tree:
        return own
    return max((one for one in passed.values() if one.tree == entry.tree), key=lambda one: one.at, default=None)


def _roles(listed: LockedModel | None, facts: ModelFacts | None) -> dict[str, str]:
    return (facts.roles if facts else {}) | (listed.file_roles if listed else {})


def _file(one: Listing, entry: ActiveModel, roles: dict[str, str], test: Passed | None) -> IndexFile:
    exercised = (test.exercised or (entry.entrypoint,)) if test else ()
    role = roles.get(one.path, "model" if one.path == entry.entrypoint else "other")
    return IndexFile(path=one.path, role=role, digest=one.digest, size=one.size, tested=one.path in exercised)


def _test(passed: Passed) -> IndexTest:
    return IndexTest(
        at=passed.at,
        device=passed.device,
        engine=passed.engine,
        engine_version=passed.engine_version,
        tokens_per_second=passed.tokens_per_second,
        load_seconds=passed.load_seconds,
    )


def _facts_of(model: IndexModel) -> ModelFacts:
    """Return the facts that an index holds of *model*."""
    return ModelFacts(**{field: getattr(model, field) for field in model_facts.SHOWN}, roles={file.path: file.role for file in model.files})
