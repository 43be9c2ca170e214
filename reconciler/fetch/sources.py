"""
Where bytes may come from, and what a server's first answer means.

Rules that hold here, none of which touches the network:

1. Sources are tried in the want's order, then the node's own mirrors. A URL is plain http or https; plain http goes to loopback alone,
   unless the operator allows it.
2. A host must be named: by ``allowed_hosts``, or (where that is empty) by a source, a mirror or a fallback. Names may be patterns
   (``core.hosts``). A redirect may also lead where the rules for its source's host say: the network's, unless ``allowed_hosts`` is set, and
   the operator's own. From another machine, none leads to this one unless the *settings* name it.
3. A name may lead to a public address. A private or link-local one (cloud metadata is at 169.254.169.254) needs the *settings* to name the
   host: a snapshot alone must not make a node send requests into its operator's own network. Loopback needs no setting where it is
   written as such.
4. Credentials go to the host that they are for, over TLS or to loopback, and to no other.
5. The signed size is known before the first byte: an answer with another length is refused before it is read.
6. Whatever is shown to people has no user, no query and no control character.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import unquote, urljoin, urlsplit

from msgspec import Struct, structs

from reconciler.core import digest as digests
from reconciler.core import urls
from reconciler.core.text import printable
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Want

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Kind = Literal["source-failed", "size-mismatch", "hash-mismatch", "disk-full"]

_CONTENT_RANGE = re.compile(r"bytes +([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
#: Answers after which the same request may work later (RFC 9110 15.5, RFC 6585 4).
TRANSIENT = frozenset({408, 421, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Answers that are about the file or the node, and never about the range that was asked for.
_FINAL = frozenset({401, 404, 407, 410, 451})
_STATUS_TEXT = {
    400: "it does not understand the request", 401: "it asks for credentials that this node does not have",
    403: "it refuses this node", 404: "it does not have the file", 407: "the proxy asks for credentials",
    410: "it no longer has the file", 416: "it refuses a range within the signed size", 429: "it asks to come back later",
    451: "it may not give the file", 503: "it is overloaded",
}  # fmt: skip


class Failure(Struct, frozen=True, kw_only=True):
    """
    Why a source did not give the bytes.

    *permanent*: the same request fails again in this run. *final*: so does any other request for the same file, whatever its ranges.
    *retry_after* is what the server asked for, in seconds.
    """

    text: str
    permanent: bool = True
    final: bool = False
    kind: Kind = "source-failed"
    retry_after: float = 0.0


class Refused(Exception):
    """What the rules do not let pass."""

    final = True

    def __init__(self, text: str, *, kind: Kind = "source-failed") -> None:
        super().__init__(text)
        self.failure = Failure(text=text, kind=kind, final=self.final)


class UnusableAnswer(Refused):
    """An answer that cannot be the blob's; another request to the same source may get another."""

    final = False


class Rules(Struct, frozen=True, kw_only=True):
    """
    Which *hosts* may be asked (None: any), and which of them are *trusted*, that is, named by the operator; both may be patterns.
    *redirects* are patterns of hosts by the host of the source that may redirect to them.
    """

    hosts: frozenset[str] | None
    trusted: frozenset[str]
    allow_http: bool
    redirects: dict[str, frozenset[str]] = {}
    #: Whether *hosts* are the operator's, and nothing adds to them.
    closed: bool = False

    def naming(self, url: str) -> Rules:
        """Return these rules where this machine's own configuration leads to *url*: its host is named by it, unless they are closed."""
        if self.closed or self.hosts is None:
            return self
        host = frozenset({host_of(url)})
        return structs.replace(self, hosts=self.hosts | host, trusted=self.trusted | host)

    def check(self, url: str, source: str = "") -> str:
        """
        Return the host of *url*, to which *source*, if there is one, redirected.

        Raises:
            Refused: the rules do not let it pass.
        """
        try:
            urls.check_url(url)
        except ValueError as error:
            raise Refused(f"the URL is refused: {error}") from None
        host = host_of(url)
        if not host or "%" in host:
            raise Refused("the URL is refused: it names no plain host")
        self._check_host(host, host_of(source))
        if urlsplit(url).scheme == "http" and not self.allow_http and not is_loopback_name(host):
            raise Refused("plain http is refused; use https, or set allow_http")
        literal = _literal(host)
        if literal is not None:
            self.check_address(host, literal)
        return host

    def _check_host(self, host: str, source: str) -> None:
        if source and is_loopback_name(host) and not is_loopback_name(source) and not urls.host_matches(host, self.trusted):
            raise Refused(f"it redirects from {clean(source)} to {clean(host)}, this very machine; {_allowing(source, host)}")
        if self.hosts is None or urls.host_matches(host, self.hosts) or urls.host_matches(host, self.redirects.get(source, ())):
            return
        if source:
            raise Refused(
                f"it redirects from {clean(source)} to {clean(host)}, which is not among the allowed hosts; {_allowing(source, host)}"
            )
        raise Refused(f"host {clean(host)} is not among the allowed hosts")

    def check_address(self, host: str, address: Address) -> None:
        """
        Refuse *address* unless *host* may lead to it.

        Raises:
            Refused: it is an address that only the settings may send us to, or no host's address at all.
        """
        real = _embedded_ipv4(address)
        if real.is_unspecified or real.is_multicast:
            raise Refused(f"host {clean(host)} leads to {real}, which is no host's address")
        if urls.host_matches(host, self.trusted) or (real.is_loopback and is_loopback_name(host)):
            return
        if not is_public(real):
            may = "only the settings may name such a host (allowed_hosts, redirects, mirrors, fallback)"
            raise Refused(f"host {clean(host)} leads to {real}, a private address; {may}")


