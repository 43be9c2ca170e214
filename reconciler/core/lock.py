"""
``models.lock``: what a snapshot compiles to.

Rules that hold here:

1. The same snapshot gives the same bytes on any machine: everything is sorted, nothing of the node enters, no order is a set's.
2. A lock is never edited, and never trusted by itself: every command compiles its signed envelope again and compares the bytes.
3. Each blob stands once, however many models share it; its sources are in the order in which they are tried.
"""

from __future__ import annotations

import contextlib
import functools
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct

from reconciler.core import digest, snapshot, text, units, urls, vocabulary
from reconciler.core.digest import AnyDigest, Digest
from reconciler.core.errors import LockMismatch
from reconciler.core.snapshot import Rollout, Runtime, Smoke, Snapshot
from reconciler.core.trust import Verified
from reconciler.core.vocabulary import Feature, Role, State, Task, Unpack

HEADER = """\
# models.lock: what the network's signed snapshot compiles to. Made by `reconcile lock`; commit it with snapshot.json.
# Do not edit: every command compiles the snapshot again and refuses a lock that differs.

"""


class LockedSnapshot(Struct, frozen=True, kw_only=True):
    """Which snapshot a lock was compiled from."""

    version: int
    digest: Digest
    issued_at: datetime
    expires_at: datetime


class LockedArtifact(Struct, frozen=True, kw_only=True):
    """Where a blob lies in a model's tree, or which archive's members do."""

    path: str
    digest: AnyDigest
    unpack: Unpack | None = None


class LockedModel(Struct, frozen=True, kw_only=True, dict=True):
    """A model with all that installing and testing it needs."""

    id: str
    state: State
    replaces: tuple[str, ...] = ()
    requires: tuple[Feature, ...] = ()
    tasks: tuple[Task, ...]
    entrypoint: str
    gpu_memory: int = 0
    memory: int = 0
    runtime: Runtime
    smoke: Smoke
    #: The roles of artifacts, by path, where they are given. Not in ``artifact``: what a file is for does not change the tree.
    roles: dict[str, Role] = {}
    artifact: tuple[LockedArtifact, ...]

    @functools.cached_property
    def recipe(self) -> str:
        """Return the digest of what the model's tree is made from: the same recipe always gives the same tree."""
        return digest.of(msgspec.json.encode(self.artifact))

    @functools.cached_property
    def blobs(self) -> tuple[str, ...]:
        """Return the digests that the model is made from, each once, sorted."""
        return tuple(sorted({artifact.digest for artifact in self.artifact}))

    @property
    def file_roles(self) -> dict[str, Role]:
        """Return the roles that are given, by path in the model's tree: that of an archive is its entrypoint's."""
        archives = {one.path for one in self.artifact if one.unpack}
        files = {path: role for path, role in self.roles.items() if path not in archives}
        of_archive = next((role for path, role in self.roles.items() if path in archives), "")
        return ({self.entrypoint: of_archive} if of_archive else {}) | files

    @property
    def unknown_words(self) -> tuple[str, ...]:
        """Return what the snapshot says of the model in words that this version does not know, for people; empty if it knows them all."""
        words = [("state", self.state), ("task", self.smoke.task), *[("task", task) for task in self.tasks]]
        for one in self.artifact:
            words.append(("digest", one.digest.partition(":")[0]))
            if one.unpack:
                words.append(("unpack", one.unpack))
        words += [("role", role) for role in self.roles.values()]
        words += [("requires", word) for word in self.requires]
        return vocabulary.unknown_words(words)

    @property
    def serves(self) -> bool:
        """Whether the snapshot permits that it serves: enabled, or retired until its replacement is active."""
        return self.state in {"enabled", "retired"}

    @property
    def name(self) -> str:
        """Return the id without its version."""
        return self.id.partition(":")[0]


class LockedBlob(Struct, frozen=True, kw_only=True):
    """A blob's size in bytes and its sources."""

    size: int
    sources: tuple[str, ...]


class Lock(Struct, frozen=True, kw_only=True):
    """A lock as a value; ``model`` is sorted by id, ``blob`` by digest."""

    schema: Literal[1] = 1
    network: str
    retest_after: str = ""
    allow_node_fallback: bool = True
    #: For a source's host, patterns of hosts that it may redirect to.
    redirects: dict[str, tuple[str, ...]] = {}
    #: The version that a model's bare name leads to, by name.
    names: dict[str, str] = {}
    #: Models that are not for every node yet, by the rollout's name; ``core.rollout`` says for which.
    rollouts: dict[str, Rollout] = {}
    snapshot: LockedSnapshot
    model: tuple[LockedModel, ...]
    blob: dict[AnyDigest, LockedBlob]


