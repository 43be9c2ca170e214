"""
Fetching a signed document: small, capped, and worth nothing until its signature was checked.

One request through the standard library, so that neither aria2 nor its client is loaded for it. Redirects are followed within the
same rules as every other address: https, or http to this very machine. A body that ends early or drips in is a failure of the
network, said as one, and never half a document.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core import snapshot
from reconciler.core.errors import FetchError, TooLarge, UsageError


class Document(Struct, frozen=True, kw_only=True):
    """What a server sent: bytes, or the word that they are still the same."""

    data: bytes | None
    etag: str = ""


def is_url(text: str) -> bool:
    """
    Say whether *text* is an address and not a path.

    Raises:
        UsageError: it is an address of a kind that nothing is fetched from.
    """
    if text.startswith(("http://", "https://")):
        return True
    if re.match("[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        scheme = text[:200].partition("://")[0]  # the rest of it may be a secret
        raise UsageError(f"nothing is fetched from {scheme}://…", hint="give a file, or an address that begins with https://")
    return False


def get(
    url: str, *, max_bytes: int, timeout_seconds: float, etag: str = "", proxy: str = "", ca_file: str = "", allow_http: bool = False
) -> Document:
    """
    Return what *url* holds, or that it is what *etag* named.

    Raises:
        FetchError: the address is not allowed, nobody answers, or the answer is no document.
        TooLarge: more than *max_bytes*; nothing of it was kept.
    """
    headers = {"Accept": "application/json, */*;q=0.1"} | ({"If-None-Match": etag} if etag else {})
    try:
        with opened(url, timeout_seconds=timeout_seconds, headers=headers, proxy=proxy, ca_file=ca_file, allow_http=allow_http) as answer:
            parts = chunks(answer, url, max_bytes=max_bytes, within_seconds=timeout_seconds)
            return Document(data=b"".join(parts), etag=answer.headers.get("ETag", "")[:256])
    except _Unchanged:
        return Document(data=None, etag=etag)


class _Unchanged(Exception):
    """What the server has is what the ETag names."""


@contextlib.contextmanager
def opened(
    url: str,
    *,
    timeout_seconds: float,
    headers: dict[str, str] | None = None,
    proxy: str = "",
    ca_file: str = "",
    allow_http: bool = False,
) -> Iterator[HTTPResponse]:
    """
    Give the answer of *url*; its body is read with ``chunks`` inside.

    Raises:
        FetchError: the address is not allowed, nobody answers, or the answer is a refusal.
    """
    _check(url, allow_http=allow_http)
    asked = urllib.request.Request(url, headers={"User-Agent": "reconcile"} | (headers or {}))  # noqa: S310  checked above
    try:
        with _opener(proxy, ca_file, allow_http=allow_http).open(asked, timeout=timeout_seconds) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 304:
            raise _Unchanged from None
        raise FetchError(f"{_shown(url)} answered {error.code} {error.reason!a}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise FetchError(f"cannot fetch {_shown(url)}: {ascii(str(reason))[1:-1]}") from None


def chunks(answer: HTTPResponse, url: str, *, max_bytes: int, within_seconds: float = math.inf) -> Iterator[bytes]:
    """
    Yield the body of *answer* as it comes in. ``http.client`` ends silently where a connection is cut: here that is a failure.

    Raises:
        FetchError: it ends before its length, is encoded, or takes longer than *within_seconds* in all.
        TooLarge: more than *max_bytes*.
    """
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError(f"{_shown(url)} sends a compressed body, which nobody asked for")
    whole, ends, got = answer.length, time.monotonic() + within_seconds, 0
    while chunk := answer.read1(1 << 18):
        got += len(chunk)
        if got > max_bytes:
            raise TooLarge(f"{_shown(url)} sends more than {max_bytes:,} bytes")
        if time.monotonic() > ends:
            raise FetchError(f"{_shown(url)} has sent {got:,} bytes in {within_seconds:.0f} s and is not done")
        yield chunk
    if whole is not None and got != whole:
        raise FetchError(f"{_shown(url)} ended after {got:,} of {whole:,} bytes")


def _opener(proxy: str, ca_file: str, *, allow_http: bool) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context(cafile=ca_file or None)
    proxies = urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None)
    return urllib.request.build_opener(proxies, urllib.request.HTTPSHandler(context=context), _Redirects(allow_http=allow_http))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows at most five redirects, each to an address that would be allowed by itself."""

    max_redirections = 5

    def __init__(self, *, allow_http: bool) -> None:
        self._allow_http = allow_http

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request, if its address is allowed."""
        _check(newurl, allow_http=self._allow_http)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check(url: str, *, allow_http: bool) -> None:
    try:
        snapshot.check_url(url)
    except ValueError as error:
        raise FetchError(f"{_shown(url)}: {error}") from None
    parts = urlsplit(url)
    if parts.scheme == "http" and not allow_http and not is_loopback(parts.hostname or ""):
        raise FetchError(f"{_shown(url)}: plain http is refused except to this machine", hint="use https")


def is_loopback(host: str) -> bool:
    """Say whether *host* is this machine, by its text alone: a name that a resolver answers for is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(url: str) -> str:
    """Return *url* for people and logs: without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "this address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:300]
