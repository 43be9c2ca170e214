"""
Signed documents, from files and addresses: read up to a cap before anything is parsed, and named in each refusal.

There are several documents, each made by somebody else, so a refusal says which one it is about.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from reconciler.core import text
from reconciler.core.errors import BadEnvelope, BadSignature, FetchError, PublishError, SettingsError, TooLarge, WrongNetwork
from reconciler.fetch.settings import FetchSettings

if TYPE_CHECKING:
    from reconciler.fetch.connection import KeptConnections
    from reconciler.fetch.http import Document

#: Connections that the documents of one run share; None: each has its own.
Kept: TypeAlias = "KeptConnections | None"

BAD_ROOT_HINT = "get root.json anew from the network's operator; `reconcile root inspect FILE` shows who signed it"
NOT_READABLE_HINT = "let the user who runs reconcile read it: it must be a plain file"
NO_FILE_HINT = "give the signed document's URL or file"
NO_SNAPSHOT_HINT = "name its URL or file as [network] snapshot in the settings"


@contextlib.contextmanager
def named(place: str, hint: str = "", data: bytes | None = None) -> Iterator[None]:
    """
    Put *place*, the document that is read, in front of a refusal's message, and give the refusal a *hint* of its own.

    Where a tool changed *data*, the document's bytes, the message says how.
    """
    try:
        yield
    except (BadEnvelope, BadSignature, TooLarge, WrongNetwork) as error:
        cause = text.tool_damage(data) if data is not None else ""
        raise type(error)(f"{place}: {cause or error.message}", hint=hint or error.hint) from None


def redacted(place: str) -> str:
    """Return *place*, a URL or path, as it may be shown and kept: a URL without user and query."""
    from reconciler.fetch import sources  # a plan needs none of it

    return sources.redact(place) if "://" in place else place


def read_capped(path: Path, cap: int) -> bytes:
    """Return the file's bytes, at most one more than *cap*, so that whoever checks the size refuses it; raises OSError."""
    with open(path, "rb", opener=_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        return file.read(cap + 1)


def _nonblocking(path: str, flags: int) -> int:
    """Open without waiting: opening a FIFO in a checkout would wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def _authorize(download: FetchSettings) -> Callable[[str], str | None] | None:
    """Return what gives a document's host the credentials that the settings have for it."""
    if not (download.credentials or download.netrc):
        return None
    from reconciler.fetch import credentials

    return credentials.read(download.netrc, download.credentials).header


@contextlib.contextmanager
def kept_connections() -> Iterator[KeptConnections]:
    """Give what keeps connections open between the documents of one run."""
    from reconciler.fetch.connection import KeptConnections

    found = KeptConnections()
    with contextlib.closing(found) as kept:
        yield kept


def fetch(source: str, download: FetchSettings, *, cap: int, etag: str = "", hint: str = NO_FILE_HINT, kept: Kept = None) -> Document:
    """
    Return the document at *source*, a URL or path; for a URL, nothing where the server still has what *etag* names. Over one of the
    connections that are *kept*, if there is one.

    Raises:
        FetchError: nothing answers, or not with a document.
        SettingsError: the file cannot be read; *hint* says what to do.
        TooLarge: the server sends more than *cap* bytes.
    """
    from reconciler.fetch import http  # TLS comes with it, and a plan needs none

    if source.startswith("oci://"):
        return _from_registry(source, download, cap, etag, kept)
    if not http.is_url(source):
        try:
            with Path(source).open("rb") as file:
                return http.Document(data=file.read(cap + 1))
        except OSError as error:
            raise SettingsError(f"{source} cannot be read: {error.strerror}", hint=hint) from None
    return _get(source, download, cap, kept, etag=etag)


def _get(url: str, download: FetchSettings, cap: int, kept: Kept, *, etag: str = "", accept: str = "") -> Document:
    from reconciler.fetch import http

    try:
        return http.get(
            url,
            max_bytes=cap,
            timeout_seconds=download.timeout_seconds,
            etag=etag,
            proxy=download.proxy,
            ca_file=str(download.ca_file or ""),
            allow_http=download.allow_http,
            authorize=_authorize(download),
            kept=kept,
            **({"accept": accept} if accept else {}),
        )
    except FetchError as error:
        told = FetchError(error.message, hint="look at the address and at the network; what was accepted before stays")
        told.asked_seconds = error.asked_seconds
        raise told from None


def _from_registry(source: str, download: FetchSettings, cap: int, etag: str, kept: Kept) -> Document:
    """Return the layer ``snapshot.json`` of the artifact *source*; its digest is its ETag. Only its signatures say whether it is good."""
    from reconciler.core import digest
    from reconciler.fetch import http
    from reconciler.publish.sources import registry

    def read(url: str, headers: dict[str, str]) -> bytes:
        return _get(url, download, registry.MOST_BYTES, kept, accept=headers["Accept"]).data or b""

    try:
        (file,) = registry.list_files(source, read, include=("snapshot.json",)).files
    except PublishError as error:
        raise FetchError(error.message, hint="`reconcile snapshot push FILE` and this address put a signed snapshot there") from None
    if file.digest == etag:
        return http.Document(data=None, etag=etag)
    data = _get(file.place, download, cap, kept).data or b""
    if file.digest.startswith("sha256:") and digest.of(data) != file.digest:
        raise FetchError(f"{redacted(source)}: the registry gives another snapshot than its manifest names")
    return http.Document(data=data, etag=file.digest)
