"""
The network's word, confirmed: settings and files in, a lock that may be acted on out.

Every command that acts on a lock comes through here: it verifies the envelope against the root, compiles it again and compares the
bytes. What was confirmed is remembered in the store by the digests of everything that went in, so that a plan over a thousand models
need not compile them again; time and floor are checked each time all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler import __version__
from reconciler.core import digest, trust
from reconciler.core import lock as locks
from reconciler.core.errors import (
    BadEnvelope,
    BadSignature,
    LockMismatch,
    ReconcileError,
    SettingsError,
    StoreError,
    TooLarge,
    WrongNetwork,
)
from reconciler.core.lock import Lock
from reconciler.core.node import Limits
from reconciler.core.trust import TrustRoot, TrustState, Verified
from reconciler.settings import Settings
from reconciler.store import atomic, trust_state
from reconciler.store.layout import Layout

LIMITS = Limits()
#: A lock repeats what its envelope says, in a longer form.
_LOCK_BYTES = 4 * LIMITS.envelope_bytes


class VerifiedLock(Struct, frozen=True, kw_only=True):
    """A lock that is what a verified envelope compiles to. Whether it may be acted on *now* is ``trust.admit``'s to say."""

    lock: Lock
    lock_digest: str
    #: The snapshot's header; its models are in the lock.
    verified: Verified
    root: TrustRoot

    def check_fresh(self, floor_: TrustState, now: datetime) -> None:
        """Check time and floor; raises what ``trust.admit`` raises."""
        trust.check_fresh(self.verified, self.root, now=now, trust_state=floor_, limits=LIMITS)

    def refusal(self, floor_: TrustState, now: datetime) -> ReconcileError | None:
        """Return why nothing new may be done on this lock now, or None."""
        try:
            self.check_fresh(floor_, now)
        except ReconcileError as error:
            return error
        return None


def store_layout(settings: Settings) -> Layout:
    """Return where the store of *settings* lies."""
    return Layout(settings.store_path, settings.archive_path)


def envelope_path(settings: Settings) -> Path:
    """Return where the signed envelope is kept, beside the lock."""
    return settings.envelope_path


def trusted_root(settings: Settings) -> TrustRoot:
    """
    Return the root that is trusted now: the pinned one, and those that were walked from it.

    Raises:
        SettingsError: no root is pinned.
        TrustError: the pinned root, or one that was walked, does not hold.
    """
    with naming_document(settings.network.root, BAD_ROOT_HINT):
        pinned = trust.pin(read_pinned_root(settings), settings.network.root_fingerprint, limits=LIMITS)
    return trust.apply_root_chain(pinned, trust_state.roots(store_layout(settings)), limits=LIMITS)


def read_pinned_root(settings: Settings) -> bytes:
    """Return the envelope of the pinned root; raises SettingsError."""
    path = settings.path(settings.network.root)
    try:
        return read_capped(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            hint = f"get root.json from the network's operator and put it there; `reconcile root inspect {path.name}` shows its fingerprint"
            raise SettingsError(f"there is no trust root yet: {path}", hint=hint) from None
        raise SettingsError(f"the trust root {path} cannot be read: {error.strerror}", hint=_UNREAD) from None


def load_verified_lock(settings: Settings) -> VerifiedLock:
    """
    Return the committed lock, confirmed.

    Raises:
        LockMismatch: there is no lock, no envelope, or one is not what the other compiles to.
        TrustError: the envelope is not the network's word.
    """
    data, envelope = _files(settings)
    return _recalled(_cache(settings, data, envelope)) or _compiled(settings, envelope, data)


def _files(settings: Settings) -> tuple[bytes, bytes]:
    path, beside = settings.path(settings.network.lockfile), envelope_path(settings)
    try:
        data = read_capped(path, _LOCK_BYTES)
    except OSError as error:
        raise _without(path, "there is no lock yet", "the lock", "run `reconcile lock` to make one", error) from None
    try:
        return data, read_capped(beside)
    except OSError as error:
        raise _without(beside, "the lock has no envelope", "the lock's envelope", "run `reconcile lock` to make both", error) from None


@contextlib.contextmanager
def naming_document(place: str, hint: str = "") -> Iterator[None]:
    """Say which document it is that does not hold: there are several, and each is another's fault, with a *hint* of its own."""
    try:
        yield
    except (BadEnvelope, BadSignature, TooLarge, WrongNetwork) as error:
        raise type(error)(f"{place}: {error.message}", hint=hint or error.hint) from None


#: What to do about a root that does not hold.
BAD_ROOT_HINT = "get root.json anew from the network's operator; `reconcile root inspect FILE` shows who signed it"


_UNREAD = "let the user who runs reconcile read it: it must be a plain file"


def _without(path: Path, missing: str, what: str, hint: str, error: OSError) -> LockMismatch:
    if isinstance(error, FileNotFoundError):
        return LockMismatch(f"{missing}: {path}", hint=hint)
    return LockMismatch(f"{what} {path} cannot be read: {error.strerror}", hint=_UNREAD)


def read_capped(path: Path, cap: int = LIMITS.envelope_bytes) -> bytes:
    """Return the file's bytes, or enough of them for *cap* to refuse; raises OSError."""
    with open(path, "rb", opener=_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return file.read(cap + 1)


def _nonblocking(path: str, flags: int) -> int:
    """Open without waiting: a FIFO in a checkout would be waited for without end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _compiled(settings: Settings, envelope: bytes, data: bytes) -> VerifiedLock:
    trusted = trusted_root(settings)
    with naming_document(envelope_path(settings).name, "run `reconcile lock` to get it anew, or bring it back from git"):
        verified = trust.open_snapshot(envelope, trusted, limits=LIMITS)
    lock = locks.compile(verified)
    locks.check(data, lock)
    return verified_lock(lock, locks.digest_of(data), verified, trusted)


def verified_lock(lock: Lock, lock_digest: str, verified: Verified, trusted: TrustRoot) -> VerifiedLock:
    """Return the value, with the snapshot's header alone: the models are in the lock, and it is kept small for the cache."""
    header = msgspec.structs.replace(verified.snapshot, models=())
    return VerifiedLock(lock=lock, lock_digest=lock_digest, verified=msgspec.structs.replace(verified, snapshot=header), root=trusted)


def _cache(settings: Settings, data: bytes, envelope: bytes) -> Path:
    """Return where a confirmation of exactly these inputs is kept: as trustworthy as the ledger beside it, and lost as cheaply."""
    made, layout = hashlib.sha256(), store_layout(settings)
    parts = (
        __version__.encode(),
        settings.network.root_fingerprint.encode(),
        read_pinned_root(settings),
        *trust_state.roots(layout),
        data,
        envelope,
    )
    for part in parts:
        made.update(hashlib.sha256(part).digest())
    return layout.root / "cache" / f"confirmed-{made.hexdigest()}.msgpack"


def _recalled(path: Path) -> VerifiedLock | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=VerifiedLock)
    except (OSError, msgspec.DecodeError):
        return None


def cache_verified_lock(settings: Settings, found: VerifiedLock) -> None:
    """Keep what was confirmed, for the next command; the caller holds the store. Only the newest is kept."""
    data, envelope = _files(settings)
    if digest.of(data) != found.lock_digest:
        return
    path = _cache(settings, data, envelope)
    if path.exists():
        return
    with contextlib.suppress(StoreError):  # a cache that cannot be written costs time and nothing else
        atomic.make_folder(path.parent)
        for old in path.parent.glob("confirmed-*.msgpack"):
            atomic.delete(old)
        atomic.write(path, msgspec.msgpack.encode(found), 0o600)
