"""
Tokens of registries: a server answers 401 and names the service that gives out tokens for it (Docker's token authentication, OCI
distribution; RFC 6750).

Rules that hold here, none of which touches the network:

1. The service is where the server says, so it is checked like a redirect from the server, and it is asked over TLS or on this machine.
2. It gets the credentials of its own host, never those of the server that named it. Without any it is asked for what everybody may have.
3. The token goes to the server that named the service, and to no other; it is kept in memory until shortly before it ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from urllib.parse import urlencode, urlsplit

import msgspec
from msgspec import Struct

from reconciler.fetch import sources
from reconciler.fetch.sources import Refused

MOST_BYTES = 64 << 10
_PAIR = re.compile(r'([a-zA-Z_]+)\s*=\s*(?:"([^"\\]*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[!-~]+")
#: The shortest life that a token has where the service does not say (Docker's specification).
_SECONDS = 60.0


class Challenge(Struct, frozen=True, kw_only=True):
    """Which service gives out tokens for the server at *origin*, and for what."""

    origin: str
    realm: str
    service: str
    scope: str

    @property
    def url(self) -> str:
        """The address that is asked for a token."""
        query = urlencode([(key, value) for key, value in (("service", self.service), ("scope", self.scope)) if value])
        if not query:
            return self.realm
        return f"{self.realm}{'&' if '?' in self.realm else '?'}{query}"


class _Answer(Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float = _SECONDS


def challenge_of(url: str, header: str) -> Challenge | None:
    """Return what the ``WWW-Authenticate`` *header* of an answer from *url* asks for; None if it is for no token service."""
    scheme, _, rest = header.strip().partition(" ")
    found = {key.lower(): quoted or bare for key, quoted, bare in _PAIR.findall(rest[:4096])}
    realm = found.get("realm", "")
    if scheme.lower() != "bearer" or not realm.startswith(("http://", "https://")):
        return None
    if len(realm) > 2048 or not sources.may_authorize(realm):
        raise Refused("the token service that it names is not asked: it is too long an address, or plain http to another machine")
    return Challenge(origin=origin_of(url), realm=realm, service=found.get("service", ""), scope=found.get("scope", ""))


def origin_of(url: str) -> str:
    """Return scheme, host and port of *url*: where its token may go."""
    return f"{urlsplit(url).scheme}://{sources.host_of(url)}:{sources.port_of(url)}"


def token_in(data: bytes) -> tuple[str, float]:
    """
    Return the token in a service's answer, and for how many seconds it is good.

    Raises:
        Refused: there is none.
    """
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except (msgspec.DecodeError, ValueError):
        raise Refused("its token service answers with no token") from None
    token = answer.token or answer.access_token
    if not _TOKEN.fullmatch(token) or len(token) > MOST_BYTES:
        raise Refused("its token service answers with no token")
    return token, max(answer.expires_in, _SECONDS)


class Tokens:
    """The tokens of a run, by what they are for; safe for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Challenge, tuple[str, float]] = {}

    def __repr__(self) -> str:
        return "Tokens(…)"

    def known(self, challenge: Challenge) -> str:
        """Return the token for *challenge* that is still good for a while; empty if there is none."""
        token, ends = self._known.get(challenge, ("", 0.0))
        return token if self._clock() < ends else ""

    def keep(self, challenge: Challenge, token: str, seconds: float) -> None:
        """Keep *token*, which is good for *seconds*."""
        self._known[challenge] = (token, self._clock() + seconds * 0.8)
