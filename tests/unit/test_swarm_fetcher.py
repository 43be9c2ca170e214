"""When peers are asked, when HTTP takes over, and what becomes of what peers gave; the swarm's process says what a test wants."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec import structs

from reconciler.core import swarm as rules
from reconciler.core.events import Event, Incident, Notice
from reconciler.core.swarm import Swarm, Torrent
from reconciler.demo.server import Server
from reconciler.fetch import swarm
from reconciler.fetch.aria2_protocol import Status
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.seeding import Seeding, download_gid
from reconciler.fetch.settings import FetchSettings, SwarmSettings
from reconciler.fetch.swarm import SwarmContext, SwarmFetcher
from reconciler.fetch.swarm_daemon import Peer, PeerStatus
from reconciler.ports import Fetched, FetchFailed, Reporter, Want

SIZE = 1 << 20
DATA = bytes(range(256)) * (SIZE // 256)
DIGITS = hashlib.sha256(DATA).hexdigest()
WANT = Want(digest=f"sha256:{DIGITS}", size=SIZE, sources=("https://models.example.org/x",))
GID = download_gid(WANT.digest)
PIECES = rules.pieces([DATA], rules.piece_length(SIZE))
TORRENT = rules.torrent(DIGITS, SIZE, PIECES)
ENTRY = Torrent(digest=f"sha256:{hashlib.sha256(TORRENT).hexdigest()}", size=len(TORRENT), info_hash=rules.info_hash(DIGITS, SIZE, PIECES))
SEEDER, OTHER = Peer("45.66.0.2", "true"), Peer("45.66.0.11", "false")


class Daemon:
    """A swarm's process: each poll says the next of *bits*, and the last for ever."""

    def __init__(self, *bits: str, peers: Sequence[Peer] = (SEEDER, OTHER), speed: int = 0) -> None:
        self.bits, self.connected, self.speed = list(bits), list(peers), speed
        self.polls = 0
        self.added: list[str] = []
        self.removed: list[str] = []
        self.limits: list[int] = []

    def known(self) -> frozenset[str]:
        return frozenset()

    def add(self, torrent: bytes, options: Mapping[str, str]) -> None:
        assert torrent == TORRENT
        self.added.append(options["gid"])

    def poll(self, gids: Sequence[str]) -> dict[str, PeerStatus]:
        self.polls += 1
        assert self.polls < 200, "it waits for peers without an end"
        said = self.bits.pop(0) if len(self.bits) > 1 else self.bits[0]
        state = said if said in {"error", "waiting"} else "active"
        bits = "" if state == said else said
        found = Status(gid=GID, state=state, total=SIZE, done=0, speed=self.speed, prefix=0, bitfield=bits, error=24)
        return {gid: PeerStatus(download=found, uploaded=0) for gid in gids if gid == GID}

    def peers(self, gid: str) -> list[Peer]:
        assert gid == GID
        return self.connected

    def limit(self, gid: str, rate: int) -> None:
        assert gid == GID
        self.limits.append(rate)

    def remove(self, gid: str) -> None:
        self.removed.append(gid)


