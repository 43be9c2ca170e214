"""
Connections to checked addresses, for all that speaks HTTP here.

Rules that hold here:

1. A name is looked up once, every address that it leads to is checked, and the connection goes to one of those: a name that leads
   elsewhere at a second look-up gains nothing. With a proxy, the proxy looks names up.
2. TLS is 1.2 or newer, with the host's name and its authority checked.
3. A proxy is the one of the settings, else of the environment. None is on the way to this very machine.
4. A connection is kept open for the next document where its answer was read to the end and the server agrees to keep it. Any other one is
   closed. Whoever takes one may find it closed by the server meanwhile, and asks once more over a new one.
5. A kept connection is of one run and of one thread: the addresses that it leads to were checked for this run.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Hashable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from reconciler.fetch import sources
from reconciler.fetch.sources import Rules

_PORTS = {"https": 443, "http": 80}
#: What is left of an answer and still read, so that its connection can be kept.
_DRAIN_BYTES = 64 << 10
_DRAIN_SECONDS = 0.2


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where a connection leads."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        """Return host:port, as people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(url: str) -> Endpoint | None:
    """Return where *url* leads, or None where it is no http URL."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, sources.host_of(url)
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not host:
        return None
    return Endpoint(host=host, port=port or _PORTS[parts.scheme], tls=parts.scheme == "https")


class TlsContext:
    """The TLS rules, made when the first https URL needs them: reading the system's authorities costs 20 ms."""

    def __init__(self, ca_file: Path | str | None) -> None:
        self._ca_file = ca_file or None
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def get(self) -> ssl.SSLContext:
        """Return the one context."""
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context(cafile=self._ca_file)
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        return self._context


class Connection(http.client.HTTPConnection):
    """A connection to *endpoint*: to one of its checked *addresses*, or through *proxy* (``http://[user:password@]host:port``)."""

    def __init__(self, endpoint: Endpoint, *, tls: TlsContext, timeout: float, addresses: tuple[str, ...] = (), proxy: str = "") -> None:
        parts = urlsplit(proxy)
        super().__init__(parts.hostname or endpoint.host, (parts.port or 8080) if proxy else endpoint.port, timeout=timeout)
        self.default_port = _PORTS["https" if endpoint.tls else "http"]
        self.endpoint, self.proxy, self.proxied = endpoint, proxy, bool(proxy)
        self._addresses, self._tls = addresses, tls
        self._proxy_headers = proxy_headers(proxy)
        self.aborted = self.is_private = False
        if proxy and endpoint.tls:
            self.set_tunnel(endpoint.host, endpoint.port, headers=self._proxy_headers)

    def connect(self) -> None:
        """Connect, and greet with TLS where the endpoint asks for it."""
        if self._addresses:
            self.sock = _connect_to_any(self._addresses, self.port, self.timeout or 60.0)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            super().connect()  # to the proxy, and through it where a tunnel was set
        if self.aborted:
            raise TimeoutError
        if self.endpoint.tls:
            self.sock = self._tls.get().wrap_socket(self.sock, server_hostname=self.endpoint.host)

    def ask(self, url: str, headers: dict[str, str], body: bytes | None = None) -> http.client.HTTPResponse:
        """Get *url*, which leads to this endpoint, or post *body*; return the answer once its headers are in. What fails is closed."""
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if self.proxied and not self.endpoint.tls:
            target, headers = url, headers | self._proxy_headers
        try:
            self.request("GET" if body is None else "POST", target, body, headers)
            return self.getresponse()
        except BaseException:
            self.close()
            raise

    def abort(self) -> None:
        """End the connection from another thread: reads and writes that have begun fail there."""
        self.aborted = True
        if sock := self.sock:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # a TLS socket's own would take its state from under the thread that reads


def _connect_to_any(addresses: tuple[str, ...], port: int, timeout: float) -> socket.socket:
    """Connect to the first of *addresses* that answers; one that never does costs seconds and not the whole time."""
    failure: OSError | None = None
    for index, address in enumerate(addresses):
        left = len(addresses) - index - 1
        try:
            return socket.create_connection((address, port), timeout=min(timeout, 10.0) if left else timeout)
        except OSError as error:
            failure = error
    assert failure
    raise failure


def look_up(endpoint: Endpoint) -> tuple[str, ...]:
    """Return the addresses that *endpoint* leads to; raises ``OSError`` where there is none."""
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def checked_addresses(rules: Rules, endpoint: Endpoint) -> tuple[str, ...]:
    """Look *endpoint* up and check every address: one bad among good ones is what an attack on the look-up looks like."""
    found = look_up(endpoint)
    for address in found:
        rules.check_address(endpoint.host, ipaddress.ip_address(address))
    return found


# -- proxies ---------------------------------------------------------------------------------------


def proxy_for(host: str, proxy: str, *, tls: bool) -> str:
    """Return the proxy on the way to *host*: *proxy*, else the environment's; none to this very machine."""
    if sources.is_loopback_name(host):
        return ""
    if proxy:
        return proxy
    from urllib import request

    found = request.getproxies().get("https" if tls else "http", "")
    if not found or request.proxy_bypass(host):
        return ""
    return found if "://" in found else f"http://{found}"


def proxy_headers(proxy: str) -> dict[str, str]:
    """Return the header with the proxy's credentials, where its URL has any."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


class KeptConnections:
    """Open connections by where they lead, one each; for the small documents of one run: roots, the snapshot, a registry's manifest."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Connection] = {}

    def take(self, place: Hashable) -> Connection | None:
        """Return the open connection to *place*, which is the caller's from then on; None where there is none."""
        return self._kept.pop(place, None)

    def keep(self, place: Hashable, connection: Connection, answer: http.client.HTTPResponse) -> bool:
        """Keep *connection*, of which *answer* was the last, for the next document from *place*; return whether it was kept."""
        if connection.sock is None or place in self._kept or not self._is_read(connection, answer):
            return False
        self._kept[place] = connection
        return True

    def _is_read(self, connection: Connection, answer: http.client.HTTPResponse) -> bool:
        """Return whether nothing is left of *answer*, after one look at what came in already: the page of a refusal, say."""
        left = answer.length
        if answer.isclosed() or left is None:
            return answer.isclosed()
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.sock.settimeout(_DRAIN_SECONDS)
            if left <= _DRAIN_BYTES:
                answer.read1(left)
            if answer.length == 0:
                answer.read()  # of nothing: it counts as read from then on
        return answer.isclosed()

    def close(self) -> None:
        """Close all of them."""
        while self._kept:
            self._kept.popitem()[1].close()
