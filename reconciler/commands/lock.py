"""
Hearing the network: a snapshot or a root is fetched or read, verified, and made the node's own.

Rules that hold here:

1. The floor is written before anything that a snapshot causes; then the envelope, then the lock.
2. A network that does not answer changes nothing: the last known lock stays, and the caller says so.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from reconciler import files
from reconciler.commands import load_lock
from reconciler.commands.load_lock import LIMITS, VerifiedLock
from reconciler.commands.options import wall_clock
from reconciler.core import digest, trust, units
from reconciler.core import lock as locks
from reconciler.core.errors import FetchError, ReconcileError, SettingsError, TrustError
from reconciler.core.trust import TrustState
from reconciler.ports import Incident
from reconciler.settings import Settings
from reconciler.store import atomic, reserve, trust_state, writer_lock
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

if TYPE_CHECKING:
    from reconciler.fetch.http import Document


class Etag(Struct, frozen=True, kw_only=True):
    """The name that a server gave to a document."""

    url: str
    etag: str
    #: Digest of the document.
    envelope: str


class FetchedSnapshot(Struct, frozen=True, kw_only=True):
    """A snapshot that was accepted, with the lock that it compiles to."""

    verified_lock: VerifiedLock
    envelope: bytes
    #: The lock's bytes.
    data: bytes
    #: Whether the lock on disk is another.
    changes: bool
    #: What the server calls this very document, to be asked only for another.
    etag: Etag | None = None


def read_trust_state(settings: Settings) -> TrustState:
    """Return the store's floor, without a trace; raises FloorLost."""
    layout = load_lock.store_layout(settings)
    with Ledger.reading(layout.ledger) as ledger:
        return trust_state.read(layout, ledger)


@contextlib.contextmanager
def open_store(settings: Settings, *, timeout_seconds: float = 0.0) -> Iterator[Ledger]:
    """
    Hold the store, made if it is missing, and open its ledger for writing.

    Raises:
        InternalError: a bug ended what was done with it; there is a report, and an incident.
        StoreBusy, StoreError: as their names say.
    """
    layout = load_lock.store_layout(settings)
    atomic.make_folder(layout.root)
    with files.translate_errors(f"read the store {layout.root}"):
        layout.check(fan_out=True)
    with (
        writer_lock.hold(layout.lock_file, timeout_seconds=timeout_seconds),
        reserve.released_when_full(layout.space_reserve),
        Ledger.writing(layout.ledger) as ledger,
        report_bugs(layout, ledger),
    ):
        yield ledger


@contextlib.contextmanager
def report_bugs(layout: Layout, ledger: Ledger) -> Iterator[None]:
    """Turn an exception that nobody raised on purpose into an ``InternalError`` with a report and an incident."""
    try:
        yield
    except (ReconcileError, OSError):
        raise
    except Exception as error:
        from reconciler.store import crash_report  # with all that describes a traceback, which nothing else needs

        now = wall_clock()
        found = crash_report.internal_error(layout, error, {"command": " ".join(sys.argv[1:2])}, now)
        with contextlib.suppress(ReconcileError):
            ledger.log_incident(Incident(kind=found.name, detail=found.message), now)
        raise found from error


@contextlib.contextmanager
def log_trust_errors(ledger: Ledger, now: datetime, source: str = "") -> Iterator[None]:
    """Log as an incident what is not the network's word, and let the refusal pass."""
    try:
        yield
    except TrustError as error:
        ledger.log_incident(Incident(kind=error.name, detail=error.message, source=source), now)
        raise


def fetch_snapshot(settings: Settings, source: str, now: datetime) -> FetchedSnapshot:
    """
    Return the snapshot at *source*, a URL or path; an empty one is the settings'. Changes nothing.

    Raises:
        FetchError: nobody answers.
        TrustError: it is not the network's word, not now, or not any more.
    """
    envelope, etag = _heard(settings, source)
    trusted = load_lock.trusted_root(settings)
    with load_lock.naming_document(source or settings.network.snapshot):
        verified = trust.verify(envelope, trusted, now=now, trust_state=read_trust_state(settings), limits=LIMITS)
    lock = locks.compile(verified)
    data = locks.encode(lock)
    found = load_lock.verified_lock(lock, locks.digest_of(data), verified, trusted)
    return FetchedSnapshot(verified_lock=found, envelope=envelope, data=data, changes=not _on_disk(settings, data, envelope), etag=etag)


def _on_disk(settings: Settings, data: bytes, envelope: bytes) -> bool:
    try:
        kept = settings.path(settings.network.lockfile).read_bytes(), load_lock.envelope_path(settings).read_bytes()
    except OSError:
        return False
    return kept == (data, envelope)


def _heard(settings: Settings, source: str) -> tuple[bytes, Etag | None]:
    """Return the envelope at *source*; where the server says that it is the one that we have, that one."""
    place = source or settings.network.snapshot
    known = _known(settings, place)
    fetched = _read(settings, place, from_settings=not source, etag=known[1].etag if known else "")
    if fetched.data is None:
        if known is None:
            raise FetchError(f"{place} says that nothing changed, and was not asked")
        return known
    etag = Etag(url=place, etag=fetched.etag, envelope=digest.of(fetched.data)) if fetched.etag else None
    return fetched.data, etag


