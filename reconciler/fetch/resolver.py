"""
Asks servers where the bytes really are, before anything is transferred.

Rules that hold here:

1. Redirects are followed here, at most ``redirects`` of them, each checked by ``sources`` like the first URL; the downloader is then
   given the last URL alone. One that follows redirects by itself would carry credentials to wherever it is sent.
2. A host's name is looked up once, every address is checked, and the connection goes to a checked address: a name that leads
   elsewhere at the second look-up gains nothing. With a proxy, the proxy looks names up.
3. The question is a GET for the first byte, not a HEAD: signed URLs are often good for GET alone, and the answer tells whether ranges work.
   A small blob is asked for whole, so that the answer is the blob; it is hashed as it lies in the file.
4. Headers are bounded by ``http.client`` (100 of 64 KiB), time by a deadline on the whole answer, bodies by the signed size. A look-up that
   hangs in the system's resolver is abandoned with its thread.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.fetch import hashing, sources
from reconciler.fetch.credentials import Credentials
from reconciler.fetch.http_connection import Connection, Tls, addresses, proxy_header
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure, Refused, Rules

#: Of an answer that is not wanted, read so much to keep the connection; past it, a new connection is cheaper.
DRAIN_BYTES = 64 << 10
_ABANDON_SECONDS = 5.0
_MOST_SECONDS = 3600.0
_AGENT = "reconciler"


class Question(Struct, frozen=True, kw_only=True):
    """May *url* have the blob? With *into*, and if it may: bring it there. *token* comes back with the answer."""

    token: int
    url: str
    digest: str
    size: int
    rules: Rules
    into: Path | None = None


class Resolved(Struct, frozen=True, kw_only=True):
    """*url* is where the last redirect leads. *ranges*: parts can be had. *sized*: the length was told, and is the signed one."""

    url: str
    ranges: bool
    sized: bool


class Brought(Struct, frozen=True, kw_only=True):
    """All bytes that the server gave, in the file that was asked for, hashed."""

    hashed: hashing.Hashed


Reply = Resolved | Brought | Failure


class Resolver:
    """Some threads that ask servers. Questions in, (question, reply) out."""

    def __init__(self, settings: FetchSettings, credentials: Credentials, wake: Callable[[], None]) -> None:
        self._settings, self._credentials, self._wake = settings, credentials, wake
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._replies: deque[tuple[Question, Reply]] = deque()
        self._hands: list[_Hand] = []
        self._most = min(16, 4 * settings.concurrent)
        self._open = 0
        self._tls = Tls(settings)

    @property
    def room(self) -> int:
        """How many more questions would be asked at once."""
        return self._most - self._open

    def ask(self, question: Question) -> None:
        """Have *question* asked."""
        self._open += 1
        self._questions.put(question)
        if len(self._hands) < min(self._most, self._open):
            self._add_hand()

    def replies(self) -> list[tuple[Question, Reply]]:
        """Return what came in since the last time; end what is past its deadline."""
        self._expire()
        found = []
        while self._replies:
            found.append(self._replies.popleft())
            self._open -= 1
        return found

    def close(self) -> None:
        """Stop; what runs is cut off."""
        for hand in self._hands:
            self._questions.put(None)
            hand.abandoned = True
            hand.cut()
        self._hands.clear()

    def _add_hand(self) -> None:
        hand = _Hand(self._settings, self._credentials, self._tls)
        self._hands.append(hand)
        threading.Thread(target=self._work, args=(hand,), name="resolve", daemon=True).start()

    def _work(self, hand: _Hand) -> None:
        while not hand.abandoned and (question := self._questions.get()) is not None:
            reply = hand.answer(question)
            if not hand.abandoned:
                self._replies.append((question, reply))
                self._wake()
        hand.close()

    def _expire(self) -> None:
        now = time.monotonic()
        for hand in list(self._hands):
            deadline, question = hand.deadline, hand.question
            if question is None or now < deadline:
                continue
            hand.cut()
            if now > deadline + _ABANDON_SECONDS:
                hand.abandoned = True
                self._hands.remove(hand)
                self._replies.append((question, _SILENT))
                self._add_hand()


class _Hand:
    """One thread's connections and what it is about."""

    def __init__(self, settings: FetchSettings, credentials: Credentials, tls: Tls) -> None:
        self._settings, self._credentials, self._tls = settings, credentials, tls
        self._kept: dict[tuple[str, str, int], Connection] = {}
        self._current: Connection | None = None
        self.question: Question | None = None
        self.deadline = 0.0
        self.abandoned = False

    def answer(self, question: Question) -> Reply:
        """Answer *question*; whatever goes wrong is a ``Failure``."""
        self.deadline = time.monotonic() + self._settings.timeout_seconds
        self.question = question
        try:
            return self._follow(question)
        except Refused as error:
            return error.failure
        except ssl.SSLCertVerificationError as error:
            return Failure(text=f"its certificate is refused: {sources.clean(error.verify_message)}")
        except socket.gaierror:
            return Failure(text="its host's name leads to no address", permanent=False)
        except TimeoutError:
            return _SILENT
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            return self._broken(error)
        except Exception as error:  # noqa: BLE001  a bug here must not leave the question open for ever
            return Failure(text=f"unexpected: {type(error).__name__}", permanent=False)
        finally:
            self.question = None
            self._current = None

    def cut(self) -> None:
        """End the connection in use, from another thread: its reads and writes then fail there."""
        connection = self._current
        sock = connection.sock if connection else None
        if sock:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # a TLS socket's own would take its state from under the thread that reads

    def close(self) -> None:
        """Close what is kept open."""
        for connection in self._kept.values():
            connection.close()

    def _broken(self, error: Exception) -> Failure:
        if time.monotonic() >= self.deadline:
            return _SILENT
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            cut_off = isinstance(error, http.client.IncompleteRead)
            return Failure(text=f"its answer is no HTTP ({type(error).__name__})", permanent=not cut_off)
        said = getattr(error, "strerror", None) or type(error).__name__
        return Failure(text=f"the connection failed: {sources.clean(str(said))}", permanent=False)

    def _follow(self, question: Question) -> Reply:
        url = question.url
        for _ in range(self._settings.redirects + 1):
            question.rules.check(url)
            connection, response = self._request(question, url)
            headers: dict[str, list[str]] = {}
            for name, value in response.getheaders():
                headers.setdefault(name.lower(), []).append(value)
            try:
                if response.status not in sources.REDIRECTS:
                    return self._judge(question, url, response, headers)
                url = sources.target(url, headers)
            finally:
                self._keep(connection, response)
        raise Refused(f"it redirects more than {self._settings.redirects} times")

    def _judge(self, question: Question, url: str, response: http.client.HTTPResponse, headers: dict[str, list[str]]) -> Reply:
        if response.status not in {200, 206}:
            return sources.failed(response.status, headers, time.time())
        answer = sources.judge(response.status, headers, question.size)
        if question.into is None:
            return Resolved(url=url, ranges=answer.ranges, sized=answer.ranges or answer.body >= 0)
        return self._bring(question, question.into, response)

    def _bring(self, question: Question, into: Path, response: http.client.HTTPResponse) -> Reply:
        slowest = question.size / self._settings.min_rate_bytes if self._settings.min_rate_bytes else _MOST_SECONDS
        self.deadline = time.monotonic() + self._settings.slow_seconds + min(slowest, _MOST_SECONDS)
        data = response.read(question.size + 1)
        if len(data) > question.size:
            return Failure(text=f"it sends more than the signed {question.size} bytes", kind="size-mismatch")
        if time.monotonic() >= self.deadline:
            return _SILENT
        if len(data) < question.size:
            return Failure(text=f"it sent {len(data)} of the signed {question.size} bytes", permanent=False)
        try:
            return Brought(hashed=_written(into, data, digests.parse(question.digest)[0]))
        except OSError as error:
            return Brought(hashed=hashing.Hashed(error=f"[Errno {error.errno}] {error.strerror}"))

    # -- one request ----------------------------------------------------------------------------------

    def _request(self, question: Question, url: str) -> tuple[Connection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        host, tls = sources.host_of(url), parts.scheme == "https"
        place = (parts.scheme, host, parts.port or (443 if tls else 80))
        headers = self._headers(question, url)
        path = url if self._proxied(host) and not tls else (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        kept = self._kept.pop(place, None)
        if kept:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server closed it meanwhile: once more, on a new one
                return kept, self._asked(kept, path, headers)
            kept.close()
            if time.monotonic() >= self.deadline:
                raise TimeoutError
        made = self._open(question.rules, place)
        return made, self._asked(made, path, headers)

    def _headers(self, question: Question, url: str) -> dict[str, str]:
        last = question.size - 1 if question.into else 0
        headers = {"User-Agent": _AGENT, "Accept": "*/*", "Accept-Encoding": "identity", "Range": f"bytes=0-{last}"}
        if credential := self._credentials.header(url):
            headers["Authorization"] = credential
        if self._proxied(sources.host_of(url)) and urlsplit(url).scheme == "http":
            headers |= proxy_header(self._settings.proxy)
        return headers

    def _proxied(self, host: str) -> bool:
        return bool(self._settings.proxy) and not sources.is_loopback_name(host)

    def _asked(self, connection: Connection, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._current = connection
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        if time.monotonic() >= self.deadline:
            connection.close()
            raise TimeoutError  # headers that were cut off look like headers that ended
        return response

    def _open(self, rules: Rules, place: tuple[str, str, int]) -> Connection:
        scheme, host, port = place
        tls = self._tls.context() if scheme == "https" else None
        timeout = self._settings.timeout_seconds
        if not self._proxied(host):
            direct = Connection(host, port, tls=tls, addresses=addresses(rules, host, port), timeout=timeout)
            direct.place = place
            return direct
        proxy = urlsplit(self._settings.proxy)
        made = Connection(proxy.hostname or "", proxy.port or 8080, tls=tls, addresses=(), timeout=timeout)
        if tls:
            made.through(host, port, proxy_header(self._settings.proxy))
        return made

    def _keep(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        """Keep the connection for the next question, if what is left of the answer is short and the server agrees."""
        left = response.length
        with contextlib.suppress(OSError, http.client.HTTPException):
            if not response.isclosed() and left is not None and left <= DRAIN_BYTES:
                response.read(DRAIN_BYTES)
        if response.isclosed() and connection.sock and connection.place and connection.place not in self._kept:
            self._kept[connection.place] = connection
        else:
            response.close()
            connection.close()


_SILENT = Failure(text="it did not answer in time", permanent=False)


def _written(path: Path, data: bytes, algorithm: str) -> hashing.Hashed:
    """Write *data* and hash what the file then holds."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        found, seen = hashing.inline(fd, algorithm)
    finally:
        os.close(fd)
    return hashing.Hashed(
        found=f"{algorithm}:{found}", size=seen.st_size, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns,
    )  # fmt: skip
