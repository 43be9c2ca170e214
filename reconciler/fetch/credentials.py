"""
Credentials by host: from the settings, and from a netrc file that the operator names.

Rules that hold here:

1. Each goes to the one host that it is for, over TLS or to this machine, and to no other; ``host:port`` is for that port alone. There is
   no entry for any host: netrc's ``default`` is ignored, since it would send a password wherever a redirect leads.
2. A file that others can read is refused. What is read is never shown, and stands in no file, argument or environment of a child process.
3. aria2 gets a header with a single download, and only where all of that download's URLs lead to the header's host (``Daemon``). Behind a
   proxy it could follow a redirect with it, so there it gets passwords as a netrc file, which it looks up by host, and no bearer token.
"""

from __future__ import annotations

import base64
import netrc
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from reconciler.core import urls
from reconciler.core.errors import SettingsError
from reconciler.fetch import sources
from reconciler.fetch.settings import CredentialSource

_WORD = re.compile(r"[!-~]+")
_MOST_BYTES = 16 << 10


class Credential(Struct, frozen=True):
    """A user and a password, or a bearer token as the password. Never shown: ``repr`` would reach a log sooner or later."""

    user: str
    password: str
    kind: Literal["basic", "bearer"] = "basic"

    def __repr__(self) -> str:
        return "Credential(…)"

    def header(self) -> str:
        """Return the value of an Authorization header (RFC 7617, RFC 6750)."""
        if self.kind == "bearer":
            return f"Bearer {self.password}"
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Credentials:
    """The operator's credentials, each for one host, or one port of it."""

    def __init__(self, by_host: dict[str, Credential]) -> None:
        self._by_host = by_host

    def of(self, url: str) -> Credential | None:
        """Return the credential for *url*, if there is one and the connection is encrypted or local."""
        host, port = sources.host_of(url), sources.port_of(url)
        shown = f"[{host}]" if ":" in host else host
        found = self._by_host.get(f"{shown}:{port}") or self._by_host.get(host)
        return found if found and sources.may_authorize(url) else None

    def header(self, url: str) -> str | None:
        """Return the Authorization header for *url*, if its host has credentials and the connection is encrypted or local."""
        found = self.of(url)
        return found.header() if found else None

    def covers(self, urls: tuple[str, ...]) -> bool:
        """Whether aria2 may look them up for *urls*: at least one host has a password, and none of these would be sent unencrypted."""
        known = [url for url in urls if f"machine {sources.host_of(url)} " in self.text()]
        return bool(known) and all(sources.may_authorize(url) for url in known)

    def text(self) -> str:
        """Return the passwords of hosts as the lines of a netrc file, which knows neither tokens nor ports."""
        return "".join(
            f"machine {host} login {it.user} password {it.password}\n"
            for host, it in self._by_host.items()
            if it.kind == "basic" and ":" not in host and all(map(_WORD.fullmatch, (it.user, it.password)))
        )


def read(path: Path | None, given: Iterable[CredentialSource] = ()) -> Credentials:
    """
    Read the netrc file at *path* and the credentials that the settings have *given*, which come first; ``~/.netrc`` is not looked at.

    Raises:
        SettingsError: one cannot be read, others may read it, or it has a word that a header or a netrc file cannot carry.
    """
    found = _from_netrc(path) if path else {}
    return Credentials(found | {_key(one.host): _read_one(one) for one in given})


def _key(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return f"{urls.normal_host(name)}:{port}" if colon and port.isdigit() and not name.endswith(":") else urls.normal_host(host)


def _read_one(source: CredentialSource) -> Credential:
    where = f"${source.variable}" if source.variable else source.file
    text = _variable(source) if source.variable else _private_text(_path(source))
    if source.kind == "basic":
        user, colon, password = text.partition(":")
        if not colon or not user.isprintable() or not password.isprintable():
            raise SettingsError(f"{where}: the credentials for {source.host} are not of the form user:password")
        return Credential(user, password)
    if not _WORD.fullmatch(text):
        raise SettingsError(f"{where}: the token for {source.host} is not one word of printable ASCII")
    return Credential("", text, "bearer")


def _variable(source: CredentialSource) -> str:
    if not (text := os.environ.get(source.variable, "").strip()):
        raise SettingsError(
            f"${source.variable}, the token for {source.host}, is not set", hint="set it for this process, or use token_file"
        )
    return text


def _path(source: CredentialSource) -> Path:
    if not source.file.startswith("%d/"):
        return Path(source.file)
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not folder:
        raise SettingsError(
            f"{source.file}, the credentials for {source.host}, is one that systemd passes on, and it passed none",
            hint="add LoadCredential= to the unit, or name a file",
        )
    return Path(folder, source.file.removeprefix("%d/"))


def _private_text(path: Path) -> str:
    """Return the first line of *path*, which nobody but its owner may read."""
    try:
        _refuse_readable(path)
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise SettingsError(f"cannot read the credentials in {path}: more than {_MOST_BYTES} bytes")
        return data.decode().partition("\n")[0].strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"cannot read the credentials in {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def _refuse_readable(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        raise SettingsError(f"{path} can be read by others", hint=f"`chmod 600 {shlex.quote(str(path))}` takes that right from them")


def _from_netrc(path: Path) -> dict[str, Credential]:
    try:
        _refuse_readable(path)
        entries = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError, UnicodeError) as error:
        raise SettingsError(f"cannot read the credentials in {path}: {getattr(error, 'strerror', None) or 'malformed'}") from None
    found = {}
    for host, (user, _, password) in entries.items():
        if host == "default":
            continue
        if not all(_WORD.fullmatch(word or "") for word in (host, user, password)):
            raise SettingsError(f"{path}: {sources.clean(host)} needs a login and a password, in printable ASCII without spaces")
        found[urls.normal_host(host)] = Credential(user, password or "")
    return found
