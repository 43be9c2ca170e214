"""
``lock``: from the network's signed snapshot to ``models.lock``.

The order is that of a client of The Update Framework (specification, section 5), and of the functions below:

1. Newer roots are fetched and applied, one version at a time.
2. The envelope is fetched, up to its cap.
3. Its signatures, network, version and times are checked.
4. The snapshot is compiled to a lock.
5. The trust state is advanced, durably; then the envelope and the lock are written.

Whatever fails in steps 2 to 4 changes nothing: the last accepted lock stays in use. Roots that were applied stay applied.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from reconciler.commands import documents, fetch_record, load_lock, node_trust, retry_after
from reconciler.commands.context import NodeContext, hold_store
from reconciler.commands.documents import Kept
from reconciler.commands.load_lock import KnownLock, LockFiles, VerifiedLock
from reconciler.core import digest, trust
from reconciler.core import lock as locks
from reconciler.core.errors import BadSignature, FetchError, LockMismatch, NothingToCheck, RootExpired
from reconciler.core.trust import TrustRoot
from reconciler.store import atomic, trust_state
from reconciler.store.ledger import Ledger


class Etag(Struct, frozen=True, kw_only=True):
    """The name that a server gave to a document (RFC 9110, 8.8.3)."""

    url: str
    etag: str
    #: Digest of the document.
    envelope: str


class FetchedSnapshot(Struct, frozen=True, kw_only=True):
    """A snapshot that was fetched and verified, with the lock that it compiles to."""

    verified_lock: VerifiedLock
    envelope: bytes
    #: The lock's bytes.
    data: bytes
    #: Whether the lock or the envelope on disk differs.
    changes: bool
    #: What the server calls this very document, to be asked only for another.
    etag: Etag | None = None


def update_lock(
    context: NodeContext, source: str = "", *, lock_timeout_seconds: float = 0.0, roots_every_seconds: float = 0.0, patient: bool = False
) -> FetchedSnapshot:
    """
    Fetch the snapshot at *source*, a URL or path, else at the settings' place, and write it as the node's lock.

    Newer roots are asked for where they were not in the last *roots_every_seconds*, and where the snapshot's signatures need one. A node
    that asks by itself does not verify the very bytes again that it verified before. Where *patient*, a server that asked to be left alone
    (Retry-After) is not asked.

    Raises:
        FetchError: nothing answers; what was accepted before stays.
        TrustError: the document is not a snapshot that the network signed, or may not be used now.
    """
    now, address = context.clock(), source or context.snapshot
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        known = load_lock.verified_before(context) if roots_every_seconds else None
        # A fault in the node's own root is none of the network's.
        trusted = known.verified_lock.root if known else node_trust.trusted_root(context)
        with (
            fetch_record.recorded(context, source, ledger, now),
            retry_after.remembered(address, ledger, now),
            documents.kept_connections() as kept,
        ):
            if patient:
                retry_after.check(address, ledger, now)
            root = node_trust.fetch_newer_roots(context, ledger, trusted, every_seconds=roots_every_seconds, kept=kept)
            with node_trust.refusals_logged(ledger, now, documents.redacted(address)):
                try:
                    fetched = fetch_snapshot(context, source, root, ledger, now, kept=kept, known=known)
                except (BadSignature, RootExpired):
                    newer = node_trust.fetch_newer_roots(context, ledger, root, kept=kept) if roots_every_seconds else root
                    if newer.version == root.version:
                        raise
                    fetched = fetch_snapshot(context, source, newer, ledger, now, kept=kept)
        accept_snapshot(context, fetched, ledger, now)
    return fetched


def preview_lock(context: NodeContext, source: str = "") -> FetchedSnapshot:
    """Return the snapshot that ``update_lock`` would accept, newer roots aside. Changes nothing; raises as ``update_lock``."""
    root = node_trust.trusted_root(context)
    with Ledger.reading(context.layout.ledger) as ledger:
        return fetch_snapshot(context, source, root, ledger, context.clock())


def lock_difference(context: NodeContext, source: str = "") -> str:
    """
    Return how the lock on disk differs from what the snapshot at *source* compiles to; empty where it does not. Changes nothing.

    Raises:
        NothingToCheck: there is no lock or no envelope that can be read.
        TrustError, FetchError, SettingsError: as ``update_lock``.
    """
    try:
        files = load_lock.read_files(context)
    except LockMismatch as error:
        raise NothingToCheck(f"there is nothing to check: {error.message}", hint=error.hint) from None
    try:
        load_lock.verify_files(context, files)
    except LockMismatch as error:
        return error.message
    fetched = preview_lock(context, source)
    if not fetched.changes:
        return ""
    version = fetched.verified_lock.lock.snapshot.version
    return f"it is not of the snapshot at {documents.redacted(source or context.snapshot)}, which has version {version}"


def fetch_snapshot(
    context: NodeContext,
    source: str,
    root: TrustRoot,
    ledger: Ledger,
    now: datetime,
    *,
    kept: Kept = None,
    known: KnownLock | None = None,
) -> FetchedSnapshot:
    """Return the verified snapshot at *source*, else at the settings' place, with its lock. Changes nothing; raises as ``update_lock``."""
    envelope, etag = _fetch_envelope(context, source, ledger, kept)
    return verify_snapshot(context, source or context.snapshot, envelope, root, ledger, now, etag=etag, known=known)