class Http:
    """What fetches over HTTP: it says which blobs it was asked for, and gives each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        del report
        for want in wants:
            self.asked.append(want.digest)
            yield Fetched(
                digest=want.digest, size=want.size, path=self.folder / "http", device=0, inode=0, mtime_ns=0, sources=want.sources
            )

    def close(self) -> None:
        pass


class Memory:
    def read(self) -> dict[str, Seeding]:
        return {}

    def write(self, found: dict[str, Seeding]) -> None:
        del found


class Site(SimpleNamespace):
    """A fetcher, with what is around it."""

    daemon: Daemon
    http: Http
    folder: Path
    refused: frozenset[str]
    outcome: Fetched

    def fetch(self, daemon: Daemon, **settings: float) -> list[Event]:
        """Fetch the blob; return what was reported."""
        self.daemon, said = daemon, list[Event]()
        chosen: dict[str, float] = {"reserve_bytes": 0, "slow_seconds": 3600.0, "alone_seconds": 3600.0} | settings
        context = SwarmContext(
            settings=SwarmSettings(folder=self.folder / "swarm", **chosen),  # type: ignore[arg-type]  # all of them are numbers
            swarm=Swarm(trackers=("http://45.66.0.1/announce",), torrents={WANT.digest: ENTRY}),
            staging=self.folder / "staging",
            torrents=self.folder / "torrents",
            templates=(),
            blob_path=lambda _: self.folder / "blob",
            memory=Memory(),
            now=lambda: datetime(2026, 11, 30, tzinfo=UTC),
            refused=self.refused,
        )
        fetcher = SwarmFetcher(self.http, context)
        fetcher._client = daemon  # type: ignore[assignment]  # its answers are what a test wants
        (outcome,) = fetcher.fetch([WANT], said.append)
        assert isinstance(outcome, Fetched)
        self.outcome = outcome
        fetcher.close()
        return said

    @property
    def arrived(self) -> bool:
        return (self.folder / "swarm" / "incoming" / DIGITS / DIGITS).exists()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(swarm, "_POLL_SECONDS", 0.01)
    incoming = tmp_path / "swarm" / "incoming" / DIGITS
    incoming.mkdir(parents=True)
    (incoming / DIGITS).write_bytes(DATA)
    (tmp_path / "staging").mkdir()
    (tmp_path / "torrents").mkdir()
    (tmp_path / "torrents" / DIGITS).write_bytes(TORRENT)
    return Site(folder=tmp_path, http=Http(tmp_path), refused=frozenset())


def notices(said: list[Event]) -> list[str]:
    return [one.text for one in said if isinstance(one, Notice)]


def handed_over(site: Site) -> bytes:
    """Return what is in staging for HTTP to go on from."""
    found = list((site.folder / "staging").rglob("data"))
    return found[0].read_bytes() if found else b""


def test_what_peers_give_is_taken_and_http_is_not_asked(site: Site) -> None:
    site.fetch(Daemon("8", "f"))
    assert site.outcome.sources == ("peers",)
    assert site.outcome.path.read_bytes() == DATA
    assert (site.http.asked, site.arrived) == ([], False)


def test_slow_peers_are_left_with_the_pieces_that_are_whole(site: Site) -> None:
    said = site.fetch(Daemon("8"), slow_seconds=0.1, min_rate_bytes=10 << 20)
    assert site.http.asked == [WANT.digest]
    assert "less than" in notices(said)[0]
    assert handed_over(site) == DATA[: 256 << 10]
    assert (site.arrived, GID in site.daemon.removed, site.daemon.limits) == (False, True, [0])


def test_near_the_reserve_in_the_middle_http_takes_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 40])

    def statvfs(path: object) -> SimpleNamespace:
        del path
        return SimpleNamespace(f_bavail=next(free, 1), f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)
    said = site.fetch(Daemon("8"), reserve_bytes=1 << 30)
    assert site.http.asked == [WANT.digest]
    assert notices(said) == [f"peers: the disk is near the reserve of [swarm]; {WANT.digest} is fetched over HTTP"]


def test_an_error_of_aria2_leaves_it_to_http(site: Site) -> None:
    assert "aria2 ended with error 24" in notices(site.fetch(Daemon("error")))[0]
    assert site.http.asked == [WANT.digest]


def test_peers_are_not_asked_for_a_blob_about_which_they_lied(site: Site) -> None:
    site.refused = frozenset({WANT.digest})
    site.fetch(Daemon("f"))
    assert (site.daemon.added, site.http.asked) == ([], [WANT.digest])


def test_wrong_bytes_are_left_to_http_and_deleted(site: Site) -> None:
    (site.folder / "swarm" / "incoming" / DIGITS / DIGITS).write_bytes(DATA[:-1] + b"?")
    site.fetch(Daemon("f"))
    assert (site.http.asked, site.arrived, handed_over(site)) == ([WANT.digest], False, b"")


@pytest.mark.slow
def test_wrong_pieces_cost_a_new_start_and_no_source_is_blamed(site: Site, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was taken over says that its pieces are whole: HTTP goes on from them, and the digest of the whole does not agree."""
    (site.folder / "swarm" / "incoming" / DIGITS / DIGITS).write_bytes(bytes(byte ^ 0xFF for byte in DATA))
    server.add(DATA)
    monkeypatch.setitem(globals(), "WANT", structs.replace(WANT, sources=(f"{server.address}/sha256/{DIGITS}",)))
    settings = FetchSettings(allow_http=True, allowed_hosts=("127.0.0.1",))
    site.http = Aria2Fetcher(site.folder / "staging", settings)  # type: ignore[assignment]  # the real one
    said = site.fetch(Daemon("c", peers=[SEEDER]), alone_seconds=0.0)
    assert site.outcome.path.read_bytes() == DATA
    assert [(one.kind, one.source) for one in said if isinstance(one, Incident)] == [("hash-mismatch", "")]


# -- a node alone


def test_a_node_alone_turns_to_http_and_gives_its_pieces_meanwhile(site: Site) -> None:
    seen: list[tuple[list[int], list[str], bool, bytes]] = []
    fetch = site.http.fetch

    def looking(wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        if wants:
            seen.append((list(site.daemon.limits), list(site.daemon.removed), site.arrived, handed_over(site)))
        yield from fetch(wants, report)

    site.http.fetch = looking  # type: ignore[method-assign]
    said = site.fetch(Daemon("c", peers=[SEEDER, SEEDER]), alone_seconds=0.0)
    assert notices(said) == [f"peers: no other node fetches it now; {WANT.digest} is fetched over HTTP"]
    assert seen == [([0, 1024], [], True, DATA[: 512 << 10])]  # it still gives them, and takes next to nothing
    assert (site.arrived, GID in site.daemon.removed) == (False, True)  # once the blob is there


@pytest.mark.parametrize(
    "peers",
    [
        [SEEDER, OTHER],  # another node fetches it
        [SEEDER, Peer("45.66.0.12", "true")],  # another node has it
        [OTHER],  # the seeder is gone
        [],  # nobody was found yet
    ],
)
def test_a_node_with_others_is_not_alone(site: Site, peers: list[Peer]) -> None:
    site.fetch(Daemon(*["8"] * 20, "f", peers=peers), alone_seconds=0.0)
    assert (site.http.asked, site.outcome.sources) == ([], ("peers",))


def test_what_is_nearly_there_does_not_change_to_http(site: Site) -> None:
    site.fetch(Daemon(*["8"] * 20, "f", peers=[SEEDER], speed=SIZE // 10), alone_seconds=0.0)
    assert site.http.asked == []


def test_whose_turn_has_not_come_is_neither_slow_nor_alone(site: Site) -> None:
    site.fetch(Daemon(*["waiting"] * 30, "f", peers=[SEEDER]), slow_seconds=0.05, alone_seconds=0.05)
    assert site.http.asked == []
