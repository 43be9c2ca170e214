"""
Short requests to servers of this node, whose addresses the operator wrote in the settings.

No proxy, no redirect, no credentials. Time is bounded for each read, and the answer in size: these are the operator's own servers. The
downloader's client is stricter, because what it asks is anybody's.
"""

from __future__ import annotations

import http.client
import ssl
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core.errors import ServeFailed
from reconciler.core.text import printable

_MOST_BYTES = 16 << 20
#: Characters of an error's page that are quoted.
_QUOTED = 300


class Answer(Struct, frozen=True):
    """What a server answered."""

    status: int
    body: bytes

    def body_or_raise(self, what: str) -> bytes:
        """Return the body of an answer that tells of success; raise ``ServeFailed`` for any other."""
        if not 200 <= self.status < 300:
            said = printable(self.body[: 4 * _QUOTED].decode(errors="replace"), _QUOTED).strip()
            raise ServeFailed(f"{what} answers {self.status}{': ' + said if said else ''}")
        return self.body


class Unreachable(ServeFailed):
    """Nothing listens there."""


def request(method: str, url: str, body: bytes | None = None, *, seconds: float) -> Answer:
    """
    Send one request and return its answer; each read may take *seconds*.

    Raises:
        Unreachable: the connection is refused, or there is no such host.
        ServeFailed: it answers too late, too much, or not in HTTP.
    """
    connection = _connection(url, seconds)
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        try:
            connection.connect()
        except OSError as error:
            raise Unreachable(f"{parts.netloc} cannot be reached: {error.strerror or error}") from None
        connection.request(method, target, body, {"Content-Type": "application/json"} if body is not None else {})
        answer = connection.getresponse()
        data = answer.read(_MOST_BYTES + 1)
    except TimeoutError:
        raise ServeFailed(f"{parts.netloc} did not answer within {seconds:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServeFailed(f"{parts.netloc} does not answer in HTTP: {type(error).__name__} {error}".rstrip()) from None
    finally:
        connection.close()
    if len(data) > _MOST_BYTES:
        raise ServeFailed(f"{parts.netloc} answers with more than {_MOST_BYTES >> 20} MiB")
    return Answer(answer.status, data)


def _connection(url: str, seconds: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
    return http.client.HTTPConnection(host, port, timeout=seconds)


def base_of(url: str) -> str:
    """Return *url* without path and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
