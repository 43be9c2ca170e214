"""
Until when the snapshot's server asked to be left alone (Retry-After, with 429 or 503): kept over restarts.

Rules that hold here:

1. A run that nobody waits for (``sync``, the agent) obeys. A person who asks for the lock is not kept waiting.
2. It holds for ``LONGEST_SECONDS`` at most. A time that lies further ahead is of a clock that was wrong, and counts for nothing.
3. It belongs to one address, and ends with the first snapshot that comes from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta

from msgspec import Struct

from reconciler.commands import documents
from reconciler.core import digest, units
from reconciler.core.errors import FetchError, StoreError
from reconciler.store.ledger import Ledger

#: As for the sources of blobs (``fetch.host_health``).
LONGEST_SECONDS = 3600.0
_FACT = "snapshot-left-alone"


class _RetryAfter(Struct, frozen=True, kw_only=True):
    #: SHA-256 of the address: it may contain a secret.
    address: str
    until: datetime


@contextlib.contextmanager
def remembered(address: str, ledger: Ledger, now: datetime) -> Iterator[None]:
    """Remember what the server at *address*, which is asked inside, asks for, and raise its refusal again."""
    known = ledger.fact(_FACT, _RetryAfter)
    try:
        yield
    except FetchError as error:
        if error.asked_seconds > 0:
            until = now + timedelta(seconds=min(error.asked_seconds, LONGEST_SECONDS))
            with contextlib.suppress(StoreError):  # the refusal says more
                ledger.set_fact(_FACT, _RetryAfter(address=digest.of(address.encode()), until=until))
        raise
    if known is not None:
        ledger.set_fact(_FACT, None)


def check(address: str, ledger: Ledger, now: datetime) -> None:
    """
    Refuse to ask *address* while it is to be left alone.

    Raises:
        FetchError: it is.
    """
    found = ledger.fact(_FACT, _RetryAfter)
    if found is None or found.address != digest.of(address.encode()):
        return
    left = (found.until - now).total_seconds()
    if 0 < left <= LONGEST_SECONDS:
        raise FetchError(
            f"the server of {documents.redacted(address)} asked to be left alone (Retry-After), for another {units.human_time(left)}; "
            "`reconcile lock` asks it all the same"
        )
