"""
The record of the attempts to fetch the snapshot: when one last succeeded, and since when the snapshot is refused or cannot be fetched.

Rules that hold here:

1. The record is a fact of the ledger, written durably within the attempt, and bounded: three instants, and texts that are cut.
2. It belongs to one address. Under another address in the settings, nothing was fetched yet.
3. A refusal is recorded until a snapshot is accepted again: a network that is out of reach in between takes it back no more than time does.
   Any answer ends the time of being out of reach.
4. The times follow the clock as those of ``store.clock`` do: a clock that is set makes no silence, and ends none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta

from msgspec import Struct
from msgspec.structs import replace

from reconciler.commands import documents
from reconciler.commands.context import NodeContext
from reconciler.core import digest, units
from reconciler.core.errors import FetchError, NetworkSilent, ReconcileError, SettingsError, StoreError, TrustError
from reconciler.core.text import printable
from reconciler.store import clock
from reconciler.store.clock import ClockReading
from reconciler.store.ledger import Ledger

_FACT = "heard"
#: Characters of a message that are kept.
_MAX_TEXT = 500


class Refused(Struct, frozen=True, kw_only=True):
    """That the document at the snapshot's address is refused."""

    at: datetime  #: When it was refused last.
    name: str  #: The error's name.
    message: str  #: The error's message.
    since: datetime  #: When it was refused first, since a snapshot was last accepted.


class Unreachable(Struct, frozen=True, kw_only=True):
    """That the snapshot cannot be fetched."""

    at: datetime  #: The last attempt.
    cause: str  #: Why it failed.
    since: datetime  #: The first of the attempts that failed one after the other.


class FetchStatus(Struct, frozen=True, kw_only=True):
    """What the attempts to fetch the snapshot from the address in the settings met."""

    #: When a snapshot was last fetched and accepted, even if it was the same as before; null: never from this address.
    last: datetime | None = None
    #: Why the snapshot is refused; null where none was since the last one was accepted.
    refused: Refused | None = None
    #: Why nothing can be fetched; null where the last attempt was answered.
    unreachable: Unreachable | None = None


class _Record(Struct, frozen=True, kw_only=True):
    #: SHA-256 of the address: it may be long, and may contain a secret.
    address: str
    fetches: FetchStatus
    reading: ClockReading


def read(context: NodeContext, ledger: Ledger) -> FetchStatus:
    """Return what the attempts to fetch from the address in the settings met."""
    record = ledger.fact(_FACT, _Record)
    return record.fetches if record and record.address == _address(context) else FetchStatus()


@contextlib.contextmanager
def recorded(context: NodeContext, source: str, ledger: Ledger, now: datetime) -> Iterator[None]:
    """Record how the attempt inside ends, and raise its error again; nothing where *source* is another address than the settings'."""
    if source not in {"", context.snapshot}:
        yield
        return
    try:
        yield
    except (TrustError, FetchError, SettingsError) as error:
        with contextlib.suppress(StoreError):  # the attempt's own error says more
            _write(context, ledger, now, error)
        raise
    _write(context, ledger, now, None)


def _write(context: NodeContext, ledger: Ledger, now: datetime, error: ReconcileError | None) -> None:
    before, now = ledger.fact(_FACT, _Record), now.replace(microsecond=0)
    reading, moved = clock.next_reading(before.reading if before else None, now, clock.boot_time())
    fetches = _moved(before.fetches, moved, now) if before and before.address == _address(context) else FetchStatus()
    ledger.set_fact(_FACT, _Record(address=_address(context), fetches=_after(fetches, now, error, context.snapshot), reading=reading))


def _after(before: FetchStatus, now: datetime, error: ReconcileError | None, address: str) -> FetchStatus:
    if error is None:
        return FetchStatus(last=now)
    message = printable(error.message.replace(address, documents.redacted(address)), _MAX_TEXT)
    if isinstance(error, TrustError):
        since = before.refused.since if before.refused else now
        return replace(before, refused=Refused(at=now, name=error.name, message=message, since=since), unreachable=None)
    since = before.unreachable.since if before.unreachable else now
    return replace(before, unreachable=Unreachable(at=now, cause=message, since=since))


def _address(context: NodeContext) -> str:
    return digest.of(context.snapshot.encode())


def _moved(fetches: FetchStatus, seconds: float, now: datetime) -> FetchStatus:
    """Return *fetches* with its times moved by *seconds*, as the clock was; none is after *now*."""

    def move(instant: datetime) -> datetime:
        return min(instant + timedelta(seconds=seconds), now)

    refused, unreachable = fetches.refused, fetches.unreachable
    return FetchStatus(
        last=fetches.last and move(fetches.last),
        refused=refused and replace(refused, at=move(refused.at), since=move(refused.since)),
        unreachable=unreachable and replace(unreachable, at=move(unreachable.at), since=move(unreachable.since)),
    )


def failure(context: NodeContext, error: FetchError, now: datetime) -> FetchError | None:
    """Return with what a sync ends that could not fetch because of *error*; None where the network is silent for a short time only."""
    with Ledger.reading(context.layout.ledger) as ledger:
        fetches = read(context, ledger)
    if fetches.last is None:
        hint = "check [network] snapshot in the settings, DNS, the firewall and the proxy; `reconcile doctor` tests the connection"
        return FetchError(f"{error.message}; no snapshot was ever fetched from this address", hint=hint)
    if not is_silent(fetches, context.quiet_seconds, now):
        return None
    assert fetches.unreachable
    silence = units.human_time(units.age_seconds(fetches.unreachable.since, now))
    return NetworkSilent(f"no snapshot could be fetched for {silence}: {error.message}")


def is_silent(fetches: FetchStatus, quiet_seconds: float, now: datetime) -> bool:
    """Return whether nothing could be fetched for longer than *quiet_seconds*."""
    return fetches.unreachable is not None and units.age_seconds(fetches.unreachable.since, now) > quiet_seconds


def is_late(fetches: FetchStatus, quiet_seconds: float, now: datetime) -> bool:
    """Return whether that nothing can be fetched is an error: it never could, or not for longer than *quiet_seconds*."""
    return fetches.unreachable is not None and (fetches.last is None or is_silent(fetches, quiet_seconds, now))


def describe_refusal(fetches: FetchStatus, now: datetime) -> str:
    """Return that the snapshot is refused, for how long and why, as a clause."""
    assert fetches.refused
    age = units.human_time(units.age_seconds(fetches.refused.since, now))
    return f"the snapshot at the configured address has been refused for {age} ({fetches.refused.name}: {fetches.refused.message})"


def describe_failure(fetches: FetchStatus, now: datetime) -> str:
    """Return that the snapshot cannot be fetched, for how long and why, as a clause."""
    assert fetches.unreachable
    if fetches.last is None:
        return f"no snapshot was ever fetched from the configured address ({fetches.unreachable.cause})"
    age = units.human_time(units.age_seconds(fetches.unreachable.since, now))
    return f"no snapshot could be fetched for {age} ({fetches.unreachable.cause})"