def _known(settings: Settings, url: str) -> tuple[bytes, Etag] | None:
    """Return the envelope that came from *url* last, if it still lies beside the lock, with its name."""
    with Ledger.reading(load_lock.store_layout(settings).ledger) as ledger:
        etag = ledger.fact("etag", Etag)
    if etag is None or etag.url != url:
        return None
    try:
        envelope = load_lock.read_capped(load_lock.envelope_path(settings))
    except OSError:
        return None
    return (envelope, etag) if digest.of(envelope) == etag.envelope else None


def _read(settings: Settings, source: str, *, from_settings: bool, cap: int = LIMITS.envelope_bytes, etag: str = "") -> Document:
    from reconciler.fetch import http  # TLS comes with it, and a plan needs none

    if http.is_url(source):
        download = settings.download
        try:
            return http.get(
                source,
                max_bytes=cap,
                timeout_seconds=units.seconds(download.timeout),
                etag=etag,
                proxy=download.proxy,
                ca_file=str(settings.path(download.ca_file)) if download.ca_file else "",
                allow_http=download.allow_http,
            )
        except FetchError as error:
            raise FetchError(error.message, hint="look at the address and at the network; what was accepted before stays") from None
    path = settings.path(source) if from_settings else Path(source)
    try:
        with path.open("rb") as file:
            return http.Document(data=file.read(cap + 1))
    except OSError as error:
        where = "name its URL or file as [network] snapshot in the settings" if from_settings else "give the signed document's URL or file"
        raise SettingsError(f"{path} cannot be read: {error.strerror}", hint=where) from None


def accept_snapshot(settings: Settings, heard: FetchedSnapshot, ledger: Ledger, now: datetime) -> None:
    """Make what was heard the node's own: floor first, then envelope and lock. The caller holds the store."""
    layout = load_lock.store_layout(settings)
    record_accepted(settings, heard.verified_lock, ledger, now)
    trust_state.keep_envelope(layout, heard.envelope)
    if heard.changes:
        atomic.write(load_lock.envelope_path(settings), heard.envelope)
        atomic.write(settings.path(settings.network.lockfile), heard.data)
    ledger.set_fact("etag", heard.etag)
    load_lock.cache_verified_lock(settings, heard.verified_lock)


def record_accepted(settings: Settings, found: VerifiedLock, ledger: Ledger, now: datetime) -> None:
    """
    Check *found* against the time and the trust state, and record it there, durably, before anything that it causes.

    Raises:
        TrustError: it may not be acted on.
    """
    layout = load_lock.store_layout(settings)
    before = trust_state.read(layout, ledger)
    found.check_fresh(before, now)
    after = trust.advance_state(before, found.verified)
    if trust_state.in_file(layout) != after or ledger.trust_state() != after:
        trust_state.write(layout, ledger, after)


def apply_roots(settings: Settings, sources: tuple[str, ...], ledger: Ledger) -> trust.TrustRoot:
    """
    Walk the roots at *sources*, each kept before the next is looked at; return the one that is trusted then.

    Raises:
        TrustError: one does not follow from the one before it.
    """
    layout, trusted = load_lock.store_layout(settings), load_lock.trusted_root(settings)
    del ledger  # proof that the caller holds the store
    found = []
    for source in sources:
        envelope = _read(settings, source, from_settings=False, cap=LIMITS.root_bytes).data or b""
        with load_lock.naming_document(source):
            found.append((trust.root_version(envelope), source, envelope))
    for version, source, envelope in sorted(found):
        if version > trusted.version:
            with load_lock.naming_document(source):
                trusted = trust.advance(trusted, envelope, limits=LIMITS)
            trust_state.keep_root(layout, trusted.version, envelope)
    return trusted


def fetch_newer_roots(settings: Settings, ledger: Ledger) -> trust.TrustRoot:
    """Look for newer roots where the settings say, one version at a time, until there is none."""
    trusted = load_lock.trusted_root(settings)
    template = settings.network.root_updates
    for _ in range(LIMITS.root_rotations if template else 0):
        try:
            trusted = apply_roots(settings, (template.replace("{version}", str(trusted.version + 1)),), ledger)
        except (FetchError, SettingsError):
            break
    return trusted


def is_lock_current(settings: Settings, source: str, now: datetime) -> bool:
    """
    Say whether the lock on disk is what the snapshot at *source* compiles to. Changes nothing.

    Raises:
        LockMismatch: the lock was edited, or has no envelope.
        TrustError: the snapshot is not the network's word.
    """
    if settings.path(settings.network.lockfile).exists():
        load_lock.load_verified_lock(settings)
    return not fetch_snapshot(settings, source, now).changes


def has_usable_lock(settings: Settings) -> bool:
    """Say whether there is a lock that stays while the network does not answer."""
    try:
        load_lock.load_verified_lock(settings)
    except ReconcileError:
        return False
    return True