class Answer(Struct, frozen=True, kw_only=True):
    """A first answer that may be the blob's: whether the source gives *ranges*, and the length of the *body* in bytes (-1: unknown)."""

    ranges: bool
    body: int


def rules(wants: Iterable[Want], settings: FetchSettings) -> Rules:
    """Return the rules of one fetch: what *settings* permit, and what the sources of *wants* name."""
    own = {host_of(url) for url in (*settings.mirrors, *settings.fallback)}
    allowed = {urls.normal_host(host) for host in settings.allowed_hosts}
    named = {host_of(url) for want in wants for url in want.sources if not url.startswith("s3://")}
    targets = {urls.normal_host(pattern) for patterns in settings.own_redirects.values() for pattern in patterns}
    return Rules(
        hosts=frozenset((allowed or named) | own) - {""},
        trusted=frozenset(allowed | own | targets) - {""},
        allow_http=settings.allow_http,
        redirects=_merged(settings.own_redirects, {} if allowed else settings.signed_redirects),
        closed=bool(allowed),
    )


def _merged(*tables: Mapping[str, tuple[str, ...]]) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for host, patterns in (row for table in tables for row in table.items()):
        key = urls.normal_host(host)
        found[key] = found.get(key, frozenset()) | {urls.normal_host(pattern) for pattern in patterns}
    return found


def _allowing(source: str, host: str) -> str:
    return f'to allow it: [download] redirects = {{"{clean(source)}" = ["{clean(host)}"]}}'


