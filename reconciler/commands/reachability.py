"""Whether hosts answer: a connection, and for https a handshake whose certificate holds. Nothing is asked and nothing is downloaded."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.settings import Settings

_PORTS = {"https": 443, "http": 80}
_AT_ONCE = 16


class Host(Struct, frozen=True, kw_only=True):
    """One end of a connection."""

    name: str
    port: int
    tls: bool

    def __str__(self) -> str:
        """Return host:port, as people write it."""
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


class Reachability(Struct, frozen=True, kw_only=True):
    """What became of one connection; *error* is empty where it was made."""

    host: Host
    seconds: float
    error: str = ""


def host_of(url: str) -> Host | None:
    """Return where *url* leads, or None where it is no http URL."""
    try:
        parts = urlsplit(url)
        port, name = parts.port, parts.hostname
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not name:
        return None
    return Host(name=name, port=port or _PORTS[parts.scheme], tls=parts.scheme == "https")


def check_reachable(hosts: Iterable[Host], settings: Settings, seconds: float) -> tuple[Reachability, ...]:
    """Connect to each of *hosts*, several at once, each within *seconds*; return the answers in their order."""
    authority = str(settings.path(settings.download.ca_file)) if settings.download.ca_file else None
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return tuple(threads.map(lambda host: _check_one(host, authority, seconds), hosts))


def _check_one(host: Host, authority: str | None, seconds: float) -> Reachability:
    begun = time.monotonic()
    try:
        with socket.create_connection((host.name, host.port), timeout=seconds) as plain:
            if host.tls:
                with ssl.create_default_context(cafile=authority).wrap_socket(plain, server_hostname=host.name):
                    pass
    except ssl.SSLCertVerificationError as error:
        return Reachability(host=host, seconds=time.monotonic() - begun, error=f"its certificate does not hold: {error.verify_message}")
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that is none
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Reachability(host=host, seconds=time.monotonic() - begun, error=str(said))
    return Reachability(host=host, seconds=time.monotonic() - begun)