def verify_snapshot(
    context: NodeContext,
    place: str,
    envelope: bytes,
    root: TrustRoot,
    ledger: Ledger,
    now: datetime,
    *,
    etag: Etag | None = None,
    known: KnownLock | None = None,
) -> FetchedSnapshot:
    """
    Return the snapshot of *envelope*, which came from *place*, verified, with its lock; raises what ``update_lock`` does.

    Where it is the *known* one under the same root, it is not verified again; the time and the trust state are checked all the same.
    """
    hint = context.envelope_hint if place == str(context.envelope_path) else ""
    with documents.named(documents.redacted(place), hint, envelope):
        accepted = trust_state.read(context.layout, ledger)
        if known is not None and (known.files.envelope, known.verified_lock.root) == (envelope, root):
            known.verified_lock.check_fresh(accepted, now=now, limits=context.limits)
            return FetchedSnapshot(verified_lock=known.verified_lock, envelope=envelope, data=known.files.lock, changes=False, etag=etag)
        verified = trust.verify(envelope, root, now=now, trust_state=accepted, limits=context.limits)
    lock = locks.compile(verified)
    data = locks.encode(lock)
    return FetchedSnapshot(
        verified_lock=load_lock.verified_lock(lock, data, verified, root),
        envelope=envelope,
        data=data,
        changes=not _is_on_disk(context, data, envelope),
        etag=etag,
    )


def _fetch_envelope(context: NodeContext, source: str, ledger: Ledger, kept: Kept) -> tuple[bytes, Etag | None]:
    """Return the envelope at *source* with its ETag; where the server still has the one beside the lock, that one."""
    place = source or context.snapshot
    hint = documents.NO_FILE_HINT if source else documents.NO_SNAPSHOT_HINT
    known = _known_envelope(context, place, ledger)
    etag = known[1].etag if known else ""
    fetched = documents.fetch(place, context.download, cap=context.limits.envelope_bytes, etag=etag, hint=hint, kept=kept)
    if fetched.data is not None:
        return fetched.data, Etag(url=place, etag=fetched.etag, envelope=digest.of(fetched.data)) if fetched.etag else None
    if known is None:
        raise FetchError(f"{place} says that nothing changed, and was not asked")
    return known


def _known_envelope(context: NodeContext, url: str, ledger: Ledger) -> tuple[bytes, Etag] | None:
    """Return the envelope that came from *url* last, if it still lies beside the lock, with its ETag."""
    etag = ledger.fact("etag", Etag)
    if etag is None or etag.url != url:
        return None
    try:
        envelope = documents.read_capped(context.envelope_path, context.limits.envelope_bytes)
    except OSError:
        return None
    return (envelope, etag) if digest.of(envelope) == etag.envelope else None


def _is_on_disk(context: NodeContext, data: bytes, envelope: bytes) -> bool:
    try:
        lock = documents.read_capped(context.lock_path, len(data))
        return lock == data and documents.read_capped(context.envelope_path, len(envelope)) == envelope
    except OSError:
        return False


def accept_snapshot(context: NodeContext, fetched: FetchedSnapshot, ledger: Ledger, now: datetime) -> None:
    """Record *fetched* as the newest accepted snapshot, then write its envelope and its lock. The caller holds the store."""
    found = fetched.verified_lock
    envelope_path, lock_path = atomic.target_of(context.envelope_path), atomic.target_of(context.lock_path)
    node_trust.record_accepted(context, found.verified, found.root, ledger, now)
    trust_state.keep_envelope(context.layout, fetched.envelope)
    if fetched.changes:
        atomic.write(envelope_path, fetched.envelope)
        atomic.write(lock_path, fetched.data)
    ledger.set_fact("etag", fetched.etag)
    files = LockFiles(lock=fetched.data, envelope=fetched.envelope, roots=node_trust.read_roots(context))
    load_lock.cache_verified_lock(context, files, found)
