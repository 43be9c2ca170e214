"""
Hearing the network: a snapshot or a root is fetched or read, verified, and made the node's own.

Rules that hold here:

1. The floor is written before anything that a snapshot causes; then the envelope, then the lock.
2. A network that does not answer changes nothing: the last known lock stays, and the caller says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from reconciler import digest, trust, units
from reconciler import lock as locks
from reconciler.engine import confirm
from reconciler.engine.confirm import LIMITS, Confirmed
from reconciler.errors import FetchError, ReconcileError, SettingsError, TrustError
from reconciler.ports import Incident
from reconciler.settings import Settings
from reconciler.store import ballast, durable, floor, writer
from reconciler.store.ledger import Ledger
from reconciler.trust import Floor

if TYPE_CHECKING:
    from reconciler.fetch.document import Document


class Etag(Struct, frozen=True, kw_only=True):
    """The name that a server gave to a document."""

    url: str
    etag: str
    #: Digest of the document.
    envelope: str


class Heard(Struct, frozen=True, kw_only=True):
    """A snapshot that was accepted, with the lock that it compiles to."""

    confirmed: Confirmed
    envelope: bytes
    #: The lock's bytes.
    data: bytes
    #: Whether the lock on disk is another.
    changes: bool
    #: What the server calls this very document, to be asked only for another.
    etag: Etag | None = None


def read_floor(settings: Settings) -> Floor:
    """Return the store's floor, without a trace; raises FloorLost."""
    layout = confirm.layout_of(settings)
    with Ledger.reading(layout.ledger) as ledger:
        return floor.read(layout, ledger)


@contextlib.contextmanager
def held_store(settings: Settings, *, timeout_seconds: float = 0.0) -> Iterator[Ledger]:
    """Hold the store, made if it is missing, and open its ledger for writing."""
    layout = confirm.layout_of(settings)
    durable.make_folder(layout.root)
    with durable.refusals(f"read the store {layout.root}"):
        layout.check(shelves=True)
    with (
        writer.hold(layout.writer, timeout_seconds=timeout_seconds),
        ballast.dropped_when_full(layout.ballast),
        Ledger.writing(layout.ledger) as ledger,
    ):
        yield ledger


@contextlib.contextmanager
def logged_refusals(ledger: Ledger, now: datetime, source: str = "") -> Iterator[None]:
    """Log as an incident what is not the network's word, and let the refusal pass."""
    try:
        yield
    except TrustError as error:
        ledger.incident(Incident(kind=error.name, detail=error.message, source=source), now)
        raise


def hear(settings: Settings, source: str, now: datetime) -> Heard:
    """
    Return the snapshot at *source*, a URL or path; an empty one is the settings'. Changes nothing.

    Raises:
        FetchError: nobody answers.
        TrustError: it is not the network's word, not now, or not any more.
    """
    envelope, etag = _heard(settings, source)
    trusted = confirm.root(settings)
    with confirm.naming(source or settings.network.snapshot):
        verified = trust.verify(envelope, trusted, now=now, floor=read_floor(settings), limits=LIMITS)
    lock = locks.compile(verified)
    data = locks.encode(lock)
    found = confirm.confirmed(lock, locks.digest_of(data), verified, trusted)
    return Heard(confirmed=found, envelope=envelope, data=data, changes=not _on_disk(settings, data, envelope), etag=etag)


def _on_disk(settings: Settings, data: bytes, envelope: bytes) -> bool:
    try:
        kept = settings.path(settings.network.lockfile).read_bytes(), confirm.envelope_path(settings).read_bytes()
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
    with Ledger.reading(confirm.layout_of(settings).ledger) as ledger:
        etag = ledger.fact("etag", Etag)
    if etag is None or etag.url != url:
        return None
    try:
        envelope = confirm.read_capped(confirm.envelope_path(settings))
    except OSError:
        return None
    return (envelope, etag) if digest.of(envelope) == etag.envelope else None


def _read(settings: Settings, source: str, *, from_settings: bool, cap: int = LIMITS.envelope_bytes, etag: str = "") -> Document:
    from reconciler.fetch import document  # TLS comes with it, and a plan needs none

    if document.is_url(source):
        download = settings.download
        try:
            return document.get(
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
            return document.Document(data=file.read(cap + 1))
    except OSError as error:
        where = "name its URL or file as [network] snapshot in the settings" if from_settings else "give the signed document's URL or file"
        raise SettingsError(f"{path} cannot be read: {error.strerror}", hint=where) from None


def accept(settings: Settings, heard: Heard, ledger: Ledger, now: datetime) -> None:
    """Make what was heard the node's own: floor first, then envelope and lock. The caller holds the store."""
    layout = confirm.layout_of(settings)
    raise_floor(settings, heard.confirmed, ledger, now)
    floor.keep_envelope(layout, heard.envelope)
    if heard.changes:
        durable.write(confirm.envelope_path(settings), heard.envelope)
        durable.write(settings.path(settings.network.lockfile), heard.data)
    ledger.set_fact("etag", heard.etag)
    confirm.remember(settings, heard.confirmed)


def raise_floor(settings: Settings, found: Confirmed, ledger: Ledger, now: datetime) -> None:
    """
    Check *found* against time and floor, and raise the floor to it, durably, before anything is done on its word.

    Raises:
        TrustError: it may not be acted on.
    """
    layout = confirm.layout_of(settings)
    before = floor.read(layout, ledger)
    found.admit(before, now)
    after = trust.raised(before, found.verified, now)
    if (before.version, before.digest, before.role) != (after.version, after.digest, after.role) or not floor.in_file(layout):
        floor.write(layout, ledger, after)
    else:
        ledger.set_fact("floor", after)  # the time alone: the file need not be written every five minutes


def update_roots(settings: Settings, sources: tuple[str, ...], ledger: Ledger) -> trust.TrustRoot:
    """
    Walk the roots at *sources*, each kept before the next is looked at; return the one that is trusted then.

    Raises:
        TrustError: one does not follow from the one before it.
    """
    layout, trusted = confirm.layout_of(settings), confirm.root(settings)
    del ledger  # proof that the caller holds the store
    found = []
    for source in sources:
        envelope = _read(settings, source, from_settings=False, cap=LIMITS.root_bytes).data or b""
        with confirm.naming(source):
            found.append((trust.root_version(envelope), source, envelope))
    for version, source, envelope in sorted(found):
        if version > trusted.version:
            with confirm.naming(source):
                trusted = trust.advance(trusted, envelope, limits=LIMITS)
            floor.keep_root(layout, trusted.version, envelope)
    return trusted


def follow_roots(settings: Settings, ledger: Ledger) -> trust.TrustRoot:
    """Look for newer roots where the settings say, one version at a time, until there is none."""
    trusted = confirm.root(settings)
    template = settings.network.root_updates
    for _ in range(LIMITS.root_rotations if template else 0):
        try:
            trusted = update_roots(settings, (template.replace("{version}", str(trusted.version + 1)),), ledger)
        except (FetchError, SettingsError):
            break
    return trusted


def check_lock(settings: Settings, source: str, now: datetime) -> bool:
    """
    Say whether the lock on disk is what the snapshot at *source* compiles to. Changes nothing.

    Raises:
        LockMismatch: the lock was edited, or has no envelope.
        TrustError: the snapshot is not the network's word.
    """
    if settings.path(settings.network.lockfile).exists():
        confirm.confirm(settings)
    return not hear(settings, source, now).changes


def has_last_word(settings: Settings) -> bool:
    """Say whether there is a lock that stays while the network does not answer."""
    try:
        confirm.confirm(settings)
    except ReconcileError:
        return False
    return True