def compile(verified: Verified) -> Lock:  # noqa: A001  called as lock.compile
    """Return the lock of a verified snapshot."""
    found = verified.snapshot
    models = sorted(found.models, key=lambda model: model.id)
    return Lock(
        network=found.network,
        retest_after="" if found.retest_after is UNSET else found.retest_after,
        allow_node_fallback=found.sources.allow_node_fallback,
        redirects={host: tuple(sorted(set(patterns))) for host, patterns in sorted((found.sources.redirects or {}).items())},
        names={} if found.names is UNSET else dict(sorted(found.names.items())),
        rollouts={name: _sorted(rollout) for name, rollout in sorted((found.rollouts or {}).items())},
        snapshot=LockedSnapshot(
            version=found.version,
            digest=verified.digest,
            issued_at=snapshot.utc(found.issued_at),
            expires_at=snapshot.utc(found.expires_at),
        ),
        model=tuple(compile_model(model) for model in models),
        blob=_blobs(models, found),
    )


def _sorted(rollout: Rollout) -> Rollout:
    return Rollout(models=tuple(sorted(set(rollout.models))), per_10000=rollout.per_10000, cohorts=tuple(sorted(set(rollout.cohorts))))


def compile_model(model: snapshot.Model) -> LockedModel:
    """Return *model* as a lock holds it."""
    artifacts = sorted(model.artifacts, key=lambda artifact: artifact.path)
    return LockedModel(
        id=model.id,
        state=model.state,
        replaces=tuple(sorted(model.replaces or ())),
        requires=tuple(sorted(set(model.requires or ()))),
        tasks=tuple(sorted(model.tasks)),
        entrypoint=model.entrypoint,
        gpu_memory=model.gpu_memory,
        memory=model.memory,
        runtime=model.runtime,
        smoke=_without_null_answer(model.smoke),
        roles={one.path: one.role for one in artifacts if one.role},
        artifact=tuple(LockedArtifact(path=one.path, digest=one.digest, unpack=one.unpack) for one in artifacts),
    )


def _without_null_answer(smoke: Smoke) -> Smoke:
    """Return *smoke* with an answer that is null left out: it says the same, and a lock has no nulls."""
    if smoke.expect.answer is not None:
        return smoke
    return msgspec.structs.replace(smoke, expect=msgspec.structs.replace(smoke.expect, answer=UNSET))


def _blobs(models: list[snapshot.Model], found: Snapshot) -> dict[str, LockedBlob]:
    """Merge the urls of models that share a blob, in the order of their ids, so that the order of models does not matter."""
    sizes: dict[str, int] = {}
    sources: dict[str, dict[str, None]] = {}
    for model in models:
        for artifact in sorted(model.artifacts, key=lambda one: one.path):
            sizes[artifact.digest] = artifact.size
            sources.setdefault(artifact.digest, {}).update(dict.fromkeys(artifact.urls))
    for name, found_urls in sources.items():
        algorithm, _, digits = name.partition(":")  # not digest.parse: a lock has the same bytes whether the algorithm is known or not
        found_urls.update(dict.fromkeys(urls.expand(template, algorithm, digits) for template in found.sources.fallback))
    return {name: LockedBlob(size=sizes[name], sources=tuple(sources[name])) for name in sorted(sizes)}


def encode(lock: Lock) -> bytes:
    """Return the bytes of ``models.lock``: TOML, UTF-8, LF."""
    import tomli_w

    document = _without_nulls(msgspec.to_builtins(lock, builtin_types=(datetime,)))
    for table in (document, *document["model"]):  # a lock without any of these has the bytes that it had before there were any
        for key in {"redirects", "names", "rollouts", "replaces", "requires", "roles"} & {key for key, value in table.items() if not value}:
            del table[key]
    document["snapshot"] |= {key: _Instant.of(document["snapshot"][key]) for key in ("issued_at", "expires_at")}
    return (HEADER + tomli_w.dumps(document)).encode()


