"""
Bundles: a node's snapshot and blobs as one file or folder, for nodes without a network.

Rules that hold here:

1. ``export_bundle`` writes only what it has verified: each blob is hashed while it is copied.
2. ``import_bundle`` is a sync whose documents and blobs come from the bundle: the same verification, tests and activation.
3. A bundle has its name, and a folder its index, only when all of it is on the disk.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from msgspec import Struct
from msgspec.structs import replace

from reconciler import files
from reconciler.apply.run import Outcome
from reconciler.commands import apply, load_lock, node_trust
from reconciler.commands import lock as lock_command
from reconciler.commands.context import NodeContext, RunOptions, hold_store
from reconciler.core import bundle, digest, units
from reconciler.core.bundle import Contents
from reconciler.core.errors import BlobDamaged, StoreError, UsageError
from reconciler.core.lock import Lock
from reconciler.fetch.bundle import Bundle
from reconciler.ports import Reporter
from reconciler.store import atomic

_CHUNK = 1 << 20


class Exported(Struct, frozen=True, kw_only=True):
    """What was exported: the snapshot's version, the models, and how many blobs of how many bytes."""

    path: str
    version: int
    models: tuple[str, ...]
    blobs: int
    bytes: int
    #: Blobs that were left out because the earlier bundle holds them.
    assumed: int


def export_bundle(context: NodeContext, target: Path, *, folder: bool, only: tuple[str, ...] = (), since: Path | None = None) -> Exported:
    """
    Write the snapshot of this node's lock and its blobs to *target*: a tar file, or a *folder*.

    Only the blobs of the models *only*, if any are named; those that the bundle *since* holds, or assumes, are left out.

    Raises:
        UsageError: no such model, or *since* is of another network.
        BadBundle: *since* is no bundle.
        StoreError: a blob is not in the store, or is damaged; nothing is left at *target*.
        TrustError: the lock is not what the network signed.
    """
    kept = load_lock.read_files(context)
    lock = load_lock.verify_files(context, kept).lock
    models = _chosen(lock, only)
    assumed = _assumed(since, lock)
    wanted = {name: lock.blob[name].size for model in lock.model if model.id in models for name in model.blobs}
    missing = sorted(name for name in wanted.keys() - assumed.keys() if not context.layout.blob(name).is_file())
    if missing:
        absent = [model.id for model in lock.model if model.id in models and set(missing) & set(model.blobs)]
        hint = "run `reconcile sync`, or name with --only the models that this node has"
        raise StoreError(f"this node lacks {units.count(len(missing), 'blob')} of {', '.join(absent)}", hint=hint)
    envelopes = [kept.envelope, *node_trust.read_roots(context).newer]
    contents = Contents(
        network=lock.network,
        version=lock.snapshot.version,
        envelope=digest.of(kept.envelope),
        roots=tuple(digest.of(root) for root in envelopes[1:]),
        models=models,
        blobs={name: size for name, size in sorted(wanted.items()) if name not in assumed},
        assumes={name: size for name, size in sorted(wanted.items()) if name in assumed},
    )
    _write(context, target, contents, envelopes, folder=folder)
    return Exported(
        path=str(target),
        version=contents.version,
        models=models,
        blobs=len(contents.blobs),
        bytes=sum(contents.blobs.values()),
        assumed=len(contents.assumes),
    )


def _chosen(lock: Lock, only: tuple[str, ...]) -> tuple[str, ...]:
    """Return the models whose blobs are exported: those named, else all that may be installed."""
    known = {model.id for model in lock.model}
    if unknown := sorted(set(only) - known):
        raise UsageError(f"there is no model {unknown[0]!r}", hint=f"there are: {', '.join(sorted(known)) or 'none'}")
    return tuple(model.id for model in lock.model if (model.id in only if only else model.state in {"enabled", "disabled"}))


def _assumed(since: Path | None, lock: Lock) -> dict[str, int]:
    if since is None:
        return {}
    with Bundle(since) as earlier:
        if earlier.contents.network != lock.network:
            raise UsageError(f"{since} is of the network {earlier.contents.network}, and this node of {lock.network}")
        return {**earlier.contents.assumes, **earlier.contents.blobs}


# -- writing ---------------------------------------------------------------------------------------