def order(want: Want, fallback: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sources of *want* in the order in which they are tried, each once."""
    return tuple(dict.fromkeys((*want.sources, *expanded(want, fallback))))


def expanded(want: Want, templates: tuple[str, ...]) -> tuple[str, ...]:
    """Return the URLs that the node's own *templates* give for *want*, each once."""
    algorithm, digits = digests.parse(want.digest)
    return tuple(dict.fromkeys(urls.expand(template, algorithm, digits) for template in templates))


def check_answer(status: int, headers: Mapping[str, list[str]], size: int) -> Answer:
    """
    Return what an answer says of a blob of *size* bytes whose beginning was asked for; header names are in lower case.

    Raises:
        Refused: it is no 200 or 206, or of another length, or not the plain bytes.
    """
    coding = _single(headers, "content-encoding") or "identity"
    if coding.lower() != "identity":
        raise UnusableAnswer(f"it sends {clean(coding)}-encoded bytes, although plain ones were asked for")
    length = _length(headers)
    if status == 206:
        return _check_range(headers, length, size)
    if status != 200:
        raise UnusableAnswer(status_text(status))
    if length >= 0 and length != size:
        raise UnusableAnswer(f"its file has {length} bytes, not the signed {size}", kind="size-mismatch")
    return Answer(ranges=False, body=length)


def _check_range(headers: Mapping[str, list[str]], length: int, size: int) -> Answer:
    if (_single(headers, "content-type") or "").lower().startswith("multipart/"):
        raise UnusableAnswer("it answers a request for one range with several parts")
    found = _CONTENT_RANGE.fullmatch((_single(headers, "content-range") or "").strip())
    if not found:
        raise UnusableAnswer("it sends a part of the file without saying which")
    if found[3] != "*" and int(found[3]) != size:
        raise UnusableAnswer(f"its file has {found[3]} bytes, not the signed {size}", kind="size-mismatch")
    if int(found[1]) != 0 or int(found[2]) >= size:
        raise UnusableAnswer(f"it sends bytes {found[1]} to {found[2]}, which were not asked for")
    body = int(found[2]) + 1
    if length not in {-1, body}:
        raise UnusableAnswer("its Content-Length and its Content-Range disagree")
    return Answer(ranges=True, body=body)


def failure_of_status(status: int, headers: Mapping[str, list[str]], now: float) -> Failure:
    """
    Return the failure that an answer other than a redirect or bytes stands for; *now* is in seconds since 1970.

    A date in Retry-After is compared with the server's own Date where it sends one: the clock here may be wrong.
    """
    kind: Kind = "size-mismatch" if status == 416 else "source-failed"
    sent = _date(_single(headers, "date") or "")
    wait = retry_after(_single(headers, "retry-after") or "", now if sent is None else sent) if status in TRANSIENT else 0.0
    return Failure(text=status_text(status), permanent=status not in TRANSIENT, final=status in _FINAL, kind=kind, retry_after=wait)


def other_length(size: int) -> Failure:
    """Return the failure of a source whose file does not have the signed *size* in bytes."""
    return Failure(text=f"it sends another length than the signed {size} bytes", kind="size-mismatch")


def status_text(status: int) -> str:
    """Return what an HTTP status means, for people."""
    meaning = _STATUS_TEXT.get(status) or ("it has an error of its own" if status >= 500 else "it does not give the file")
    return f"HTTP {status}: {meaning}"


def retry_after(text: str, now: float) -> float:
    """Return the seconds that a Retry-After asks for (RFC 9110 10.2.3), 0 where it says nothing that can be understood."""
    text = text.strip()
    if _LENGTH.fullmatch(text):
        return float(min(int(text), 86400))
    at = _date(text)
    return 0.0 if at is None else min(max(at - now, 0.0), 86400.0)


def _date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970, or None where it is none."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def redirect_target(url: str, headers: Mapping[str, list[str]]) -> str:
    """
    Return where a redirect from *url* leads.

    Raises:
        Refused: it does not say, or says what is no URL.
    """
    location = _single(headers, "location")
    if not location or len(location) > 8192:
        raise Refused("it redirects without saying where to")
    # Checked before the join, which would turn a backslash or a stray control character into something harmless-looking.
    if re.search(r"[\x00-\x20\\\x7f-\U0010ffff]", location):
        raise Refused("it redirects to what is no URL")
    try:
        return urljoin(url, location).partition("#")[0]
    except ValueError:
        raise Refused("it redirects to what is no URL") from None


def may_authorize(url: str) -> bool:
    """Whether a credential may travel to *url*: over TLS, or without leaving the machine."""
    return urlsplit(url).scheme == "https" or is_loopback_name(host_of(url))


def host_of(url: str) -> str:
    """Return the host of *url* in its one spelling, or nothing."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def port_of(url: str) -> int:
    """Return the port of *url*; 0 where it is no port."""
    try:
        parts = urlsplit(url)
        return parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    except ValueError:
        return 0


def file_name(place: str) -> str:
    """Return the last part of a URL's or path's name."""
    return unquote(urlsplit(place).path if "://" in place else place).rstrip("/").rpartition("/")[2]


def is_loopback_name(host: str) -> bool:
    """Whether *host* is literally this machine: ``localhost``, or a loopback address. ``127.1`` and ``0x7f000001`` are not."""
    literal = _literal(host)
    return host == "localhost" or (literal is not None and literal.is_loopback)


def is_public(address: Address | str) -> bool:
    """Whether *address* is one that anybody on the internet may have; of a text: whether it is no private address, nor this machine."""
    if isinstance(address, str):
        literal = _literal(address)
        return address != "localhost" if literal is None else is_public(literal)
    real = _embedded_ipv4(address)
    return real.is_global and not (real.is_loopback or real.is_link_local or real.is_multicast or real.is_unspecified)


def redact(url: str) -> str:
    """Return *url* for people and logs: without user, query and fragment."""
    try:
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' if parts.query else ''}"
    except ValueError:
        place = url.partition("?")[0].rpartition("@")[2]
    return clean(place, 300)


def clean(text: str, most: int = 200) -> str:
    """Return *text* from outside in printable characters, cut to *most*."""
    return printable(text, most)


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _embedded_ipv4(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 one, where that is what it leads to (RFC 4291 2.5.5.2, RFC 6052, RFC 3056)."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def _single(headers: Mapping[str, list[str]], name: str) -> str | None:
    values = {value.strip() for value in headers.get(name, ())}
    if len(values) > 1:
        raise UnusableAnswer(f"it sends two different {name} headers")
    return next(iter(values), None)


def _length(headers: Mapping[str, list[str]]) -> int:
    text = _single(headers, "content-length")
    if text is None:
        return -1
    if not _LENGTH.fullmatch(text):
        raise UnusableAnswer("its Content-Length is no length")
    if "transfer-encoding" in headers:
        raise UnusableAnswer("it sends both a Content-Length and a Transfer-Encoding")  # RFC 9112 6.3: an error, or an attack
    return int(text)