def _without_nulls(value: Any) -> Any:
    """Return *value* as TOML can hold it: without nulls, which it has not; lists for tuples, as tomli-w asks."""
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list | tuple) else value


class _Instant(datetime):
    """A time that is written as RFC 3339 with a ``Z``; tomli-w writes ``str`` of it."""

    @classmethod
    def of(cls, instant: datetime) -> _Instant:
        return cls.fromtimestamp(instant.timestamp(), UTC)

    def __str__(self) -> str:
        return units.rfc3339(self)


def decode(data: bytes) -> Lock:
    """
    Return the lock in *data*, unverified: for reading, never for acting on it.

    Raises:
        LockMismatch: not TOML, or not a lock, or one that a newer version wrote.
    """
    if newer := _newer(data):
        raise LockMismatch(newer, hint=_NEWER_HINT)
    try:
        return msgspec.convert(tomllib.loads(data.decode()), Lock)
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        raise LockMismatch(f"models.lock is not a lock: {ascii(str(error))[1:-1]}") from None


def check(data: bytes, compiled: Lock) -> None:
    """
    Check that *data*, the bytes of ``models.lock``, is what the envelope beside it compiles to.

    Raises:
        LockMismatch: it differs; the message says what a tool did to it, or in which line it differs first.
    """
    expected = encode(compiled)
    if data == expected:
        return
    what = "models.lock is not what its snapshot compiles to"
    if cause := text.tool_damage(data) or _changed_layout(data, expected):
        raise LockMismatch(f"{what}: {cause}", hint=_DAMAGED_HINT)
    if newer := _newer(data):
        raise LockMismatch(newer, hint=_NEWER_HINT)
    found, wanted = data.decode(errors="replace").split("\n"), expected.decode().split("\n")
    line = _first_difference(found, wanted)
    raise LockMismatch(f"{what}: line {line + 1} is {_quote(found, wanted, line)}, expected {_quote(wanted, found, line)}")


_DAMAGED_HINT = "run `reconcile lock` to write it again; the .gitattributes that `reconcile init` writes keeps git from changing it"


_NEWER_HINT = "use that version, or run `reconcile lock` to write the lock again with this one"


def _newer(data: bytes) -> str:
    """Return that a newer version wrote the lock in *data*, and how that is seen; empty if nothing tells so."""
    with contextlib.suppress(ValueError, RecursionError):
        document = tomllib.loads(data.decode())
        schema = document.get("schema")
        if type(schema) is int and schema > 1:
            return f"models.lock was written by a newer version of reconcile: its schema is {schema}, and this version knows 1"
        known = msgspec.to_builtins(msgspec.convert(document, Lock))
        place = next(vocabulary.unknown_fields(document, known), "")
        return place and f"models.lock was written by a newer version of reconcile, or edited: this version knows no field {place[:200]!r}"
    return ""


def _changed_layout(data: bytes, expected: bytes) -> str:
    """Return how *data* differs from *expected* where both say the same."""
    unix = data.replace(b"\r\n", b"\n")
    if unix.rstrip(b"\n") == expected.rstrip(b"\n"):
        if unix != data:
            return "its lines end in CRLF, as git's core.autocrlf and some editors write them"
        newlines = len(data) - len(data.rstrip(b"\n"))
        return f"it ends in {units.count(newlines, 'newline') if newlines else 'no newline'}, expected 1"
    try:
        same = tomllib.loads(data.decode()) == tomllib.loads(expected.decode())
    except (ValueError, RecursionError):
        return ""
    line = _first_difference(data.split(b"\n"), expected.split(b"\n"))
    return f"its values are the same, and its layout is not, from line {line + 1} on: a formatter or an editor changed it" if same else ""


def _first_difference(found: Sequence[object], expected: Sequence[object]) -> int:
    """Return the index of the first item that differs, or that one of the two lacks."""
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))


def _quote(lines: list[str], others: list[str], index: int) -> str:
    """Return line *index* of *lines*, around where it differs from that of *others*."""
    if index >= len(lines):
        return "missing"
    column = _first_difference(lines[index], others[index]) if index < len(others) else 0
    begin = column - 40 if column > 60 else 0
    return f"{'…' if begin else ''}{lines[index][begin : begin + 100]!r}"


def digest_of(data: bytes) -> str:
    """Return the lock's own digest: the SHA-256 of its bytes."""
    return digest.of(data)
