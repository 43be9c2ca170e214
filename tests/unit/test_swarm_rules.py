"""What a node does with a swarm's process that was taken over, and with what it brings; and how long a blob is seeded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from reconciler import settings_file
from reconciler.commands.context import from_settings
from reconciler.core.errors import SettingsError
from reconciler.fetch import seeding, swarm, swarm_daemon, swarm_folder
from reconciler.fetch.aria2_protocol import Status
from reconciler.fetch.seeding import Seeding
from reconciler.fetch.settings import SwarmSettings
from reconciler.fetch.swarm_daemon import Client, Contact, PeerStatus, SwarmLost
from reconciler.fetch.swarm_folder import Arrivals
from reconciler.ports import Want

DATA = b"what peers gave" * 100
DIGITS = hashlib.sha256(DATA).hexdigest()
WANT = Want(digest=f"sha256:{DIGITS}", size=len(DATA), sources=())
NOW = datetime(2026, 11, 30, tzinfo=UTC)


# -- the folder of what arrives


@pytest.fixture
def arrived(tmp_path: Path) -> Path:
    """Return a swarm's folder in which the blob has arrived."""
    (tmp_path / "incoming" / DIGITS).mkdir(parents=True)
    (tmp_path / "incoming" / DIGITS / DIGITS).write_bytes(DATA)
    return tmp_path / "incoming"


def test_what_arrived_is_copied_and_verified_on_the_way(arrived: Path, tmp_path: Path) -> None:
    with Arrivals(arrived).open(DIGITS) as source:
        fetched = swarm_folder.verified_copy(WANT, source, tmp_path / "copy")
    assert fetched
    assert (fetched.path.read_bytes(), fetched.sources) == (DATA, ("peers",))
    assert fetched.inode != (arrived / DIGITS / DIGITS).stat().st_ino


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:-1] + b"\xff", b"", DATA[1:]])
def test_other_bytes_are_not_the_blob(arrived: Path, tmp_path: Path, data: bytes) -> None:
    (arrived / DIGITS / DIGITS).write_bytes(data)
    with Arrivals(arrived).open(DIGITS) as source:
        assert swarm_folder.verified_copy(WANT, source, tmp_path / "copy") is None


def test_bytes_behind_the_signed_size_are_not_read(arrived: Path, tmp_path: Path) -> None:
    (arrived / DIGITS / DIGITS).write_bytes(DATA + b"more")
    with Arrivals(arrived).open(DIGITS) as source:
        assert swarm_folder.verified_copy(WANT, source, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == len(DATA)


def test_a_link_in_the_swarms_folder_neither_reads_nor_deletes_a_file_of_the_store(arrived: Path, tmp_path: Path) -> None:
    """The file in the store has the very name that is deleted: a process that was taken over would have it deleted by the node."""
    store = tmp_path / "store" / DIGITS[:2]
    store.mkdir(parents=True)
    (store / DIGITS).write_bytes(DATA)
    (arrived / DIGITS / DIGITS).unlink()
    (arrived / DIGITS).rmdir()
    (arrived / DIGITS).symlink_to(store)
    naive = arrived / DIGITS / DIGITS
    assert naive.exists()  # what `unlink` of the whole path would delete
    with pytest.raises(OSError), Arrivals(arrived).open(DIGITS):
        pass
    Arrivals(arrived).delete(DIGITS)
    assert (store / DIGITS).read_bytes() == DATA


def test_a_link_in_the_place_of_the_file_is_not_followed(arrived: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    (arrived / DIGITS / DIGITS).unlink()
    (arrived / DIGITS / DIGITS).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError), Arrivals(arrived).open(DIGITS):
        pass
    Arrivals(arrived).delete(DIGITS)
    assert (tmp_path / "secret").exists()
    assert not (arrived / DIGITS).exists()


def test_a_pipe_in_the_place_of_the_file_is_refused_at_once(arrived: Path) -> None:
    (arrived / DIGITS / DIGITS).unlink()
    os.mkfifo(arrived / DIGITS / DIGITS)
    with pytest.raises(OSError, match="no plain file"), Arrivals(arrived).open(DIGITS):
        pass


def test_a_folder_with_files_of_another_name_stays(arrived: Path) -> None:
    (arrived / DIGITS / "notes").touch()
    (arrived / "not-a-digest").mkdir()
    assert Arrivals(arrived).names() == [DIGITS]
    Arrivals(arrived).delete(DIGITS)
    assert [path.name for path in (arrived / DIGITS).iterdir()] == ["notes"]


def test_only_the_ranges_that_are_whole_are_handed_on(arrived: Path, tmp_path: Path) -> None:
    with Arrivals(arrived).open(DIGITS) as source:
        swarm_folder.copy_ranges(source, tmp_path / "copy", [(0, 10), (20, 30)])
    assert (tmp_path / "copy").read_bytes() == DATA[:10] + bytes(10) + DATA[20:30]


# -- the process


class Answer:
    """What a swarm's process answers, right or wrong."""

    body = b"[]"
    #: Seconds between two bytes; all at once where it is 0.
    pause = 0.0
    seen: str = ""
    written = 0


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Answer]:
    answer = Answer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer.seen = self.client_address[0]
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # it is not read to its end
                for part in [answer.body] if not answer.pause else [bytes([one]) for one in answer.body]:
                    self.wfile.write(part)
                    answer.written += len(part)
                    time.sleep(answer.pause)  # the server's own slowness

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    contact = Contact(port=server.server_address[1], secret="s")
    (tmp_path / "rpc.json").write_bytes(msgspec.json.encode(contact))
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"nonsense", b"{}", b"[]", b"[1]", b'[{"result": {"gid": "x"}}]', b'[{"result": 3}]', b'[{"result": null}]', b"[" * 100_000,
        b'[{"result": {"gid": "x", "status": "active", "totalLength": "9", "completedLength": "many"}}]',
        b" " * (5 << 20) + b'[{"error": {"message": "no such download"}}]',
    ],
)  # fmt: skip
def test_whatever_the_swarms_process_answers_it_is_lost_and_nothing_else_happens(answering: Answer, tmp_path: Path, body: bytes) -> None:
    answering.body = body
    with pytest.raises(SwarmLost):
        Client(tmp_path).poll(["0" * 16])


