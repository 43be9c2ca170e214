"""Which hosts answer: one connection to each, with TLS where it is asked for, and nothing more; and whether the swarm's aria2c does."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import Struct

from reconciler.fetch.connection import Connection, Endpoint, TlsContext, endpoint_of

__all__ = ["Endpoint", "Reachability", "ask_swarm", "check_reachable", "endpoints"]

#: Connections that ``check_reachable`` makes at a time.
_AT_ONCE = 16


class Reachability(Struct, frozen=True, kw_only=True):
    """What became of one connection: how long it took, and why it failed; *error* is empty where it was made."""

    endpoint: Endpoint
    seconds: float
    error: str = ""


def endpoints(urls: Iterable[str]) -> list[Endpoint]:
    """Return where *urls* lead; what is no http URL is left out."""
    return [found for found in map(endpoint_of, urls) if found is not None]


def check_reachable(endpoints: Iterable[Endpoint], ca_file: Path | None, timeout_seconds: float) -> tuple[Reachability, ...]:
    """Connect to each of *endpoints*, with TLS where it asks for it, several at a time; return the results in their order."""
    tls = TlsContext(ca_file)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return tuple(threads.map(lambda endpoint: _check_one(endpoint, tls, timeout_seconds), endpoints))


def _check_one(endpoint: Endpoint, tls: TlsContext, timeout_seconds: float) -> Reachability:
    begun, error = time.monotonic(), ""
    try:
        with contextlib.closing(Connection(endpoint, tls=tls, timeout=timeout_seconds)) as connection:
            connection.connect()
    except ssl.SSLCertVerificationError as refused:
        error = f"its certificate is refused: {refused.verify_message}"
    except (OSError, UnicodeError) as failed:  # UnicodeError: a name that is none
        error = str(getattr(failed, "strerror", None) or str(failed) or type(failed).__name__)
    return Reachability(endpoint=endpoint, seconds=time.monotonic() - begun, error=error)


def ask_swarm(folder: Path) -> tuple[int, str]:
    """Return how many torrents the swarm's aria2c whose folder is *folder* has, and why it does not answer; empty where it does."""
    from reconciler.fetch import swarm_daemon  # most nodes have none

    try:
        return len(swarm_daemon.Client(folder).known()), ""
    except swarm_daemon.SwarmLost as error:
        return 0, str(error)
