"""
The committed lock, verified: files in, a lock that may be acted on out.

Every command that acts on a lock comes through here: it verifies the signed envelope against the trusted root, compiles it again and
compares the bytes with ``models.lock``. The result is cached in the store under the digest of all bytes that it follows from, so that
a plan over a thousand models need not compile them again; the time and the trust state are checked each time all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler import __version__
from reconciler.commands import documents, node_trust
from reconciler.commands.context import NodeContext
from reconciler.commands.node_trust import RootFiles
from reconciler.core import dsse, rollout, trust
from reconciler.core import lock as locks
from reconciler.core.errors import LockMismatch, ReconcileError, StoreError
from reconciler.core.lock import Lock
from reconciler.core.node import Limits
from reconciler.core.trust import TrustRoot, TrustState, Verified
from reconciler.store import atomic

#: A lock repeats what its envelope says, in a longer form.
_LOCK_TO_ENVELOPE = 4


class LockFiles(Struct, frozen=True, kw_only=True):
    """The bytes that a verified lock follows from, each file read once."""

    lock: bytes
    envelope: bytes
    roots: RootFiles


class VerifiedLock(Struct, frozen=True, kw_only=True):
    """A lock that a verified envelope compiles to. Whether it may be acted on *now* is for ``check_fresh`` to say."""

    lock: Lock
    lock_digest: str
    #: The snapshot's header; its models are in the lock.
    verified: Verified
    root: TrustRoot

    def check_fresh(self, accepted: TrustState, *, now: datetime, limits: Limits) -> None:
        """Check the lock against the time and the trust state; raises what ``trust.check_fresh`` raises."""
        trust.check_fresh(self.verified, self.root, now=now, trust_state=accepted, limits=limits)

    def refusal(self, accepted: TrustState, *, now: datetime, limits: Limits) -> ReconcileError | None:
        """Return why nothing new may be done with this lock now, or None."""
        try:
            self.check_fresh(accepted, now=now, limits=limits)
        except ReconcileError as error:
            return error
        return None


def verified_lock(lock: Lock, data: bytes, verified: Verified, root: TrustRoot) -> VerifiedLock:
    """Return the lock, whose bytes are *data*, with its snapshot's header alone: the models are in the lock, and the cache stays small."""
    header = msgspec.structs.replace(verified.snapshot, models=())
    verified = msgspec.structs.replace(verified, snapshot=header)
    return VerifiedLock(lock=lock, lock_digest=locks.digest_of(data), verified=verified, root=root)


def load_verified_lock(context: NodeContext) -> VerifiedLock:
    """
    Return the committed lock, verified, as it holds for this node.

    Raises:
        LockMismatch: there is no lock, no envelope, or one is not what the other compiles to.
        TrustError: the envelope is not a snapshot that the network signed.
        SettingsError: no root is pinned.
    """
    return for_node(context, verify_files(context, read_files(context)))


def for_node(context: NodeContext, found: VerifiedLock) -> VerifiedLock:
    """Return *found* with what its lock asks of this node; its digest stays that of the lock, which is the same on every node."""
    return msgspec.structs.replace(found, lock=rollout.for_node(found.lock, context.node_id, context.cohorts))


def has_verified_lock(context: NodeContext) -> bool:
    """Return whether there is a lock to work with while no snapshot can be fetched."""
    try:
        load_verified_lock(context)
    except ReconcileError:
        return False
    return True


def read_files(context: NodeContext) -> LockFiles:
    """Return the lock, its envelope and the roots as they are on disk; raises LockMismatch, or SettingsError for the pinned root."""
    cap, path, beside = context.limits.envelope_bytes, context.lock_path, context.envelope_path
    try:
        lock = documents.read_capped(path, _LOCK_TO_ENVELOPE * cap)
    except OSError as error:
        raise _unreadable(path, "there is no lock yet", "the lock", "run `reconcile lock` to make one", error) from None
    try:
        envelope = documents.read_capped(beside, cap)
    except OSError as error:
        hint = "run `reconcile lock` to make both"
        raise _unreadable(beside, "the lock has no envelope", "the lock's envelope", hint, error) from None
    return LockFiles(lock=lock, envelope=envelope, roots=node_trust.read_roots(context))


def _unreadable(path: Path, missing: str, what: str, hint: str, error: OSError) -> LockMismatch:
    if isinstance(error, FileNotFoundError):
        return LockMismatch(f"{missing}: {path}", hint=hint)
    return LockMismatch(f"{what} {path} cannot be read: {error.strerror}", hint=documents.NOT_READABLE_HINT)


def verify_files(context: NodeContext, files: LockFiles) -> VerifiedLock:
    """Return the lock of *files*, verified, from the cache where these very bytes were verified before; raises as `load_verified_lock`."""
    return _cached(_cache_path(context, files)) or _verified(context, files)


class KnownLock(Struct, frozen=True, kw_only=True):
    """What lies on disk, where these very bytes were verified before."""

    verified_lock: VerifiedLock
    files: LockFiles


def verified_before(context: NodeContext) -> KnownLock | None:
    """Return the lock and the root on disk where they were verified before, else None; time and trust state are for ``check_fresh``."""
    try:
        files = read_files(context)
    except ReconcileError:
        return None
    found = _cached(_cache_path(context, files))
    return KnownLock(verified_lock=found, files=files) if found else None


def _verified(context: NodeContext, files: LockFiles) -> VerifiedLock:
    root = node_trust.trusted_root(context, files.roots)
    with documents.named(str(context.envelope_path), context.envelope_hint, files.envelope):
        verified = trust.open_snapshot(files.envelope, root, limits=context.limits)
    lock = locks.compile(verified)
    locks.check(files.lock, lock)
    return verified_lock(lock, files.lock, verified, root)


def signers(context: NodeContext, root: TrustRoot) -> tuple[str, ...]:
    """Return the keys of *root* that signed the snapshot beside the lock, as people are shown them."""
    envelope = dsse.decode(read_files(context).envelope, max_bytes=context.limits.envelope_bytes)
    keys = trust.role_keys(root, root.roles.snapshot)
    return tuple(root.named(one, 16) for one in sorted(dsse.valid_keyids(envelope, dsse.payload_of(envelope), keys)))


# -- the cache -------------------------------------------------------------------------------------


def _cache_path(context: NodeContext, files: LockFiles) -> Path:
    """Return where the result for exactly these bytes is cached: as trustworthy as the ledger beside it, and as cheap to lose."""
    made = hashlib.sha256()
    version, fingerprint, roots = __version__.encode(), context.root_fingerprint.encode(), files.roots
    for part in (version, fingerprint, roots.pinned, *roots.newer, files.lock, files.envelope):
        made.update(hashlib.sha256(part).digest())
    return context.layout.root / "cache" / f"confirmed-{made.hexdigest()}.msgpack"


def _cached(path: Path) -> VerifiedLock | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=VerifiedLock)
    except (OSError, msgspec.DecodeError):
        return None


def cache_verified_lock(context: NodeContext, files: LockFiles, found: VerifiedLock) -> None:
    """Cache *found*, which *files* were verified to be, for the next command; the caller holds the store. Only the newest is kept."""
    path = _cache_path(context, files)
    if path.exists():
        return
    with contextlib.suppress(StoreError):  # a cache that cannot be written costs time and nothing else
        atomic.make_folder(path.parent)
        for old in path.parent.glob("confirmed-*.msgpack"):
            atomic.delete(old)
        atomic.write(path, msgspec.msgpack.encode(found), 0o600)
