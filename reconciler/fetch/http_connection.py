"""
HTTP connections of our own: to addresses that were checked, or through the operator's proxy.

A name is looked up once, and the connection goes to what was checked then: a name that leads elsewhere at a second look-up gains nothing.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import unquote, urlsplit

from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Rules


class Tls:
    """The TLS rules, made when the first https URL needs them: reading the system's authorities costs 20 ms."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """Return the one context."""
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context(cafile=self._settings.ca_file)
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        return self._context


class Connection(http.client.HTTPConnection):
    """A connection to one of some checked addresses, or through the proxy; with TLS where *tls* says so."""

    def __init__(self, host: str, port: int, *, tls: ssl.SSLContext | None, addresses: tuple[str, ...], timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = 443 if tls else 80
        self._tls_context, self._addresses, self._named = tls, addresses, host
        #: Scheme, host and port that it serves; set where it may be kept for the next question.
        self.endpoint: tuple[str, str, int] | None = None

    def through(self, host: str, port: int, headers: dict[str, str]) -> None:
        """Use the proxy, which this connects to, as a way to *host*."""
        self.set_tunnel(host, port, headers=headers)
        self._named = host

    def connect(self) -> None:
        """Connect, and greet with TLS where that is asked."""
        if self._addresses:
            self.sock = _connected(self._addresses, self.port, self.timeout or 60.0)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            super().connect()  # to the proxy, and through it where a tunnel was set
        if self._tls_context:
            self.sock = self._tls_context.wrap_socket(self.sock, server_hostname=self._named)


def _connected(addresses: tuple[str, ...], port: int, timeout: float) -> socket.socket:
    """Connect to the first of *addresses* that answers; a black hole among them costs seconds and not the whole time."""
    failure: OSError | None = None
    for index, address in enumerate(addresses):
        left = len(addresses) - index - 1
        try:
            return socket.create_connection((address, port), timeout=min(timeout, 10.0) if left else timeout)
        except OSError as error:
            failure = error
    assert failure
    raise failure


def addresses(rules: Rules, host: str, port: int) -> tuple[str, ...]:
    """Look *host* up and check every address: one bad among good ones is what an attack on the look-up looks like."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    numbers = tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
    for address in numbers:
        rules.check_address(host, ipaddress.ip_address(address))
    return numbers


def proxy_header(proxy: str) -> dict[str, str]:
    """Return the header with the proxy's credentials, where its URL has any."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
