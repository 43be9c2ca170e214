"""A node among many asks seldom and takes little: compressed documents, roots once an hour, hosts that do not answer, turns."""

from __future__ import annotations

import contextlib
import email.utils
import functools
import gzip
import hashlib
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard

from reconciler.commands import lock, node_trust
from reconciler.core import rollout
from reconciler.core.errors import FetchError, TooLarge
from reconciler.demo.server import Server
from reconciler.fetch import http
from tests.network import keys
from tests.node import Node, later, tiny


class Origin:
    """A server whose answers the test chooses by path: status, headers and body."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        #: The client's port of each request: one a connection.
        self.clients: list[int] = []
        self.closes_silently = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                outer.clients.append(self.client_address[1])
                status, headers, body = outer.answers.get(self.path, (404, {}, b""))
                self.close_connection = outer.closes_silently
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def origin() -> Iterator[Origin]:
    made = Origin()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def get(url: str, most: int = 1 << 20) -> bytes | None:
    return http.get(url, max_bytes=most, timeout_seconds=10.0).data


# -- compressed documents ----------------------------------------------------------------------------------------

DOCUMENT = b'{"payloadType":"x","payload":"' + b"A" * 100_000 + b'"}'


def packed(data: bytes) -> bytes:
    """Return the same bytes at each call: names of tests come from them."""
    return gzip.compress(data, mtime=0)


def squeezed(data: bytes, *, told: bool = True) -> bytes:
    """Return *data* as one frame of zstd; *told*: with the size of its content."""
    return zstandard.ZstdCompressor(write_content_size=told).compress(data)


@pytest.mark.parametrize(
    ("coding", "body"), [("gzip", packed(DOCUMENT)), ("zstd", squeezed(DOCUMENT)), ("zstd", squeezed(DOCUMENT, told=False))]
)
def test_a_document_is_taken_compressed_and_is_the_same(origin: Origin, coding: str, body: bytes) -> None:
    origin.answers["/s"] = (200, {"Content-Encoding": coding}, body)
    assert get(f"{origin.url}/s") == DOCUMENT
    assert origin.asked[0][1]["accept-encoding"] == "gzip, zstd"


def bomb() -> bytes:
    return b"{" + b" " * (64 << 20)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", packed), ("zstd", squeezed), ("zstd", functools.partial(squeezed, told=False))])
def test_a_small_body_that_becomes_a_large_one_is_cut_off_at_the_cap(origin: Origin, coding: str, pack: Callable[[bytes], bytes]) -> None:
    small = pack(bomb())
    assert len(small) < 100_000
    origin.answers["/s"] = (200, {"Content-Encoding": coding}, small)
    tracemalloc.start()
    try:
        with pytest.raises((FetchError, TooLarge), match="1,048,576 bytes"):
            get(f"{origin.url}/s")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_with_a_window_that_no_reader_of_http_needs_is_refused(origin: Origin) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    origin.answers["/s"] = (200, {"Content-Encoding": "zstd"}, stream.compress(DOCUMENT) + stream.flush())
    with pytest.raises(FetchError):
        get(f"{origin.url}/s")


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", packed(DOCUMENT)[:-9]), ("gzip", packed(DOCUMENT) + b"more"), ("gzip", DOCUMENT), ("gzip", b""),
        ("gzip", packed(DOCUMENT) * 2), ("br", DOCUMENT), ("gzip, gzip", packed(packed(DOCUMENT))),
        ("deflate", DOCUMENT), ("zstd", squeezed(DOCUMENT)[:-9]), ("zstd", squeezed(DOCUMENT) + b"more"), ("zstd", DOCUMENT), ("zstd", b""),
        ("zstd", squeezed(DOCUMENT) * 2), ("zstd", packed(DOCUMENT)), ("gzip", squeezed(DOCUMENT)),
    ],
)  # fmt: skip
def test_a_body_that_is_not_whole_is_no_document(origin: Origin, coding: str, body: bytes) -> None:
    origin.answers["/s"] = (200, {"Content-Encoding": coding}, body)
    with pytest.raises(FetchError):
        get(f"{origin.url}/s")


# -- roots once an hour --------------------------------------------------------------------------------------------


@pytest.fixture
def polled(node: Node, origin: Origin) -> Node:
    """A node that takes its snapshot and its roots from *origin*."""
    text = f'[network]\nsnapshot = "{origin.url}/s"\nroot_updates = "{origin.url}/{{version}}.root"\n\n[store]\nreserve = "1MiB"\n'
    (node.folder / "reconcile.toml").write_text(text)
    publish(node, origin)
    return node


def publish(node: Node, origin: Origin) -> None:
    node.network.now += timedelta(seconds=5)
    body = node.network.snapshot(node.item("a:v1", tiny("a")))
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    origin.answers["/s"] = (200, {"ETag": etag}, body)


def test_newer_roots_are_asked_for_once_an_hour(polled: Node, origin: Origin) -> None:
    for _ in range(3):
        assert polled.run("sync").code == 0
    assert origin.paths().count("/2.root") == 1
    with later(minutes=61) as clock:
        lock.update_lock(polled.context(clock), roots_every_seconds=node_trust.ROOTS_EVERY_SECONDS)
    assert origin.paths().count("/2.root") == 2


def test_a_person_who_asks_for_the_lock_gets_newer_roots_at_once(polled: Node, origin: Origin) -> None:
    for _ in range(2):
        assert polled.run("lock").code == 0
    assert origin.paths().count("/2.root") == 2


def test_a_snapshot_that_the_known_root_does_not_explain_is_a_reason_to_ask(polled: Node, origin: Origin) -> None:
    assert polled.run("sync").code == 0
    origin.answers["/2.root"] = (200, {}, polled.network.rotate(snapshot_keys=keys("new", 1)))
    publish(polled, origin)
    assert polled.run("sync").code == 0
    assert polled.run("status", "--json").json["snapshot"]["version"] == 2


def test_a_snapshot_that_nobody_signed_is_refused_as_before(polled: Node, origin: Origin) -> None:
    assert polled.run("sync").code == 0
    origin.answers["/s"] = (200, {}, polled.network.snapshot(signers=keys("thief", 1)))
    assert polled.run("sync").code == 4
    assert polled.active() == ["a:v1"]


# -- one connection ------------------------------------------------------------------------------------------------


def test_a_sync_that_finds_nothing_new_is_one_request_that_names_what_is_here(polled: Node, origin: Origin) -> None:
    assert polled.run("sync").code == 0
    _, headers, body = origin.answers["/s"]
    origin.answers["/s"] = (304, headers, b"")
    assert hashlib.sha256(body).hexdigest() in headers["ETag"]
    before = len(origin.asked)
    assert polled.run("sync").code == 0
    ((path, sent),) = origin.asked[before:]
    assert (path, sent["if-none-match"]) == ("/s", headers["ETag"])


def test_roots_and_the_snapshot_come_over_one_connection(polled: Node, origin: Origin) -> None:
    origin.answers["/2.root"] = (200, {}, polled.network.rotate(snapshot_keys=keys("new", 1)))
    origin.answers["/3.root"] = (404, {}, b"<html>there is no such page</html>")
    publish(polled, origin)
    assert polled.run("sync").code == 0
    assert (origin.paths(), len(set(origin.clients))) == (["/2.root", "/3.root", "/s"], 1)


def test_a_connection_that_the_server_closed_is_made_again(polled: Node, origin: Origin) -> None:
    origin.closes_silently = True
    assert polled.run("sync").code == 0
    assert (origin.paths(), len(set(origin.clients))) == (["/2.root", "/s"], 2)


def test_a_connection_with_a_body_that_never_came_is_not_used_again(polled: Node, origin: Origin) -> None:
    elsewhere = f"{origin.url}/t"
    origin.answers["/t"] = origin.answers["/s"]
    origin.answers["/s"] = (302, {"Location": elsewhere, "Content-Length": "1000"}, b"")
    assert polled.run("lock").code == 0
    assert origin.clients[-1] != origin.clients[-2], "the answer to the next request would be taken for its body"


# -- a snapshot whose server asks to be left alone --------------------------------------------------------------------


def refuse(origin: Origin, status: int, retry_after: str) -> None:
    origin.answers["/s"] = (status, {"Retry-After": retry_after}, b"")


def asks(node: Node, origin: Origin, **later_by: float) -> bool:
    """Return whether a sync, at that time, asks *origin* for anything."""
    before = len(origin.asked)
    with later(**later_by) as clock, contextlib.suppress(FetchError):
        lock.update_lock(node.context(clock), roots_every_seconds=node_trust.ROOTS_EVERY_SECONDS, patient=True)
    return len(origin.asked) > before


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_be_left_alone_is_left_alone_by_new_processes_too(polled: Node, origin: Origin, status: int) -> None:
    assert polled.run("sync").code == 0
    refuse(origin, status, "600")
    assert "answered" in polled.run("sync").out
    before = len(origin.asked)
    ran = polled.run("sync")
    assert (ran.code, len(origin.asked)) == (0, before)
    assert "asked to be left alone (Retry-After), for another" in ran.out
    assert "`reconcile lock` asks it all the same" in ran.out
    assert polled.active() == ["a:v1"]
    assert not asks(polled, origin, minutes=9)
    assert asks(polled, origin, minutes=11)


def test_a_date_in_retry_after_counts_as_seconds_do(polled: Node, origin: Origin) -> None:
    refuse(origin, 503, email.utils.format_datetime(datetime.now(UTC) + timedelta(minutes=20), usegmt=True))
    assert polled.run("sync").code == 1
    assert not asks(polled, origin, minutes=15)
    assert asks(polled, origin, minutes=21)


def test_a_server_that_asks_for_a_day_is_left_alone_for_an_hour(polled: Node, origin: Origin) -> None:
    refuse(origin, 503, "86400")
    assert polled.run("sync").code == 1
    assert not asks(polled, origin, minutes=58)
    assert asks(polled, origin, minutes=61)


def test_a_clock_that_was_wrong_keeps_no_node_away(polled: Node, origin: Origin) -> None:
    refuse(origin, 503, "3000")
    with later(days=400) as clock, contextlib.suppress(FetchError):
        lock.update_lock(polled.context(clock), patient=True)
    assert asks(polled, origin)


def test_a_person_asks_at_once_and_a_snapshot_ends_it(polled: Node, origin: Origin) -> None:
    answer = origin.answers["/s"]
    refuse(origin, 503, "600")
    assert polled.run("sync").code == 1
    origin.answers["/s"] = answer
    assert polled.run("lock").code == 0
    assert asks(polled, origin)


def test_another_address_is_asked(polled: Node, origin: Origin) -> None:
    origin.answers["/t"] = origin.answers["/s"]
    refuse(origin, 503, "600")
    assert polled.run("sync").code == 1
    settings = polled.folder / "reconcile.toml"
    settings.write_text(settings.read_text().replace(f"{origin.url}/s", f"{origin.url}/t"))
    assert polled.run("sync").code == 0


# -- hosts that do not answer ----------------------------------------------------------------------------------------


def test_a_host_that_asks_to_be_left_alone_is_not_asked_by_the_next_sync_and_a_person_may(node: Node, origin: Origin) -> None:
    origin.answers["/a"] = (503, {"Retry-After": "600"}, b"")
    node.publish(node.item("a:v1", tiny("a"), urls=[f"{origin.url}/a"]))
    assert node.run("sync").code == 3
    asked = len(origin.asked)
    assert node.run("sync").code == 3
    assert len(origin.asked) == asked
    (model,) = node.run("status", "--json").json["models"]
    assert (model["state"], model["attempts"]) == ("absent", 0)
    assert model["reason"].startswith("source-failed")
    assert "failed" not in node.kinds()
    origin.answers["/a"] = (200, {}, tiny("a"))
    assert node.run("apply", "--yes").code == 0
    assert node.active() == ["a:v1"]


def test_another_source_is_asked_at_once(node: Node, origin: Origin) -> None:
    origin.answers["/a"] = (503, {"Retry-After": "600"}, b"")
    node.publish(node.item("a:v1", tiny("a"), urls=[f"{origin.url}/a"]))
    assert node.run("sync").code == 3
    good = f"{node.server.address}/sha256/{hashlib.sha256(tiny('a')).hexdigest()}"
    node.publish(node.item("a:v1", tiny("a"), urls=[f"{origin.url}/a", good]))
    assert node.run("sync").code == 0


# -- turns -----------------------------------------------------------------------------------------------------------


def test_nodes_begin_evenly_spread_and_each_at_its_own_moment() -> None:
    found = [rollout.start_delay(f"node-{index}", 300.0) for index in range(10_000)]
    assert all(0 <= one < 300 for one in found)
    tenths = [sum(low <= one < low + 30 for one in found) for low in range(0, 300, 30)]
    assert all(abs(count - 1000) < 3 * 30 for count in tenths)  # three standard deviations of a uniform draw
    assert rollout.start_delay("node-7", 300.0) == found[7]
    assert rollout.start_delay("", 300.0) == 0


def test_a_sync_with_a_splay_waits_for_its_moment(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path / "node", server, '\n[node]\nid = "n1"\n')
    node.publish(node.item("a:v1", tiny("a")))
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert node.run("sync", "--splay", "5m").code == 0
    assert rollout.start_delay("n1", 300.0) in waited
    assert timedelta(seconds=waited[0]) < timedelta(minutes=5)
