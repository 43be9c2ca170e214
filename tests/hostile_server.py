"""
An HTTP server that misbehaves in every way that downloaders were seen to fall for.

A behaviour is a function of an ``Exchange``: it gets a parsed request and a raw socket, and sends whatever it likes. Each path of a
``HostileServer`` has one; what was asked and how many body bytes were sent is recorded. Loopback only; closing ends everything.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

CHUNK = 65536


class Gone(Exception):
    """The connection is to be closed."""


@dataclass
class Exchange:
    """One request and the way to answer it."""

    server: HostileServer
    sock: socket.socket
    method: str
    path: str
    headers: dict[str, str]
    #: How often this path was asked before.
    nth: int

    @property
    def range(self) -> tuple[int, int | None] | None:
        """First and last byte of the range that is asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) if found[2] else None) if found else None

    @property
    def is_probe(self) -> bool:
        """Whether only the first byte is asked for."""
        return self.range == (0, 0)

    def send(self, data: bytes | memoryview) -> None:
        """Send *data*; raise where the client is gone or the server closes."""
        if self.server.closing.is_set():
            raise Gone
        self.sock.sendall(data)

    def head(self, status: int, *headers: tuple[str, object]) -> None:
        """Send a status line and headers."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self.send(f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n".encode("latin-1"))

    def body(self, data: bytes | memoryview, *, rate: float = 0) -> None:
        """Send *data* in pieces, *rate* bytes a second at most, and count it."""
        view = memoryview(data)
        step = CHUNK if not rate else max(1, min(CHUNK, int(rate / 20)))
        for start in range(0, len(view), step):
            part = view[start : start + step]
            self.send(part)
            self.server.count(self.path, len(part))
            if rate:
                self.server.rest(len(part) / rate)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone

    def wait(self) -> None:
        """Say nothing until the client goes away or the server closes."""
        self.sock.settimeout(0.05)
        while not self.server.closing.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.sock.recv(4096):
                    break
        raise Gone


Behaviour = Callable[[Exchange], None]


@dataclass
class HostileServer:
    """Behaviours by path, on 127.0.0.1 at a port of the system's choice."""

    tls: ssl.SSLContext | None = None
    requests: list[Exchange] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._behaviours: dict[str, Behaviour] = {}
        self._sent: dict[str, int] = {}
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._thread = threading.Thread(target=self._accept, name="hostile", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def on(self, path: str, behaviour: Behaviour) -> str:
        """Give *path* its behaviour; return its URL."""
        self._behaviours[path] = behaviour
        return self.url(path)

    def asked(self, path: str) -> list[Exchange]:
        """Return the requests for *path* so far."""
        return [exchange for exchange in self.requests if exchange.path == path]

    def sent(self, path: str) -> int:
        """Return how many body bytes were sent for *path*."""
        return self._sent.get(path, 0)

    def count(self, path: str, length: int) -> None:
        with self._lock:
            self._sent[path] = self._sent.get(path, 0) + length

    def rest(self, seconds: float) -> None:
        if self.closing.wait(seconds):
            raise Gone

    def close(self) -> None:
        """End all connections and threads."""
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            open_ones = list(self._sockets)
        for sock in open_ones:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._sockets.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        raw = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            buffer = b""
            while not self.closing.is_set():
                while b"\r\n\r\n" not in buffer:
                    data = sock.recv(65536)
                    if not data:
                        return
                    buffer += data
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                self._answer(sock, head.decode("latin-1"))
        except (Gone, OSError, ValueError):
            return
        finally:
            with contextlib.suppress(OSError):
                sock.close()
            raw.close()
            with self._lock:
                self._sockets.discard(raw)

    def _answer(self, sock: socket.socket, head: str) -> None:
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        path = re.sub(r"^http://[^/]+", "", target).partition("?")[0]
        with self._lock:
            exchange = Exchange(self, sock, method, path, headers, nth=len(self.asked(path)))
            self.requests.append(exchange)
        self._behaviours.get(path, status(404))(exchange)


# -- honest ----------------------------------------------------------------------------------------


def honest(data: bytes, *, rate: float = 0, etag: str = "") -> Behaviour:
    """Serve *data* with ranges."""
    more: tuple[tuple[str, object], ...] = (("ETag", f'"{etag}"'),) if etag else ()

    def behave(it: Exchange) -> None:
        if it.range is None:
            it.head(200, ("Content-Length", len(data)), ("Accept-Ranges", "bytes"), *more)
            it.body(data, rate=rate)
            return
        first, last = it.range
        last = min(len(data) - 1 if last is None else last, len(data) - 1)
        if first >= len(data):
            it.head(416, ("Content-Range", f"bytes */{len(data)}"), ("Content-Length", 0))
            return
        it.head(206, ("Content-Length", last - first + 1), ("Content-Range", f"bytes {first}-{last}/{len(data)}"), *more)
        it.body(memoryview(data)[first : last + 1], rate=rate)

    return behave


def no_ranges(data: bytes, *, rate: float = 0) -> Behaviour:
    """Serve *data* whole, whatever range is asked for."""

    def behave(it: Exchange) -> None:
        it.head(200, ("Content-Length", len(data)))
        it.body(data, rate=rate)

    return behave


def first(one: Behaviour, then: Behaviour, times: int = 1) -> Behaviour:
    """Behave like *one* for the first *times* requests, like *then* afterwards."""
    return lambda it: (one if it.nth < times else then)(it)


def on_probe(probe: Behaviour, transfer: Behaviour) -> Behaviour:
    """Behave like *probe* when the first byte alone is asked for, like *transfer* otherwise."""
    return lambda it: (probe if it.is_probe else transfer)(it)


# -- lengths ---------------------------------------------------------------------------------------


def with_length(data: bytes, *lengths: object) -> Behaviour:
    """Send *data* with other Content-Lengths than its own, or with none."""

    def behave(it: Exchange) -> None:
        it.head(200, *(("Content-Length", length) for length in lengths), ("Connection", "close"))
        it.body(data)
        raise Gone

    return behave


def ancient(data: bytes) -> Behaviour:
    """Answer like HTTP/1.0: no length, the end of the connection is the end of the file."""

    def behave(it: Exchange) -> None:
        it.send(b"HTTP/1.0 200 OK\r\n\r\n")
        it.body(data)
        raise Gone

    return behave


def endless(it: Exchange) -> None:
    """Send chunks until the client goes away."""
    it.head(200, ("Transfer-Encoding", "chunked"))
    while True:
        it.send(b"%x\r\n" % CHUNK)
        it.body(b"\0" * CHUNK)
        it.send(b"\r\n")


def chunked(data: bytes) -> Behaviour:
    """Send *data* in chunks, without a length."""

    def behave(it: Exchange) -> None:
        it.head(200, ("Transfer-Encoding", "chunked"))
        it.send(b"%x\r\n" % len(data))
        it.body(data)
        it.send(b"\r\n0\r\n\r\n")

    return behave


# -- ranges ----------------------------------------------------------------------------------------


def wrong_range(data: bytes) -> Behaviour:
    """Answer every range with the bytes after it."""

    def behave(it: Exchange) -> None:
        start, last = it.range or (0, None)
        last = min((len(data) - 2 if last is None else last) + 1, len(data) - 1)
        it.head(206, ("Content-Length", last - start), ("Content-Range", f"bytes {start + 1}-{last}/{len(data)}"))
        it.body(memoryview(data)[start + 1 : last + 1])

    return behave


def multipart(data: bytes) -> Behaviour:
    """Answer a range with several parts."""

    def behave(it: Exchange) -> None:
        text = b"--x\r\nContent-Range: bytes 0-0/%d\r\n\r\n%s\r\n--x--\r\n" % (len(data), data[:1])
        it.head(206, ("Content-Type", "multipart/byteranges; boundary=x"), ("Content-Length", len(text)))
        it.body(text)

    return behave


# -- connections -----------------------------------------------------------------------------------


def reset_after(data: bytes, count: int) -> Behaviour:
    """Send *count* bytes of what was asked for, then reset the connection."""

    def behave(it: Exchange) -> None:
        start, last = it.range or (0, None)
        last = min(len(data) - 1 if last is None else last, len(data) - 1)
        it.head(206 if it.range else 200, ("Content-Length", last - start + 1), ("Content-Range", f"bytes {start}-{last}/{len(data)}"))
        it.body(memoryview(data)[start : min(start + count, last + 1)])
        it.reset()

    return behave


def stall_after(data: bytes, count: int) -> Behaviour:
    """Send *count* bytes, then nothing, and keep the connection."""

    def behave(it: Exchange) -> None:
        start, last = it.range or (0, None)
        last = min(len(data) - 1 if last is None else last, len(data) - 1)
        it.head(206 if it.range else 200, ("Content-Length", last - start + 1), ("Content-Range", f"bytes {start}-{last}/{len(data)}"))
        it.body(memoryview(data)[start : min(start + count, last + 1)])
        if count <= last - start:
            it.wait()

    return behave


def silent(it: Exchange) -> None:
    """Take the request and never answer."""
    it.wait()


def slow_headers(it: Exchange) -> None:
    """Send headers, one byte at a time, for ever."""
    it.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        it.send(b"a")
        it.server.rest(0.05)


def huge_header(it: Exchange) -> None:
    """Send a header of 100 MB."""
    it.send(b"HTTP/1.1 200 OK\r\nX-Huge: ")
    for _ in range(1600):
        it.send(b"a" * CHUNK)
    it.send(b"\r\n\r\n")


def garbage(it: Exchange) -> None:
    """Answer what is no HTTP."""
    it.send(b"\x00\xffSSH-2.0 whatever\r\n\r\n")
    raise Gone


# -- answers ---------------------------------------------------------------------------------------


def status(code: int, *headers: tuple[str, object]) -> Behaviour:
    """Answer with a status and an empty body."""
    return lambda it: it.head(code, ("Content-Length", 0), *headers)


def redirect(to: str, code: int = 302) -> Behaviour:
    """Redirect to *to*."""
    return status(code, ("Location", to))


def gzipped(data: bytes) -> Behaviour:
    """Send *data* and call it gzip."""

    def behave(it: Exchange) -> None:
        it.head(200, ("Content-Encoding", "gzip"), ("Content-Length", len(data)))
        it.body(data)

    return behave


LOGIN_PAGE = b"<html>Please log in</html>"


def login_page(it: Exchange) -> None:
    """Answer with a login page and status 200."""
    it.head(200, ("Content-Type", "text/html"), ("Content-Length", len(LOGIN_PAGE)))
    it.body(LOGIN_PAGE)


def unsized(page: bytes) -> Behaviour:
    """Answer with a web page that does not say how long it is."""

    def behave(it: Exchange) -> None:
        it.head(200, ("Content-Type", "text/html"), ("Connection", "close"))
        it.body(page)
        raise Gone

    return behave


def metalink(evil: str, data: bytes) -> Behaviour:
    """Send a list of other files to download, under the type that aria2 follows by itself, padded to the right length."""

    def behave(it: Exchange) -> None:
        inner = f'<file name="evil.bin"><url>{evil}</url></file>'
        text = f'<?xml version="1.0"?><metalink xmlns="urn:ietf:params:xml:ns:metalink">{inner}</metalink>'
        padded = text.encode().ljust(len(data), b" ")
        it.head(200, ("Content-Type", "application/metalink4+xml"), ("Content-Length", len(padded)))
        it.body(padded)

    return behave


def other(data: bytes) -> bytes:
    """Return bytes of the same length that differ from the middle on."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]
