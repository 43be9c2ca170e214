"""
Sends statuses to where the network's operator collects them: a folder, or an https address that takes POST.

Rules that hold here:

1. All of it ends within the time that the caller gives, whatever the receiver does.
2. To a folder goes the newest status alone, as ``<node id>.json``, which replaces the one before. The folder is not made: where it is
   missing, a file system is not mounted.
3. To an address each waiting status goes by itself, the oldest first: ``POST``, ``Content-Type: application/json``, answered with any 2xx.
   A redirect is a failure: the operator named one address. All of them go over one connection, if the receiver keeps it.
4. A status that the receiver will never take (400, 409, 413, 422) is dropped; after any other failure it waits.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler.core.errors import ReconcileError
from reconciler.core.text import printable
from reconciler.fetch import sources
from reconciler.fetch.connection import Connection, KeptConnections, TlsContext, checked_addresses, endpoint_of, proxy_for
from reconciler.fetch.http import header_lists
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Refused, Rules
from reconciler.fleet.outbox import Outbox
from reconciler.store import atomic

#: Answers with which a receiver says that it will never take this status.
_NEVER = frozenset({400, 409, 413, 422})


class Delivery(Struct, frozen=True, kw_only=True):
    """How sending ended: how many statuses were sent and dropped, how many wait, and why; *error* is empty where nothing failed."""

    sent: int = 0
    dropped: int = 0
    waiting: int = 0
    error: str = ""


class _NotTaken(Exception):
    def __init__(self, text: str, *, never: bool = False, asked_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.never, self.asked_seconds = never, asked_seconds


def deliver(outbox: Outbox, to: str, node: str, settings: FetchSettings, now: datetime, *, within_seconds: float) -> Delivery:
    """
    Send what waits in *outbox* to *to*, a folder or an address, for the node *node*, in at most *within_seconds*.

    Raises:
        StoreError: the queue's own disk refused.
    """
    waiting = outbox.waiting()
    if not waiting or not outbox.may_send(now):
        return Delivery(waiting=len(waiting))
    if "://" not in to:
        return _to_folder(outbox, waiting, Path(to), node, now)
    return _to_address(outbox, waiting, to, settings, now, time.monotonic() + within_seconds)


def _to_folder(outbox: Outbox, waiting: list[Path], folder: Path, node: str, now: datetime) -> Delivery:
    try:
        if not folder.is_dir():
            raise FileNotFoundError(0, "there is no such folder")
        atomic.write(folder / f"{node}.json", atomic.read(waiting[-1]))
    except (ReconcileError, OSError) as error:
        outbox.failed(now)
        return Delivery(waiting=len(waiting), error=str(getattr(error, "strerror", None) or error))
    outbox.sent(waiting)
    return Delivery(sent=1)


def _to_address(outbox: Outbox, waiting: list[Path], url: str, settings: FetchSettings, now: datetime, deadline: float) -> Delivery:
    sent = dropped = 0
    kept = KeptConnections()
    with contextlib.closing(kept):
        for path in waiting:
            try:
                _post(url, path.read_bytes(), settings, deadline, kept)
                sent += 1
            except _NotTaken as error:
                if not error.never:
                    outbox.failed(now, asked_seconds=error.asked_seconds)
                    return Delivery(sent=sent, dropped=dropped, waiting=len(waiting) - sent - dropped, error=str(error))
                dropped += 1
            outbox.sent([path])
    return Delivery(sent=sent, dropped=dropped)


def _post(url: str, data: bytes, settings: FetchSettings, deadline: float, kept: KeptConnections) -> None:
    try:
        if (open_one := kept.take(url)) is not None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the receiver closed it meanwhile: once more, on a new one
                open_one.sock.settimeout(max(deadline - time.monotonic(), 0.001))
                _post_over(open_one, url, data, deadline, kept)
                return
        _post_over(_connection(url, settings, deadline), url, data, deadline, kept)
    except Refused as error:
        raise _NotTaken(f"{sources.redact(url)}: {error}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise _NotTaken(f"{sources.redact(url)}: {printable(str(cause), 200)}") from None


def _post_over(connection: Connection, url: str, data: bytes, deadline: float, kept: KeptConnections) -> None:
    is_kept = False
    try:
        with _ended_at(connection, deadline):
            answer = connection.ask(url, {"User-Agent": "reconcile", "Content-Type": "application/json"}, data)
            if connection.aborted:
                raise TimeoutError("it did not answer in time")
            is_kept = kept.keep(url, connection, answer)
            _check(answer, url)
    finally:
        if not is_kept:
            connection.close()


def _connection(url: str, settings: FetchSettings, deadline: float) -> Connection:
    host = sources.host_of(url)
    rules = Rules(hosts=None, trusted=frozenset({host}), allow_http=settings.allow_http)
    rules.check(url)
    endpoint = endpoint_of(url)
    left = deadline - time.monotonic()
    if endpoint is None or left <= 0:
        raise TimeoutError("there was no time left")
    proxy = proxy_for(endpoint.host, settings.proxy, tls=endpoint.tls)
    addresses = () if proxy else checked_addresses(rules, endpoint)
    return Connection(endpoint, tls=TlsContext(settings.ca_file), timeout=left, addresses=addresses, proxy=proxy)


@contextlib.contextmanager
def _ended_at(connection: Connection, deadline: float) -> Iterator[None]:
    timer = threading.Timer(max(deadline - time.monotonic(), 0.0), connection.abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(answer: http.client.HTTPResponse, url: str) -> None:
    if 200 <= answer.status < 300:
        return
    text = f"{sources.redact(url)} answered {answer.status} {sources.clean(answer.reason, 60)}"
    failure = sources.failure_of_status(answer.status, header_lists(answer), time.time())
    raise _NotTaken(text, never=answer.status in _NEVER, asked_seconds=failure.retry_after)
