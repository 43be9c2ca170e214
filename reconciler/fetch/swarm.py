"""
Blobs from peers, with HTTP behind them; and blobs of the store given to peers.

Rules that hold here:

1. What peers gave is copied out of the swarm's folder and hashed on the way, in this process. The copy, which the swarm's user cannot
   reach, is what is handed on; the file in the swarm's folder is never looked at again.
2. Nothing waits for peers longer than ``slow_seconds``: a blob that gains less than ``min_rate_bytes`` a second for so long, or whose bytes
   are wrong, or that would leave too little of the disk, is fetched over HTTP. HTTP goes on from the pieces that are there and whole.
3. Where a single machine gives a blob, and no other node fetches it, HTTP takes over too: it costs the origin the same bytes, and over a
   long path aria2 has few requests under way for a peer. What arrived is given to peers meanwhile, so that later nodes are not alone.
4. Blobs without a torrent are fetched over HTTP first, while peers give the others.
5. A torrent counts if it is the one that the network signed, and has the one shape that a torrent of the blob has (``core.swarm``).
6. Blobs are seeded from the store itself, which the swarm's user can read and not write; those of a run, from when they are in the store.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from reconciler import files
from reconciler.core import digest as digests
from reconciler.core import urls
from reconciler.core.errors import FetchError
from reconciler.core.events import FetchProgress, Incident, Notice
from reconciler.core.swarm import MOST_TORRENT_BYTES, Swarm, matches, piece_length
from reconciler.fetch import aria2_protocol, seeding, swarm_folder
from reconciler.fetch.progress import Progress
from reconciler.fetch.seeding import Seeding
from reconciler.fetch.settings import FetchSettings, SwarmSettings
from reconciler.fetch.staging import Staging
from reconciler.fetch.swarm_daemon import INCOMING, Client, PeerStatus, SwarmLost
from reconciler.fetch.swarm_folder import PEERS, Arrivals
from reconciler.ports import Fetched, Fetcher, FetchFailed, Reporter, Want

_POLL_SECONDS = 0.3
_ENDLESS_MINUTES = "5256000"
#: What a torrent still takes from peers while HTTP fetches its blob; aria2 has no way to take nothing and to give.
_SHARING_BYTES = 1024
#: What peers will have given within this time is not worth a change to HTTP, by which the pieces that are not whole are lost.
_SOON_SECONDS = 15


class Memory(Protocol):
    """What a node remembers of what it seeds, from run to run."""

    def read(self) -> dict[str, Seeding]:
        """Return what is seeded, by digest."""

    def write(self, found: dict[str, Seeding]) -> None:
        """Remember what is seeded."""


class SwarmContext(Struct, frozen=True, kw_only=True):
    """What the node and its network say about peers."""

    settings: SwarmSettings
    swarm: Swarm
    #: The folder of downloads, on the store's file system, and the one where torrents are kept.
    staging: Path
    torrents: Path
    #: URL templates of the network and the node, where torrents may be had too.
    templates: tuple[str, ...]
    #: Where the store has a blob.
    blob_path: Callable[[str], Path]
    memory: Memory
    now: Callable[[], datetime]
    #: Blobs of which peers gave wrong bytes before.
    refused: frozenset[str] = frozenset()


class Download:
    """One blob that peers are asked for."""

    def __init__(self, want: Want, torrent: bytes, now: float) -> None:
        self.want, self.torrent = want, torrent
        self.digits = digests.parse(want.digest)[1]
        self.gid = seeding.download_gid(want.digest)
        self.progress = Progress(want.size)
        self.restart(now)
        self.status: PeerStatus | None = None

    def restart(self, now: float) -> None:
        """Measure from here on whether peers are slow, and whether it has found them."""
        self.progress.watch(now)
        self.since = now

    @property
    def whole_pieces(self) -> list[aria2_protocol.Run]:
        """The ranges of bytes whose pieces aria2 says that it has checked. How long a piece is follows from the torrent."""
        piece, size, bits = piece_length(self.want.size), self.want.size, self.status.download.bitfield if self.status else ""
        marked = [index for index in range(-(-size // piece)) if aria2_protocol.is_set(bits, index)]
        return [(index * piece, min((index + 1) * piece, size)) for index in marked]


class SwarmFetcher:
    """Fetches from peers what they have, and the rest through *inner*."""

    def __init__(self, inner: Fetcher, context: SwarmContext) -> None:
        self._inner, self._context = inner, context
        self._client = Client(context.settings.folder)
        self._arrivals = Arrivals(context.settings.folder / INCOMING)
        self._staging = Staging(context.staging)
        self._least = FetchSettings(min_rate_bytes=context.settings.min_rate_bytes, slow_seconds=context.settings.slow_seconds)
        self._closed = threading.Event()
        self._guard = threading.Lock()
        self._fetched: set[str] = set()
        #: What HTTP fetches while peers are still given it.
        self._shared: dict[str, Download] = {}

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*."""
        downloads = self._begin(wants, report)
        asked = {one.want.digest for one in downloads}
        try:
            yield from self._over_http([want for want in wants if want.digest not in asked], report)
            while downloads and not self._closed.is_set():
                self._poll(downloads, report)
                left = []
                for one in list(downloads):
                    if self._is_whole(one):
                        outcome = self._taken(one, report)
                        downloads.remove(one)
                        if outcome is None:
                            left.append(one.want)
                        else:
                            yield outcome
                            self._end(one, outcome.digest)
                    elif (why := self._given_up(one)) or self._is_alone(one):
                        self._hand_over(one, why, report)
                        downloads.remove(one)
                        left.append(one.want)
                yield from self._over_http(left, report)
                if downloads:
                    self._closed.wait(_POLL_SECONDS)
            yield from (FetchFailed(digest=one.want.digest, error=FetchError("the download was stopped")) for one in downloads)
        finally:
            for one in (*downloads, *self._shared.values()):
                self._forget(one)

    def close(self) -> None:
        """End what is fetched, and see to what is seeded; idempotent."""
        self._inner.close()
        if self._closed.is_set():
            return
        self._closed.set()
        self._tidy()
        with self._guard, contextlib.suppress(SwarmLost, OSError):
            before = self._context.memory.read()
            found = seeding.update(self._client, self._seeds(), before, self._fetched, self._context.now())
            if found != before:
                self._context.memory.write(found)

    def _tidy(self) -> None:
        """Delete what arrived of blobs that are in the store by now, or that no torrent names any more."""
        with contextlib.suppress(OSError):
            open_ = {digests.parse(name)[1] for name in self._context.swarm.torrents if not self._context.blob_path(name).exists()}
            for digits in self._arrivals.names():
                if digits not in open_:
                    self._arrivals.delete(digits)

    def _seeds(self) -> seeding.Seeds:
        return seeding.Seeds(
            settings=self._context.settings, swarm=self._context.swarm, torrent=self._kept_torrent, blob_path=self._context.blob_path
        )

    # -- beginning -----------------------------------------------------------------------------------------

    def _begin(self, wants: Sequence[Want], report: Reporter) -> list[Download]:
        """Ask peers for those of *wants* that have a torrent; return them."""
        named = [want for want in wants if want.digest in self._context.swarm.torrents and want.digest not in self._context.refused]
        found: list[Download] = []
        try:
            with self._guard:
                _ = self._client.known() if named else ()
        except SwarmLost as error:
            report(Notice(level="warning", text=f"the swarm's aria2c: {error}; blobs are fetched over HTTP"))
            return []
        torrents = self._torrents(named, report)
        for want in sorted(named, key=lambda one: one.size):
            download = Download(want, torrents[want.digest], time.monotonic()) if want.digest in torrents else None
            if download and self._has_room(want.size * 2 + sum(2 * one.want.size for one in found)):
                found.append(download)
        for one in found:
            self._ask(one)
        return found

    def _ask(self, one: Download) -> None:
        """Ask peers for *one*. Where aria2 is lost, nothing is gained, and HTTP takes over in time."""
        folder = self._context.settings.folder / INCOMING / one.digits
        options = {
            "gid": one.gid,
            "dir": str(folder),
            "bt-tracker": ",".join(self._context.swarm.trackers),
            "check-integrity": "true",  # what an earlier run left is checked piece by piece, and continued
            "seed-time": _ENDLESS_MINUTES,  # until the blob is in the store
            "seed-ratio": "0.0",
        }
        with self._guard, contextlib.suppress(SwarmLost):
            self._client.add(one.torrent, options)
            self._client.limit(one.gid, 0)  # a run that was killed may have left it limited

    def _has_room(self, size: int) -> bool:
        """Whether *size* bytes more, here and in the store, leave the reserve free."""
        try:
            found = os.statvfs(self._context.settings.folder)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize - size >= self._context.settings.reserve_bytes

    def _torrents(self, wants: Sequence[Want], report: Reporter) -> dict[str, bytes]:
        """Return the torrents of *wants*, by the blob's digest: those that are kept, and the others over HTTP."""
        found = {want.digest: data for want in wants if (data := self._kept_torrent(want.digest))}
        missing = {self._context.swarm.torrents[want.digest].digest: want for want in wants if want.digest not in found}
        asked = [self._torrent_want(want.digest) for want in missing.values()]
        for outcome in self._inner.fetch(asked, report) if asked else ():
            if isinstance(outcome, Fetched) and (data := _read(outcome.path, MOST_TORRENT_BYTES)):
                want = missing[outcome.digest]
                if digests.of(data, digests.parse(outcome.digest)[0]) == outcome.digest and self._fits(want.digest, want.size, data):
                    self._keep_torrent(want.digest, data)
                    found[want.digest] = data
            self._staging.discard(outcome.digest)
        return found

    def _torrent_want(self, name: str) -> Want:
        entry = self._context.swarm.torrents[name]
        algorithm, digits = digests.parse(entry.digest)
        places = (*entry.urls, *(urls.expand(template, algorithm, digits) for template in self._context.templates))
        return Want(digest=entry.digest, size=entry.size, sources=tuple(dict.fromkeys(places)))

    def _fits(self, name: str, size: int, data: bytes) -> bool:
        return matches(data, digests.parse(name)[1], size)

    def _kept_torrent(self, name: str) -> bytes:
        """Return the torrent of the blob *name*, if it is kept here and is still the signed one; else nothing."""
        entry = self._context.swarm.torrents.get(name)
        data = _read(self._context.torrents / digests.parse(name)[1], MOST_TORRENT_BYTES) if entry else b""
        return data if entry and data and digests.of(data, digests.parse(entry.digest)[0]) == entry.digest else b""

    def _keep_torrent(self, name: str, data: bytes) -> None:
        with files.translate_errors("keep a torrent"):
            self._context.torrents.mkdir(parents=True, exist_ok=True)
            path = self._context.torrents / digests.parse(name)[1]
            files.delete(path)
            path.write_bytes(data)  # torn by a crash, it has another digest, and is fetched again

    # -- while they come -----------------------------------------------------------------------------------

    def _poll(self, downloads: list[Download], report: Reporter) -> None:
        try:
            with self._guard:
                found = self._client.poll([one.gid for one in downloads])
        except SwarmLost:
            return  # nothing was gained; that it stays so is noticed by ``_given_up``
        for one in downloads:
            if one.gid not in found:
                self._ask(one)  # it was started again meanwhile
                continue
            one.status = found[one.gid]
            if one.status.download.state == "waiting":
                one.restart(time.monotonic())  # its turn has not come
            one.progress.done = sum(last - first for first, last in one.whole_pieces)
            one.progress.speed = one.status.download.speed
            report(
                FetchProgress(
                    digest=one.want.digest, done=one.progress.done, total=one.want.size, rate=one.progress.speed, hashed=0, source=PEERS
                )
            )

    def _is_whole(self, one: Download) -> bool:
        return one.status is not None and one.progress.done == one.want.size

    def _given_up(self, one: Download) -> str:
        """Return why HTTP takes over, or nothing."""
        if one.status and one.status.download.state in {"error", "removed"}:
            return f"aria2 ended with error {one.status.download.error}"
        if not self._has_room(one.want.size - one.progress.done + one.want.size):
            return "the disk is near the reserve of [swarm]"
        if one.progress.is_slow(time.monotonic(), self._least):
            return f"less than {self._least.min_rate_bytes} bytes a second for {self._least.slow_seconds:g} seconds"
        return ""

    def _is_alone(self, one: Download) -> bool:
        """Whether one machine, which has all of it, is the only peer, and gives it slowly; asked once in ``alone_seconds``."""
        now = time.monotonic()
        if now - one.since < self._context.settings.alone_seconds:
            return False
        one.since = now
        if one.want.size - one.progress.done < one.progress.speed * _SOON_SECONDS:
            return False
        with self._guard, contextlib.suppress(SwarmLost):
            peers = self._client.peers(one.gid)
            return all(peer.seeder == "true" for peer in peers) and len({peer.ip for peer in peers}) == 1
        return False

    def _over_http(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        for outcome in self._inner.fetch(wants, report) if wants else ():
            yield outcome
            if isinstance(outcome, Fetched) and outcome.digest in self._context.swarm.torrents:
                self._fetched.add(outcome.digest)
            if one := self._shared.pop(outcome.digest, None):
                self._end(one, outcome.digest)

    # -- taking what came ----------------------------------------------------------------------------------

    def _taken(self, one: Download, report: Reporter) -> Fetched | None:
        """Return the verified copy of what peers gave; None where its bytes are not the blob, or cannot be read."""
        attempt = self._staging.start_attempt(one.want.digest)
        try:
            with self._arrivals.open(one.digits) as source:
                fetched = swarm_folder.verified_copy(one.want, source, attempt.data)
        except OSError as error:
            report(Notice(level="warning", text=f"peers: what they gave of {one.want.digest} cannot be read: {error.strerror}"))
            fetched = None
        else:
            if fetched is None:
                text = "what peers gave does not hash to it"
                report(Incident(kind="hash-mismatch", blob=one.want.digest, source=PEERS, detail=text))
        if fetched is None:
            self._staging.discard(one.want.digest)
            self._forget(one)
            self._arrivals.delete(one.digits)
        return fetched

    def _end(self, one: Download, name: str) -> None:
        """Seed *one* from the store, where it is there by now, and give its place in the swarm's folder free."""
        self._staging.remove_if_empty(name)
        self._fetched.add(name)
        self._forget(one)
        with self._guard, contextlib.suppress(SwarmLost):
            if self._context.blob_path(name).exists():
                seeding.begin(self._client, self._seeds(), name, Seeding(since=self._context.now()), self._context.now())
        self._arrivals.delete(one.digits)

    def _hand_over(self, one: Download, why: str, report: Reporter) -> None:
        """Let HTTP go on from the pieces that are whole, or else from byte 0; without a reason *why*, peers are still given them."""
        text = f"peers: {why or 'no other node fetches it now'}; {one.want.digest} is fetched over HTTP"
        report(Notice(level="warning" if why else "info", text=text))
        if why:
            self._forget(one)
        else:
            self._shared[one.want.digest] = one
            self._limit(one, _SHARING_BYTES)
        with contextlib.suppress(OSError), self._arrivals.open(one.digits) as source:
            if one.whole_pieces and self._has_room(one.want.size):
                attempt = self._staging.start_attempt(one.want.digest)
                swarm_folder.copy_ranges(source, attempt.data, one.whole_pieces)
        if why:
            self._arrivals.delete(one.digits)

    def _limit(self, one: Download, rate: int) -> None:
        with self._guard, contextlib.suppress(SwarmLost):
            self._client.limit(one.gid, rate)

    def _forget(self, one: Download) -> None:
        with self._guard, contextlib.suppress(SwarmLost):
            self._client.remove(one.gid)


def _read(path: Path, most: int) -> bytes:
    """Return the bytes of the file at *path*; nothing where there is none, or it has more than *most*."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        data = file.read(most + 1)
        return data if len(data) <= most else b""
    return b""