class _Writer(Protocol):
    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write the file *path* of *size* bytes, which *pieces* make up."""


def _write(context: NodeContext, target: Path, contents: Contents, envelopes: list[bytes], *, folder: bool) -> None:
    """Write documents first, then blobs; the index, which makes it a bundle, last in a folder and at once with a tar's name."""
    sizes = {digest.of(envelope): len(envelope) for envelope in envelopes}
    documents = bundle.documents(contents, sizes) | {bundle.blob_path(digest.of(envelope)): envelope for envelope in envelopes}
    part = target if folder else target.with_name(f"{target.name}.part")
    with files.translate_errors(f"write {target}"):
        if folder:
            atomic.make_folder(target)
            _write_all(_FolderWriter(target), context, contents, {path: documents[path] for path in documents if path != bundle.INDEX_FILE})
            atomic.write(target / bundle.INDEX_FILE, documents[bundle.INDEX_FILE])
            return
        try:
            with part.open("wb") as file:
                writer = _TarWriter(file)
                _write_all(writer, context, contents, documents)
                writer.end()
                file.flush()
                os.fsync(file.fileno())
            atomic.rename(part, target)
        except BaseException:
            atomic.delete(part)
            raise


def _write_all(writer: _Writer, context: NodeContext, contents: Contents, documents: dict[str, bytes]) -> None:
    for path, data in sorted(documents.items(), key=lambda one: (one[0].startswith("blobs/"), one[0])):
        writer.add(path, len(data), [data])
    for name, size in contents.blobs.items():
        writer.add(bundle.blob_path(name), size, _verified(context.layout.blob(name), name, size))


def _verified(path: Path, name: str, size: int) -> Iterator[bytes]:
    """
    Yield the bytes of the blob *name* at *path*.

    Raises:
        BlobDamaged: they are not what its name says; raised after the last.
    """
    algorithm, hasher, done = digest.parse(name)[0], digest.hasher(digest.parse(name)[0]), 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            hasher.update(data)
            done += len(data)
            if done <= size:
                yield data
    if done != size or f"{algorithm}:{hasher.hexdigest()}" != name:
        raise BlobDamaged(f"{name} is not what its name says")


class _FolderWriter:
    """Writes a bundle as a folder; what an earlier export wrote whole is not written again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write a file, or keep the one that is there if its digest is that of its name."""
        target = self._folder / path
        if path.startswith("blobs/") and _is_whole(target, path, size):
            return
        atomic.make_folder(target.parent)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                atomic.sync_file(file.fileno(), 0o644)
            atomic.rename(part, target)
        except BaseException:
            atomic.delete(part)
            raise


def _is_whole(target: Path, path: str, size: int) -> bool:
    _, algorithm, digits = path.split("/")
    try:
        for _ in _verified(target, f"{algorithm}:{digits}", size):
            pass
    except (OSError, BlobDamaged):
        return False
    return True


class _TarWriter:
    """Writes a bundle as a tar file with the same bytes for the same content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write a member."""
        member = tarfile.TarInfo(path)
        member.size, member.mode = size, 0o644
        self._file.write(member.tobuf(tarfile.PAX_FORMAT))
        self._file.writelines(pieces)
        self._file.write(bytes(-size % tarfile.BLOCKSIZE))

    def end(self) -> None:
        """Write the end of the tar."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))


# -- import ----------------------------------------------------------------------------------------


def import_bundle(context: NodeContext, path: Path, report: Reporter, options: RunOptions) -> Outcome:
    """
    Accept the snapshot in the bundle at *path*, and install from it what this node needs. Without a network, as ``sync`` with one.

    Raises:
        BadBundle: it is no bundle.
        TrustError: its snapshot is not one that the network signed, is expired, or is older than the one that this node has accepted.
        and whatever ``apply`` raises.
    """
    now = context.clock()
    with Bundle(path) as found, hold_store(context, timeout_seconds=options.lock_timeout_seconds) as ledger:
        envelopes = [(f"{path}: {name}", found.read(name, context.limits.root_bytes)) for name in found.contents.roots]
        root = node_trust.apply_root_envelopes(context, node_trust.trusted_root(context), envelopes)
        envelope = found.read(found.contents.envelope, context.limits.envelope_bytes)
        with node_trust.refusals_logged(ledger, now, str(path)):
            fetched = lock_command.verify_snapshot(context, str(path), envelope, root, ledger, now)
        lock_command.accept_snapshot(context, fetched, ledger, now)
    return apply.apply(context, report, replace(options, bundle=path), actor="bundle import")
