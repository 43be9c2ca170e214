"""
Reads what a network's operator adds to a snapshot: joins the modules of ``publish.sources`` with the network.

Rules that hold here:

1. Credentials are the operator's own: a netrc file that is named, the hub client's token for the hub, what ``docker login`` and
   ``oras login`` keep for a registry. Each goes to its own host alone.
2. What a hub or a registry vouches for by digest is not read to the end, only asked for: that it is there, has that size, and where it
   redirects to. Everything else is read and hashed.
3. The hosts that a source redirected to are remembered by the source's host: nodes must be permitted to follow.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path

from reconciler.core import gguf, urls
from reconciler.core.errors import FetchError, PublishError, SettingsError
from reconciler.core.gguf import GgufFacts
from reconciler.core.snapshot import Artifact
from reconciler.fetch import bucket, credentials, http, sources
from reconciler.fetch.connection import KeptConnections
from reconciler.fetch.credentials import Credential, Credentials
from reconciler.publish import artifacts
from reconciler.publish.artifacts import Measured
from reconciler.publish.sources import bucket as bucket_source
from reconciler.publish.sources import folder, hub, registry
from reconciler.publish.sources.listing import Listing, SourceFile

#: Shows the progress of chunks of a known or unknown (0) size.
Progress = Callable[[Iterator[bytes], int, str], Iterator[bytes]]
_SECONDS = 60.0
_HEAD_BYTES = 64 << 20  # enough for what precedes the tensors of a GGUF file: vocabularies have tens of megabytes

_ADDRESS_HINT = "check the address and the network, then type the command again; nothing was written"
_LOGIN_HINT = "its server wants a login: `hf auth login` or HF_TOKEN for hf://, `docker login` for oci://, --netrc FILE for other hosts"


def _silent(chunks: Iterator[bytes], _size: int, _name: str) -> Iterator[bytes]:
    return chunks


class SourceReader:
    """Lists and reads sources, with the credentials of the person who runs it."""

    def __init__(self, *, ca_file: str = "", netrc: Path | None = None, max_bytes: int = 1 << 40, progress: Progress = _silent) -> None:
        self._ca_file, self._max_bytes, self._progress = ca_file, max_bytes, progress
        self._known = credentials.read(netrc) if netrc else Credentials({})
        self._registries: Credentials | None = None
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._visited: dict[str, set[str]] = {}

    @property
    def redirects(self) -> dict[str, tuple[str, ...]]:
        """The hosts that sources redirected to, by the source's host: as patterns where the source is known to use many."""
        found = {}
        for host, visited in sorted(self._visited.items()):
            patterns = self._patterns.get(host, ())
            exact = {one for one in visited if one != host and not urls.host_matches(one, patterns)}
            if exact or (patterns and visited - {host}):
                found[host] = tuple(sorted({*patterns, *exact}))
        return found

    # -- what there is -----------------------------------------------------------------------------

    def listing(self, source: str, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Listing:
        """
        Return the files that *source*, an address, a folder or a file, stands for.

        Raises:
            PublishError: it cannot be listed, or has no files.
        """
        found = self._listing(source, include, exclude)
        self._patterns |= found.redirects
        return found

    def _listing(self, source: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> Listing:
        if source.startswith("hf://"):
            return hub.list_files(source, include=include, exclude=exclude)
        if source.startswith("oci://"):
            return registry.list_files(source, self.document, include=include, exclude=exclude)
        if bucket.is_object(source):
            name, key = bucket.split(source)
            with _as_publish_error():
                client = bucket.client()
            return bucket_source.list_files(name, key, client, include=include, exclude=exclude)
        if not http.is_url(source) and Path(source).is_dir():
            return folder.list_files(Path(source), include=include, exclude=exclude)
        name = sources.file_name(source)
        return Listing(files=(SourceFile(path=name, place=source, urls=(source,) if http.is_url(source) else ()),))

    def document(self, url: str, headers: dict[str, str], *, kept: KeptConnections | None = None) -> bytes:
        """
        Return the document of a registry at *url*, over one of the *kept* connections, if one leads there.

        Raises:
            FetchError: its server does not give it.
            TooLarge: it is larger than a registry's manifest may be.
        """
        with self._opened(url, headers, kept) as answer:
            return b"".join(http.chunks(answer, url, max_bytes=registry.MOST_BYTES, within_seconds=_SECONDS))

    # -- its bytes ---------------------------------------------------------------------------------

    def measure(self, file: SourceFile, *, read_all: bool = False, may_be_empty: bool = False) -> Measured:
        """
        Return digest, size and first bytes of *file*: as its source vouches for them, unless *read_all*, else by reading it.

        Raises:
            PublishError: it cannot be read, or is not what its source says.
            FetchError: its server does not give it.
        """
        if "://" not in file.place:
            path = Path(file.place)
            size = path.stat().st_size if path.is_file() else 0
            chunks = artifacts.read_chunks(path, max_bytes=self._max_bytes)
            return artifacts.measure(self._progress(chunks, size, file.path), head_bytes=_HEAD_BYTES, may_be_empty=may_be_empty)
        with self._opened(file.place) as answer:
            if file.digest and not read_all:
                return self._vouched(file, answer)
            if answer.length is None and not answer.chunked:
                raise FetchError(f"{sources.redact(file.place)} does not state its length, so an incomplete download would not be noticed")
            chunks = self._progress(http.chunks(answer, file.place, max_bytes=self._max_bytes), answer.length or 0, file.path)
            algorithm = file.digest.partition(":")[0] or "sha256"
            found = artifacts.measure(chunks, head_bytes=_HEAD_BYTES, algorithm=algorithm, may_be_empty=may_be_empty)
        if file.digest and found.digest != file.digest:
            raise PublishError(f"{sources.redact(file.place)} gives {found.digest}, and its source says {file.digest}")
        return found

    def _vouched(self, file: SourceFile, answer: HTTPResponse) -> Measured:
        """Return what the source says of *file*, with its first bytes where a header may be in them."""
        if answer.length is not None and answer.length != file.size:
            raise PublishError(f"{sources.redact(file.place)} has {answer.length:,} bytes, and its source says {file.size:,}")
        head = self._head(answer, file.place) if file.path.endswith(".gguf") else b""
        return Measured(digest=file.digest, size=file.size, head=head)

    def refusal(self, url: str, size: int) -> str:
        """Return why *url* does not give a file of *size* bytes; empty where it begins to."""
        try:
            with self._opened(url) as answer:
                if answer.length is not None and answer.length != size:
                    return f"it has {answer.length:,} bytes, and {size:,} are listed"
        except (FetchError, PublishError) as error:
            return error.message
        return ""

    def gguf_header(self, url: str, artifact: Artifact) -> GgufFacts | None:
        """
        Return the facts of the GGUF header at *url*; None where what is there has none.

        Raises:
            FetchError: its server does not give it.
        """
        with self._opened(url) as answer:
            head = self._head(answer, url)
        try:
            return artifacts.gguf_facts(Measured(digest=artifact.digest, size=artifact.size, head=head))
        except gguf.Malformed:
            return None

    def _head(self, answer: HTTPResponse, place: str) -> bytes:
        head = b""
        for chunk in http.chunks(answer, place, max_bytes=self._max_bytes):
            head += chunk
            if len(head) >= _HEAD_BYTES:
                break
        return head[:_HEAD_BYTES]

    def digest(self, url: str, artifact: Artifact) -> str:
        """Return the digest of what *url* gives, by the algorithm of *artifact*'s."""
        with self._opened(url) as answer:
            chunks = self._progress(http.chunks(answer, url, max_bytes=self._max_bytes), artifact.size, artifact.path)
            return artifacts.measure(chunks, algorithm=artifact.digest.partition(":")[0]).digest

    # -- the network -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, place: str, headers: dict[str, str] | None = None, kept: KeptConnections | None = None) -> Iterator[HTTPResponse]:
        visited: list[str] = []
        with _as_publish_error():
            url = bucket.locate(place)
        try:
            with http.opened(
                url, timeout_seconds=_SECONDS, headers=headers, ca_file=self._ca_file, authorize=self._header, visited=visited, kept=kept
            ) as answer:
                yield answer
        except FetchError as error:
            hint = _LOGIN_HINT if re.search(r"\b40[13]\b", error.message) else _ADDRESS_HINT
            raise type(error)(error.message, hint=hint) from None
        finally:
            if url == place:
                self._visited.setdefault(sources.host_of(url), set()).update(map(sources.host_of, visited))

    def _header(self, url: str) -> str | None:
        """Return what *url*'s host is sent: the first of a named netrc file, the hub client's token, a registry's login."""
        if known := self._known.header(url):
            return known
        if not sources.may_authorize(url):
            return None
        if (token := _hub_token(url)) is not None:
            return f"Bearer {token}" if token else None
        if self._registries is None:
            self._registries = Credentials(_registry_logins())
        return self._registries.header(url)


@contextlib.contextmanager
def _as_publish_error() -> Iterator[None]:
    try:
        yield
    except sources.Refused as error:
        raise PublishError(str(error)) from None


def _hub_token(url: str) -> str | None:
    """Return the hub client's token if *url* is the hub's, empty if there is none; None if it is another host's, or there is no client."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return None
    if (sources.host_of(url), sources.port_of(url)) != (sources.host_of(constants.ENDPOINT), sources.port_of(constants.ENDPOINT)):
        return None
    return get_token() or ""


def registry_login(registry: str) -> tuple[str, str] | None:
    """Return the name and the password that ``docker login`` or ``oras login`` keep for *registry*, if there are any."""
    found = _registry_logins().get(_server(registry))
    return (found.user, found.password) if found else None


def _registry_logins() -> dict[str, Credential]:
    """Return what ``docker login`` and ``oras login`` keep as plain entries; a credential helper keeps its own, and is not asked."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    try:
        entries = json.loads(path.read_bytes()).get("auths", {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise SettingsError(f"cannot read the logins in {path}") from None
    found = {}
    for host, entry in entries.items():
        with contextlib.suppress(binascii.Error, UnicodeError, AttributeError):
            user, colon, password = base64.b64decode((entry.get("auth") or "").encode(), validate=True).decode().partition(":")
            if colon:
                found[_server(host)] = Credential(user, password)
    return found


def _server(entry: str) -> str:
    """Return the host that a login is for; Docker Hub's is kept under an address of its own."""
    host = entry.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return "auth.docker.io" if host == "index.docker.io" else urls.normal_host(host)


def refuse_doubles(found: tuple[SourceFile, ...]) -> None:
    """
    Refuse two files that would have one path in the model's tree.

    Raises:
        PublishError: names it.
    """
    for path, same in itertools.groupby(sorted(file.path for file in found)):
        if len(list(same)) > 1:
            raise PublishError(f"two sources have a file {path!r}", hint="name their paths with --path, once for each file")
