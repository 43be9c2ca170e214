"""
Credentials by host, from a netrc file that the operator names.

``default`` entries are ignored: they would send a password to any host that a redirect names. aria2 gets a file of our own with the same
entries, in a folder that only this user can read; after each redirect it looks up the new host's entry.
"""

from __future__ import annotations

import base64
import netrc
import re
from pathlib import Path

from msgspec import Struct

from reconciler.core.errors import SettingsError
from reconciler.fetch import sources

_WORD = re.compile(r"[!-~]+")


class Credential(Struct, frozen=True):
    """A user and a password. Never shown: ``repr`` would reach a log sooner or later."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Credential(…)"

    def header(self) -> str:
        """Return the value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Credentials:
    """The operator's credentials, each for one host."""

    def __init__(self, by_host: dict[str, Credential]) -> None:
        self._by_host = by_host

    def header(self, url: str) -> str | None:
        """Return the Authorization header for *url*, if its host has credentials and the connection is encrypted or local."""
        found = self._by_host.get(sources.host_of(url))
        return found.header() if found and sources.may_authorize(url) else None

    def covers(self, urls: tuple[str, ...]) -> bool:
        """Whether aria2 may use them for *urls*: at least one host has credentials, and none of these would be sent unencrypted."""
        known = [url for url in urls if sources.host_of(url) in self._by_host]
        return bool(known) and all(sources.may_authorize(url) for url in known)

    def text(self) -> str:
        """Return them as the lines of a netrc file."""
        return "".join(f"machine {host} login {it.user} password {it.password}\n" for host, it in self._by_host.items())


def read(path: Path | None) -> Credentials:
    """
    Read the netrc file at *path*; without one there are no credentials, whatever ``~/.netrc`` says.

    Raises:
        SettingsError: it cannot be read, others may read it, or it has a word that a netrc file cannot carry.
    """
    if path is None:
        return Credentials({})
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError, UnicodeError) as error:
        raise SettingsError(f"cannot read the credentials in {path}: {getattr(error, 'strerror', None) or 'malformed'}") from None
    found = {}
    for host, (user, _, password) in hosts.items():
        if host == "default":
            continue
        if not all(_WORD.fullmatch(word or "") for word in (host, user, password)):
            raise SettingsError(f"{path}: {sources.clean(host)} needs a login and a password, in printable ASCII without spaces")
        found[host.rstrip(".").lower()] = Credential(user, password or "")
    return Credentials(found)
