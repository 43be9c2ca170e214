"""
HTTP: small signed documents.

Rules that hold here:

1. Each goes over a connection to a checked address (``connection``).
2. A document's redirects are followed here, at most five, each to an address that would be allowed by itself: https, or http to this very
   machine. From a public address, none leads to a private one.
3. Time is bounded as a whole: one deadline from the connection to the last header, and one for the body, however slowly bytes come in.
4. Credentials go to the host that they are for (``credentials``), anew at each redirect. A 401 that names a token service is answered with
   a token from there (``token_service``).
5. A body that ends early, is encoded otherwise than as gzip or zstd, or is larger than the cap, as it comes or decoded, is a failure of the
   network, said as one, and never half a document. What is no document, as the file of a model, is never encoded.
6. So is a page that stands where a document was asked for (``error_pages``). Whatever is meant as a document is judged by its signatures.

``http.client`` is what this stands on. urllib3 2.8 was tried in its place: its timeouts count each read, so that a server which drips its
headers holds a caller for ever (rule 3); between its look-up and its connection there is no place for a check, except a pool for each
address (rule 1); its redirects, retries and decoding would be switched off (rules 2 and 5). requests and httpx count time in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import re
import threading
import time
from collections.abc import Callable, Iterator

from msgspec import Struct, structs

from reconciler.core.errors import FetchError, TooLarge, UsageError
from reconciler.fetch import content_coding, error_pages, sources, token_service
from reconciler.fetch.connection import Connection, KeptConnections, TlsContext, checked_addresses, endpoint_of, proxy_for
from reconciler.fetch.sources import Refused, Rules
from reconciler.fetch.token_service import Challenge

#: Returns the Authorization header that a URL's host is sent, if any.
Authorize = Callable[[str], str | None]
_REDIRECTS = 5
#: Of a refusal's page, so much time is given to a quote.
_PAGE_SECONDS = 5.0


# -- documents -------------------------------------------------------------------------------------


class Document(Struct, frozen=True, kw_only=True):
    """What a server sent: bytes, or (None) that they are still those that *etag* names."""

    data: bytes | None
    etag: str = ""


def is_url(text: str) -> bool:
    """
    Say whether *text* is an address and not a path.

    Raises:
        UsageError: it is an address of a kind that nothing is fetched from.
    """
    if text.startswith(("http://", "https://", "s3://")):
        return True
    if re.match("[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        scheme = text[:200].partition("://")[0]  # the rest of it may be a secret
        raise UsageError(f"nothing is fetched from {scheme}://…", hint="give a file, or an address that begins with https://")
    return False


def get(
    url: str, *, max_bytes: int, timeout_seconds: float, etag: str = "", proxy: str = "", ca_file: str = "", allow_http: bool = False,
    authorize: Authorize | None = None, accept: str = "application/json, */*;q=0.1", kept: KeptConnections | None = None,
) -> Document:  # fmt: skip
    """
    Return the signed document at *url*, or that it is still what *etag* names. One of the *kept* connections is used, if it leads there.

    Raises:
        FetchError: the address is not allowed, nobody answers, or a page stands where the document should.
        TooLarge: more than *max_bytes*; nothing of it was kept.
    """
    headers = {"Accept": accept, "Accept-Encoding": content_coding.ACCEPTED} | ({"If-None-Match": etag} if etag else {})
    try:
        with opened(
            url, timeout_seconds=timeout_seconds, headers=headers, proxy=proxy, ca_file=ca_file, allow_http=allow_http, authorize=authorize,
            kept=kept,
        ) as answer:  # fmt: skip
            sent = b"".join(chunks(answer, url, max_bytes=max_bytes, within_seconds=timeout_seconds, coded=True))
            coding = answer.headers.get("Content-Encoding", "").strip().lower()
            data = content_coding.decoded(sent, coding, max_bytes=max_bytes, shown=sources.redact(url))
            if page := error_pages.describe_non_envelope(answer.headers.get("Content-Type", ""), data):
                raise FetchError(f"{sources.redact(url)} answered with {page}")
            return Document(data=data, etag=answer.headers.get("ETag", "")[:256])
    except _Unchanged:
        return Document(data=None, etag=etag)


class _Unchanged(Exception):
    """What the server has is what the ETag names."""


@contextlib.contextmanager
def opened(
    url: str, *, timeout_seconds: float, headers: dict[str, str] | None = None, proxy: str = "", ca_file: str = "",
    allow_http: bool = False, authorize: Authorize | None = None, visited: list[str] | None = None,
    kept: KeptConnections | None = None,
) -> Iterator[http.client.HTTPResponse]:  # fmt: skip
    """
    Give the answer of *url*; its body is read with ``chunks`` inside. Without *proxy*, the environment's is used.

    *authorize* returns the Authorization header for a URL, if any. Where redirects and token services lead is added to *visited*.

    Raises:
        FetchError: the address is not allowed, nobody answers, or the answer is a refusal.
    """
    deadline = time.monotonic() + timeout_seconds
    client = _Client(
        tls=TlsContext(ca_file), proxy=proxy, allow_http=allow_http, deadline=deadline, authorize=authorize, visited=visited, kept=kept
    )
    sent = {"User-Agent": "reconcile", "Accept-Encoding": "identity"} | (headers or {})
    try:
        connection, answer = client.follow(url, sent)
        try:
            if answer.status == 304:
                raise _Unchanged
            if answer.status != 200:
                raise _refusal(url, answer)
            yield answer
        finally:
            client.release(connection, answer)
    except Refused as error:
        raise FetchError(f"cannot fetch {sources.redact(url)}: {error}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise FetchError(f"cannot fetch {sources.redact(url)}: {sources.clean(reason)}") from None


class _Client(Struct, frozen=True, kw_only=True):
    """How one document is asked for; *deadline* is a reading of the monotonic clock."""

    tls: TlsContext
    proxy: str
    allow_http: bool
    deadline: float
    authorize: Authorize | None = None
    visited: list[str] | None = None
    kept: KeptConnections | None = None

    def follow(self, url: str, headers: dict[str, str], *, may_be_private: bool = True) -> tuple[Connection, http.client.HTTPResponse]:
        """Return the connection and the answer to which *url* and its redirects lead. A private address is a person's, not a server's."""
        token, redirects = "", 0
        while redirects <= _REDIRECTS:
            connection, answer = self._exchange(url, headers | self._authorization(url, token), may_be_private=may_be_private)
            may_be_private = connection.is_private
            challenge = _challenge(url, answer) if not token else None
            if challenge is None and answer.status not in sources.REDIRECTS:
                return connection, answer
            self.release(connection, answer)
            if challenge:
                token = self._token(challenge, may_be_private=may_be_private)
                continue
            url, token, redirects = sources.redirect_target(url, header_lists(answer)), "", redirects + 1
            self._note(url)
        raise Refused(f"it redirects more than {_REDIRECTS} times")

    def release(self, connection: Connection, answer: http.client.HTTPResponse) -> None:
        """Keep *connection* for the next document, or close it."""
        if self.kept is None or connection.aborted or not self.kept.keep((connection.endpoint, connection.proxy), connection, answer):
            answer.close()
            connection.close()

    def _authorization(self, url: str, token: str) -> dict[str, str]:
        header = f"Bearer {token}" if token else self.authorize(url) if self.authorize else None
        return {"Authorization": header} if header else {}

    def _token(self, challenge: Challenge, *, may_be_private: bool) -> str:
        """Return a token for *challenge* from the service that it names, which is asked like the target of a redirect."""
        self._note(challenge.url)
        without = structs.replace(self, visited=None)
        sent = {"User-Agent": "reconcile", "Accept-Encoding": "identity"}
        connection, answer = without.follow(challenge.url, sent, may_be_private=may_be_private)
        try:
            if answer.status != 200:
                raise Refused(f"its token service {sources.host_of(challenge.url)} answers {sources.status_text(answer.status)}")
            return token_service.token_in(answer.read(token_service.MOST_BYTES + 1))[0]
        finally:
            self.release(connection, answer)

    def _note(self, url: str) -> None:
        if self.visited is not None:
            self.visited.append(url)

    def _exchange(self, url: str, headers: dict[str, str], *, may_be_private: bool) -> tuple[Connection, http.client.HTTPResponse]:
        connection = self._connection(url)
        if connection.is_private and not may_be_private:
            connection.close()
            raise Refused(f"it redirects from a public address to {connection.endpoint}, a private one")
        was_open = connection.sock is not None
        try:
            return connection, self._ask(connection, url, headers)
        except (OSError, http.client.HTTPException):
            if not was_open or time.monotonic() >= self.deadline:
                raise
        connection = self._connection(url)  # the server closed the other one meanwhile
        return connection, self._ask(connection, url, headers)

    def _connection(self, url: str) -> Connection:
        """Return a connection for *url*: one that is kept, or one that is not made yet."""
        rules = Rules(hosts=None, trusted=frozenset({sources.host_of(url)}), allow_http=self.allow_http)
        rules.check(url)
        endpoint = endpoint_of(url)
        assert endpoint
        proxy = proxy_for(endpoint.host, self.proxy, tls=endpoint.tls)
        timeout = max(self.deadline - time.monotonic(), 0.001)
        if self.kept is not None and (found := self.kept.take((endpoint, proxy))) is not None:
            found.sock.settimeout(timeout)
            return found
        addresses = () if proxy else checked_addresses(rules, endpoint)
        made = Connection(endpoint, tls=self.tls, timeout=timeout, addresses=addresses, proxy=proxy)
        made.is_private = any(not sources.is_public(address) for address in addresses or (endpoint.host,))
        return made

    def _ask(self, connection: Connection, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        timer = threading.Timer(max(self.deadline - time.monotonic(), 0.0), connection.abort)
        timer.daemon = True
        timer.start()
        try:
            answer = connection.ask(url, headers)
        finally:
            timer.cancel()
        if connection.aborted:
            answer.close()
            connection.close()
            raise TimeoutError("it did not answer in time")  # headers that were cut off look like headers that ended
        return answer


def _challenge(url: str, answer: http.client.HTTPResponse) -> Challenge | None:
    if answer.status != 401:
        return None
    found = [token_service.challenge_of(url, header) for header in header_lists(answer).get("www-authenticate", ())]
    return next((one for one in found if one), None)


def _refusal(url: str, answer: http.client.HTTPResponse) -> FetchError:
    """Return what an *answer* that is no document means, with a quote from its page."""
    page = b""
    with contextlib.suppress(FetchError, TooLarge, OSError, http.client.HTTPException):
        for chunk in chunks(answer, url, max_bytes=error_pages.MOST_BYTES, within_seconds=_PAGE_SECONDS):
            page += chunk
    said = error_pages.describe(answer.headers.get("Content-Type", ""), page) if page.strip() else ""
    error = FetchError(f"{sources.redact(url)} answered {answer.status} {sources.clean(answer.reason, 60)}{said and f', with {said}'}")
    error.asked_seconds = sources.failure_of_status(answer.status, header_lists(answer), time.time()).retry_after
    return error


def header_lists(answer: http.client.HTTPResponse) -> dict[str, list[str]]:
    """Return the headers of *answer* by name in lower case; a header may come more than once."""
    found: dict[str, list[str]] = {}
    for name, value in answer.getheaders():
        found.setdefault(name.lower(), []).append(value)
    return found


def chunks(
    answer: http.client.HTTPResponse, url: str, *, max_bytes: int, within_seconds: float = math.inf, coded: bool = False
) -> Iterator[bytes]:
    """
    Yield the body of *answer* as it comes in. ``http.client`` ends silently where a connection is cut: here that is a failure.

    *coded*: the caller decodes what is encoded (``content_coding``).

    Raises:
        FetchError: it ends before its length, is encoded and not *coded*, or takes longer than *within_seconds* in all.
        TooLarge: more than *max_bytes*.
    """
    shown = sources.redact(url)
    if not coded and answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError(f"{shown} sends a compressed body, which nobody asked for")
    whole, ends, got = answer.length, time.monotonic() + within_seconds, 0
    while chunk := answer.read1(1 << 18):
        got += len(chunk)
        if got > max_bytes:
            raise TooLarge(f"{shown} sends more than {max_bytes:,} bytes")
        if time.monotonic() > ends:
            raise FetchError(f"{shown} has sent {got:,} bytes in {within_seconds:.0f} s and is not done")
        yield chunk
    if whole is not None and got != whole:
        raise FetchError(f"{shown} ended after {got:,} of {whole:,} bytes")
