"""
Probes sources: where each URL leads, and whether the server gives the blob, and in ranges. Small blobs come with the answer.

Rules that hold here:

1. Redirects are followed here, at most ``redirects`` of them, each checked by ``sources`` against the rules for the first URL's host;
   aria2 then gets only the last URL, and the header that its host is to be sent. A downloader that follows redirects by itself sends
   credentials to any host that a redirect names.
2. Connections are those of ``http``: to checked addresses.
3. The request is a GET for the first byte, not a HEAD: signed URLs are often valid for GET alone, and the answer shows whether ranges work.
   A *plain* request has no Range header. A small blob is asked for whole, so that the answer is the blob; it is hashed from the file.
4. A 401 that names a token service is answered with a token from there (``token_service``), once for each host on the way.
5. Headers are bounded by ``http.client`` (100 of 64 KiB), time by a deadline on the whole answer, bodies by the signed size. Another thread
   ends what is past its deadline. A name look-up that hangs in the system's resolver is abandoned with its thread.

``http.client`` and threads, not requests, httpx or aiohttp: their timeouts count single reads, and a connection in use cannot be ended from
another thread, which rule 5 needs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.fetch import bucket, error_pages, hashing, http, sources, token_service
from reconciler.fetch.connection import Connection, Endpoint, TlsContext, checked_addresses, endpoint_of
from reconciler.fetch.credentials import Credentials
from reconciler.fetch.hash_process import Hashed
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure, Refused, Rules
from reconciler.fetch.token_service import Challenge, Tokens

#: So many bytes of an unwanted answer are read to keep the connection; beyond that, a new connection is cheaper.
DRAIN_BYTES = 64 << 10
_ABANDON_SECONDS = 5.0
_MOST_SECONDS = 3600.0
_AGENT = "reconciler"


class ProbeRequest(Struct, frozen=True, kw_only=True):
    """
    Ask whether *url* has the blob *digest* of *size* bytes.

    *into*: write the blob to this file at once. *plain*: send no Range header. *token* comes back with the result.
    """

    token: int
    url: str
    digest: str
    size: int
    rules: Rules
    into: Path | None = None
    plain: bool = False


class Resolved(Struct, frozen=True, kw_only=True):
    """
    The source may have the blob: *url* is where the last redirect leads, *ranges* whether it gives parts of the file, and *authorization*
    the header that this very host is sent.
    """

    url: str
    ranges: bool
    authorization: str = ""

    def __repr__(self) -> str:
        """Leave the header out: values get printed in tracebacks and logs."""
        return f"Resolved(url={sources.redact(self.url)!r}, ranges={self.ranges})"

    def may_join(self, other: Resolved) -> bool:
        """Whether both may be one download, whose header goes to all its sources: none has one, or one host has the same for both."""
        if not (self.authorization or other.authorization):
            return True
        return (self.authorization, sources.host_of(self.url)) == (other.authorization, sources.host_of(other.url))


class InlineBody(Struct, frozen=True, kw_only=True):
    """All bytes that the server sent, written to ``into`` and hashed."""

    hashed: Hashed


ProbeResult = Resolved | InlineBody | Failure


class Resolver:
    """Threads that probe sources: ``submit`` takes requests, ``results`` returns (request, result) pairs."""

    def __init__(self, settings: FetchSettings, credentials: Credentials, wake: Callable[[], None]) -> None:
        self._settings, self._credentials, self._wake = settings, credentials, wake
        self._requests: queue.SimpleQueue[ProbeRequest | None] = queue.SimpleQueue()
        self._results: deque[tuple[ProbeRequest, ProbeResult]] = deque()
        self._workers: list[_Worker] = []
        self._most_workers = min(16, 4 * settings.concurrent)
        self._unfinished = 0
        self._tls = TlsContext(settings.ca_file)
        self._tokens = Tokens()

    @property
    def free_slots(self) -> int:
        """How many more requests are taken: as many wait as are under way, so that no thread is idle while results are stored."""
        return 2 * self._most_workers - self._unfinished

    def submit(self, request: ProbeRequest) -> None:
        """Queue *request*."""
        self._unfinished += 1
        self._requests.put(request)
        if len(self._workers) < min(self._most_workers, self._unfinished):
            self._add_worker()

    def refuse(self, request: ProbeRequest, failure: Failure) -> None:
        """Let *failure* be the result of *request*, which is not sent."""
        self._unfinished += 1
        self._results.append((request, failure))
        self._wake()

    def results(self) -> list[tuple[ProbeRequest, ProbeResult]]:
        """Return the results since the last call; end what is past its deadline."""
        self._end_overdue()
        found = []
        while self._results:
            found.append(self._results.popleft())
            self._unfinished -= 1
        return found

    def close(self) -> None:
        """Stop all threads; connections in use are ended."""
        for worker in self._workers:
            self._requests.put(None)
            worker.abandoned = True
            worker.abort()
        self._workers.clear()

    def _add_worker(self) -> None:
        worker = _Worker(self._settings, self._credentials, self._tls, self._tokens)
        self._workers.append(worker)
        threading.Thread(target=self._run_worker, args=(worker,), name="resolve", daemon=True).start()

    def _run_worker(self, worker: _Worker) -> None:
        while not worker.abandoned and (request := self._requests.get()) is not None:
            result = worker.probe(request)
            if not worker.abandoned:
                self._results.append((request, result))
                self._wake()
        worker.close()

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            deadline, request = worker.deadline, worker.request
            if request is None or now < deadline:
                continue
            worker.abort()
            if now > deadline + _ABANDON_SECONDS:
                worker.abandoned = True
                self._workers.remove(worker)
                self._results.append((request, _TIMED_OUT))
                self._add_worker()


class _Worker:
    """One thread's connections and its current request."""

    def __init__(self, settings: FetchSettings, credentials: Credentials, tls: TlsContext, tokens: Tokens | None = None) -> None:
        self._settings, self._credentials, self._tls = settings, credentials, tls
        self._tokens = tokens or Tokens()
        self._kept: dict[Endpoint, Connection] = {}
        self._current: Connection | None = None
        self.request: ProbeRequest | None = None
        self.deadline = 0.0
        self.abandoned = False

    def probe(self, request: ProbeRequest) -> ProbeResult:
        """Carry out *request*; whatever goes wrong is a ``Failure``."""
        self.deadline = time.monotonic() + self._settings.timeout_seconds
        self.request = request
        try:
            return self._follow(request)
        except Refused as error:
            return error.failure
        except ssl.SSLCertVerificationError as error:
            return Failure(text=f"its certificate is refused: {sources.clean(error.verify_message)}", final=True)
        except socket.gaierror:
            return Failure(text="its host's name leads to no address", permanent=False)
        except TimeoutError:
            return _TIMED_OUT
        except (OSError, HTTPException, UnicodeError) as error:
            return self._connection_failure(error)
        except Exception as error:  # noqa: BLE001  a bug here must not leave the request unanswered
            return Failure(text=f"unexpected: {type(error).__name__}", permanent=False)
        finally:
            self.request = None
            self._current = None

    def abort(self) -> None:
        """End the connection in use, from another thread."""
        if connection := self._current:
            connection.abort()

    def close(self) -> None:
        """Close what is kept open."""
        for connection in self._kept.values():
            connection.close()

    def _connection_failure(self, error: Exception) -> Failure:
        if time.monotonic() >= self.deadline:
            return _TIMED_OUT
        if isinstance(error, HTTPException) and not isinstance(error, OSError):
            cut_off = isinstance(error, IncompleteRead)
            return Failure(text=f"its answer is no HTTP ({type(error).__name__})", permanent=not cut_off)
        reason = getattr(error, "strerror", None) or type(error).__name__
        return Failure(text=f"the connection failed: {sources.clean(str(reason))}", permanent=False)

    def _follow(self, request: ProbeRequest) -> ProbeResult:
        url = first = bucket.locate(request.url)
        rules = request.rules if url == request.url else request.rules.naming(url)
        authorization, redirects = "", 0
        while redirects <= self._settings.redirects:
            rules.check(url, first if redirects else "")
            connection, response = self._exchange(request, rules, url, authorization or self._credentials.header(url) or "")
            headers = http.header_lists(response)
            try:
                challenge = _challenge(url, response, headers) if not authorization else None
                if challenge is None and response.status not in sources.REDIRECTS:
                    sent = authorization or self._credentials.header(url) or ""
                    return self._interpret(request, url, sent, response, headers)
                target = sources.redirect_target(url, headers) if challenge is None else url
            finally:
                self._keep_alive(connection, response)
            authorization = f"Bearer {self._token(request, rules, challenge)}" if challenge else ""
            redirects += challenge is None
            url = target
        raise Refused(f"it redirects more than {self._settings.redirects} times")

    def _token(self, request: ProbeRequest, rules: Rules, challenge: Challenge) -> str:
        """Return a token for *challenge*, from the service that it names."""
        if token := self._tokens.known(challenge):
            return token
        url = challenge.url
        rules.check(url, challenge.origin)
        connection, response = self._exchange(request, rules, url, self._credentials.header(url) or "", ranged=False)
        try:
            if response.status != 200:
                raise Refused(f"its token service {sources.host_of(url)} answers {sources.status_text(response.status)}")
            token, seconds = token_service.token_in(response.read(token_service.MOST_BYTES + 1))
        finally:
            self._keep_alive(connection, response)
        self._tokens.keep(challenge, token, seconds)
        return token

    def _interpret(
        self, request: ProbeRequest, url: str, authorization: str, response: HTTPResponse, headers: dict[str, list[str]]
    ) -> ProbeResult:
        if response.status not in {200, 206}:
            return sources.failure_of_status(response.status, headers, time.time())
        try:
            answer = sources.check_answer(response.status, headers, request.size)
        except sources.UnusableAnswer as error:
            return _failure(response, response.read(error_pages.MOST_BYTES) if _may_be_page(response) else b"", error.failure)
        if request.into is None:
            if authorization.startswith("Bearer ") and self._settings.proxy and not sources.is_loopback_name(sources.host_of(url)):
                raise Refused("a token is not sent through [download] proxy: a redirect could take it to another host")
            if answer.body < 0 and _may_be_page(response):
                beginning = response.read(error_pages.MOST_BYTES)
                if len(beginning) < min(request.size, error_pages.MOST_BYTES):
                    return _failure(response, beginning, _short(beginning, request))
            return Resolved(url=url, ranges=answer.ranges, authorization=authorization)
        return self._read_body(request, request.into, response)

    def _read_body(self, request: ProbeRequest, into: Path, response: HTTPResponse) -> ProbeResult:
        slowest = request.size / self._settings.min_rate_bytes if self._settings.min_rate_bytes else _MOST_SECONDS
        self.deadline = time.monotonic() + self._settings.slow_seconds + min(slowest, _MOST_SECONDS)
        data = response.read(request.size + 1)
        if len(data) > request.size:
            longer = Failure(text=f"it sends more than the signed {request.size} bytes", kind="size-mismatch")
            return _failure(response, data, longer)
        if time.monotonic() >= self.deadline:
            return _TIMED_OUT
        if len(data) < request.size:
            return _failure(response, data, _short(data, request))
        try:
            return InlineBody(hashed=write_and_hash(into, data, digests.parse(request.digest)[0]))
        except OSError as error:
            return InlineBody(hashed=Hashed(error=f"[Errno {error.errno}] {error.strerror}"))

    # -- one request ----------------------------------------------------------------------------------

    def _exchange(
        self, request: ProbeRequest, rules: Rules, url: str, authorization: str, *, ranged: bool = True
    ) -> tuple[Connection, HTTPResponse]:
        endpoint = endpoint_of(url)
        assert endpoint
        headers = self._headers(request, authorization, ranged=ranged and not request.plain)
        kept = self._kept.pop(endpoint, None)
        if kept:
            with contextlib.suppress(OSError, HTTPException):  # the server closed it meanwhile: once more, on a new one
                return kept, self._send(kept, url, headers)
            if time.monotonic() >= self.deadline:
                raise TimeoutError
        connection = self._connection(rules, endpoint)
        return connection, self._send(connection, url, headers)

    def _headers(self, request: ProbeRequest, authorization: str, *, ranged: bool) -> dict[str, str]:
        last = request.size - 1 if request.into else 0
        headers = {"User-Agent": _AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = f"bytes=0-{last}"
        if authorization:
            headers["Authorization"] = authorization
        return headers

    def _send(self, connection: Connection, url: str, headers: dict[str, str]) -> HTTPResponse:
        self._current = connection
        response = connection.ask(url, headers)
        if time.monotonic() >= self.deadline:
            response.close()
            connection.close()
            raise TimeoutError  # headers that were cut off look like headers that ended
        return response

    def _connection(self, rules: Rules, endpoint: Endpoint) -> Connection:
        proxy = "" if sources.is_loopback_name(endpoint.host) else self._settings.proxy
        addresses = () if proxy else checked_addresses(rules, endpoint)
        return Connection(endpoint, tls=self._tls, timeout=self._settings.timeout_seconds, addresses=addresses, proxy=proxy)

    def _keep_alive(self, connection: Connection, response: HTTPResponse) -> None:
        """Keep the connection for the next request, if what is left of the answer is short and the server agrees."""
        left = response.length
        with contextlib.suppress(OSError, HTTPException):
            if not response.isclosed() and left is not None and left <= DRAIN_BYTES:
                response.read(DRAIN_BYTES)
        if response.isclosed() and connection.sock and not connection.proxied and connection.endpoint not in self._kept:
            self._kept[connection.endpoint] = connection
        else:
            response.close()
            connection.close()


def _challenge(url: str, response: HTTPResponse, headers: dict[str, list[str]]) -> Challenge | None:
    """Return what token a refusal asks for, or None; a server may name several schemes."""
    if response.status != 401:
        return None
    found = [token_service.challenge_of(url, header) for header in headers.get("www-authenticate", ())]
    return next((one for one in found if one), None)


def _may_be_page(response: HTTPResponse) -> bool:
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    return response.status == 200 and (kind.startswith("text/") or kind.endswith(("json", "xml")))


def _failure(response: HTTPResponse, data: bytes, otherwise: Failure) -> Failure:
    """Return what an answer with *data*, which is not the blob, means: a page in its place, or *otherwise*."""
    page = error_pages.describe(response.getheader("Content-Type") or "", data) if _may_be_page(response) else ""
    return Failure(text=f"it answered with {page}") if page else otherwise


def _short(data: bytes, request: ProbeRequest) -> Failure:
    return Failure(text=f"it sent {len(data)} of the signed {request.size} bytes", permanent=False)


_TIMED_OUT = Failure(text="it did not answer in time", permanent=False)


def write_and_hash(path: Path, data: bytes, algorithm: str) -> Hashed:
    """Write *data* and hash what the file then holds."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        found, seen = hashing.inline(fd, algorithm)
    finally:
        os.close(fd)
    return Hashed(
        found=f"{algorithm}:{found}", size=seen.st_size, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns,
    )  # fmt: skip