def status_answer(**said: object) -> bytes:
    """Return an answer to tellStatus with the fields *said* in place of right ones."""
    right = {"gid": "0" * 16, "status": "active", "totalLength": "1500", "completedLength": "9", "bitfield": "8", "pieceLength": "262144"}
    return msgspec.json.encode([{"result": right | said}])


def test_a_right_answer_is_taken(answering: Answer, tmp_path: Path) -> None:
    answering.body = status_answer()
    assert Client(tmp_path).poll(["0" * 16])["0" * 16].download.bitfield == "8"


@pytest.mark.parametrize(
    "said",
    [
        {"bitfield": "0z"}, {"bitfield": "8" * 4000 + "-"}, {"bitfield": ["8"]}, {"status": []}, {"status": "elsewhere"}, {"gid": {}},
        {"totalLength": "-1"}, {"downloadSpeed": []}, {"errorCode": {}}, {"uploadLength": "1e9"}, {"uploadLength": "-1"},
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_lost(answering: Answer, tmp_path: Path, said: dict[str, object]) -> None:
    answering.body = status_answer(**said)
    with pytest.raises(SwarmLost):
        Client(tmp_path).poll(["0" * 16])


@pytest.mark.parametrize(
    "peers", [None, 3, {}, [3], [{}], [{"ip": "1.2.3.4"}], [{"ip": 1, "seeder": "true"}], [{"ip": "x" * 65, "seeder": "true"}]]
)
def test_peers_of_another_form_are_lost(answering: Answer, tmp_path: Path, peers: object) -> None:
    answering.body = msgspec.json.encode([{"result": peers}])
    with pytest.raises(SwarmLost):
        Client(tmp_path).peers("0" * 16)


def test_a_torrent_that_is_not_known_has_no_peers_and_cannot_be_limited(answering: Answer, tmp_path: Path) -> None:
    answering.body = b'[{"error": {"message": "no such download"}}]'
    assert Client(tmp_path).peers("0" * 16) == []
    Client(tmp_path).limit("0" * 16, 1024)


def test_an_answer_beyond_the_bound_is_lost_although_its_end_would_be_right(answering: Answer, tmp_path: Path) -> None:
    answering.body = b" " * (5 << 20) + status_answer()
    with pytest.raises(SwarmLost):
        Client(tmp_path).poll(["0" * 16])


def test_a_process_that_says_that_pieces_are_of_one_byte_costs_no_time(answering: Answer, tmp_path: Path) -> None:
    answering.body = status_answer(pieceLength="1", bitfield="f")
    download = swarm.Download(msgspec.structs.replace(WANT, size=4 << 40), b"", 0.0)
    download.status = Client(tmp_path).poll(["0" * 16])["0" * 16]
    assert download.whole_pieces == [(index * (16 << 20), (index + 1) * (16 << 20)) for index in range(4)]


def test_a_process_that_answers_byte_by_byte_does_not_hold_the_node_up(
    answering: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_daemon, "CALL_SECONDS", 0.5)
    answering.body, answering.pause = b" " * 200, 0.1
    with pytest.raises(SwarmLost):
        Client(tmp_path).known()
    assert answering.written < 100, "it was cut off long before its end"


@pytest.mark.parametrize("port", [-1, 0, 70_000, 1 << 70])
def test_a_port_that_is_none_is_no_contact(tmp_path: Path, port: int) -> None:
    (tmp_path / "rpc.json").write_bytes(b'{"port": %d, "secret": "s"}' % port)
    with pytest.raises(SwarmLost):
        Client(tmp_path).known()


def test_calls_come_from_the_address_that_the_unit_allows(answering: Answer, tmp_path: Path) -> None:
    answering.body = b'[{"error": {"message": "no such download"}}]'
    assert Client(tmp_path).poll(["0" * 16]) == {}
    assert answering.seen == swarm_daemon.CALLER == "127.6.8.1"


def test_a_contact_that_is_a_link_or_no_contact_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_bytes(msgspec.json.encode(Contact(port=1, secret="s")))
    for make in (
        lambda path: path.symlink_to("other.json"),
        lambda path: path.write_bytes(b'{"port": "x"}'),
        lambda path: None,
    ):
        (tmp_path / "rpc.json").unlink(missing_ok=True)
        make(tmp_path / "rpc.json")
        with pytest.raises(SwarmLost, match="cannot be read"):
            Client(tmp_path).known()


def test_the_secret_is_shown_nowhere() -> None:
    assert "hush" not in repr(Contact(port=1, secret="hush"))


def test_it_asks_the_given_trackers_alone_and_answers_nobody_but_the_node() -> None:
    text = swarm_daemon.configuration(SwarmSettings(folder=Path("/x")), Contact(port=9, secret="s"))
    lines = dict(line.split("=", 1) for line in text.splitlines())
    off = ("enable-dht", "enable-dht6", "enable-peer-exchange", "bt-enable-lpd", "follow-torrent", "rpc-listen-all", "rpc-allow-origin-all")
    assert {lines[key] for key in off} == {"false"}
    assert lines["check-certificate"] == "true"
    alone = swarm_daemon.configuration(SwarmSettings(folder=Path("/x")), None)
    assert "rpc" not in alone


# -- how long a blob is seeded


@pytest.mark.parametrize(
    ("state", "due"),
    [
        (Seeding(since=NOW), True),
        (Seeding(since=NOW - timedelta(seconds=99)), True),
        (Seeding(since=NOW - timedelta(seconds=100)), False),
        (Seeding(since=NOW, uploaded=1000, session=999), True),
        (Seeding(since=NOW, uploaded=1000, session=1000), False),
        (Seeding(since=NOW, over=True), False),
    ],
)
def test_a_blob_is_seeded_for_its_time_and_its_ratio_over_all_starts(state: Seeding, *, due: bool) -> None:
    chosen = SwarmSettings(folder=Path("/x"), seed_seconds=100, seed_ratio=2.0)
    assert seeding.is_due(chosen, state, 1000, NOW) == due


def test_without_a_ratio_time_alone_counts() -> None:
    chosen = SwarmSettings(folder=Path("/x"), seed_seconds=100, seed_ratio=0)
    assert seeding.is_due(chosen, Seeding(since=NOW, uploaded=10**9), 1000, NOW)


def test_a_new_start_of_aria2_counts_on() -> None:
    def said(uploaded: int, state: str = "active") -> PeerStatus:
        return PeerStatus(download=Status(gid="x", state=state, total=9, done=9, speed=0, prefix=9), uploaded=uploaded)

    state = seeding.counted(Seeding(since=NOW), said(700))
    assert (state.uploaded, state.session) == (0, 700)
    state = seeding.counted(state, None)
    assert (state.uploaded, state.session) == (700, 0)
    state = seeding.counted(state, said(50, "complete"))
    assert (state.uploaded, state.session, state.over) == (700, 50, True)


# -- settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('ports = "80"', "[swarm] ports"), ('ports = "7000-6000"', "[swarm] ports"), ('ports = "6881,7000"', "[swarm] ports"),
        ('ports = "6881-70000"', "[swarm] ports"), ('folder = "store/swarm"', "[swarm] folder"), ("seed_ratio = -1", "swarm.seed_ratio"),
        ('slow_after = "0s"', "[swarm] slow_after"), ('upload_limit = "fast"', "[swarm] upload_limit"), ("enabeld = true", "swarm.enabeld"),
    ],
)  # fmt: skip
def test_settings_that_could_not_be_meant_are_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings_file.decode(f"[swarm]\n{text}\n".encode(), Path("/etc/node"))
    assert said in refused.value.message


def test_peers_are_not_asked_unless_the_settings_say_so() -> None:
    assert not from_settings(settings_file.decode(b"", Path("/etc/node"))).swarm.enabled
