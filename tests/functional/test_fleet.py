"""A node reports its status, and the operator reads it: from the first sync to the verdict."""

from __future__ import annotations

import base64
import getpass
import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.fleet import statement
from reconciler.publish import keys
from tests.network import Document, payload_of
from tests.node import Node, run, tiny

REPORT = '\n[node]\nid = "n1"\ncohorts = ["canary"]\n\n[report]\nto = "{to}"\nkey = "node.key"\n'


def reporting(folder: Path, server: Server, to: str) -> Node:
    node = Node(folder, server, REPORT.format(to=to))
    pair = keys.generate()
    (node.folder / "node.key").write_bytes(pair.private_pem)
    (node.folder / "node.key").chmod(0o600)
    (folder.parent / "keys").mkdir(exist_ok=True)
    (folder.parent / "keys" / "n1.pub").write_text(pair.public_pem)
    return node


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    (tmp_path / "statuses").mkdir()
    return tmp_path / "statuses"


@pytest.fixture
def node(tmp_path: Path, server: Server, reports: Path) -> Node:
    return reporting(tmp_path / "node", server, str(reports))


def said(reports: Path) -> Document:
    return payload_of((reports / "n1.json").read_bytes())


def fleet(reports: Path, *arguments: str) -> tuple[int, Document]:
    ran = run("fleet", "report", str(reports), "--keys", str(reports.parent / "keys"), "--json", *arguments)
    return ran.code, ran.json


class Collector:
    """A receiver of statuses that answers as it is told."""

    def __init__(self) -> None:
        self.status, self.headers, self.delay = 204, {}, 0.0  # type: tuple[int, dict[str, str], float]
        self.bodies: list[bytes] = []
        self.asked = 0
        #: The client's port of each request: one a connection.
        self.clients: list[int] = []
        self.closes_silently = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.asked += 1
                outer.clients.append(self.client_address[1])
                self.close_connection = outer.closes_silently
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(outer.delay)
                if outer.status < 300:
                    outer.bodies.append(body)
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/statuses"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_from_a_sync_to_the_verdict(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    code, found = fleet(reports, "--min-nodes", "1")
    assert (code, found["nodes"], found["verdict"]["word"]) == (0, 1, "safe")
    assert [(one["id"], one["serving"]) for one in found["models"]] == [("a:v1", 1)]
    status = node.run("status", "--json").json
    sent = said(reports)
    assert {key: sent[key] for key in ("lock", "generation", "active_digest", "network")} == {
        key: status[key] for key in ("lock", "generation", "active_digest", "network")
    }
    assert (sent["node"], sent["cohorts"]) == ("n1", ["canary"])


def test_a_model_that_fails_is_reported_with_why(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("bad:v1", b"no model at all"))
    assert node.run("sync").code == 3
    code, found = fleet(reports, "--max-failed", "1%")
    assert (code, found["verdict"]["word"]) == (2, "unsafe")
    bad = next(one for one in found["models"] if one["id"] == "bad:v1")
    assert (bad["failed"], bad["causes"][0]["nodes"]) == (1, ["n1"])
    assert bad["causes"][0]["text"].startswith("smoke-failed: ")


def test_a_sync_that_changes_nothing_says_nothing(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.run("sync")
    before = (reports / "n1.json").read_bytes()
    assert node.run("sync").code == 0
    assert (reports / "n1.json").read_bytes() == before


def test_a_refused_network_is_reported(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.run("sync")
    (node.folder / "published.json").write_bytes(node.network.snapshot(signers=[]))
    assert node.run("sync").code == 4
    assert said(reports)["refused"] == "bad-signature"


def test_a_rollback_is_reported(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.run("sync")
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    node.run("sync")
    assert node.run("rollback").code == 0
    sent = said(reports)
    assert sent["held"]
    assert {one["id"]: one["reason"] for one in sent["models"]}["b:v1"] == "held"


def test_nothing_of_the_node_itself_is_in_a_status(node: Node, reports: Path) -> None:
    urls = [f"{node.server.address.replace('127.0.0.1', 'localhost')}/nothing?token=hidden"]
    node.publish(node.item("a:v1", tiny("a")), node.item("bad:v1", b"no model at all"), node.item("gone:v1", b"nowhere", urls=urls))
    node.run("sync")
    payload = base64.b64decode(json.loads((reports / "n1.json").read_bytes())["payload"]).decode()
    for secret in (str(node.folder), str(Path.home()), socket.gethostname(), "hidden", "PRIVATE", *({getpass.getuser()} - {"root"})):
        assert secret not in payload
    assert "[…]" in payload


def test_a_key_that_others_can_read_signs_nothing(node: Node, reports: Path) -> None:
    (node.folder / "node.key").chmod(0o640)
    node.publish(node.item("a:v1", tiny("a")))
    ran = node.run("sync")
    assert ran.code == 0
    assert "chmod 600" in ran.out + ran.err or "other users can read" in ran.out + ran.err
    assert not list(reports.iterdir())


def test_a_missing_folder_is_not_made_and_the_status_is_sent_later(node: Node, reports: Path) -> None:
    reports.rmdir()
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    assert not reports.exists()
    reports.mkdir()
    (node.store / "outbox" / "state.json").unlink()  # the wait is over
    assert node.run("sync").code == 0
    assert fleet(reports)[1]["nodes"] == 1


def test_statuses_are_posted_in_order(tmp_path: Path, server: Server, collector: Collector) -> None:
    node = reporting(tmp_path / "node", server, collector.url)
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("sync").code == 0
    key = keys.load_public((tmp_path / "keys" / "n1.pub").read_bytes()).key
    found = [statement.verify(body, {"n1": key}) for body in collector.bodies]
    assert [len(one.models) for one in found] == [1, 2]
    assert found[0].sequence < found[1].sequence


@pytest.mark.parametrize("closes", [False, True])
def test_waiting_statuses_go_over_one_connection_if_the_receiver_keeps_it(
    tmp_path: Path, server: Server, collector: Collector, closes: bool
) -> None:
    node = reporting(tmp_path / "node", server, collector.url)
    collector.status = 503
    for name in "abc":
        node.publish(node.item(f"{name}:v1", tiny(name)))
        node.run("sync")
    (node.store / "outbox" / "state.json").unlink()  # the wait after a failure
    collector.status, collector.closes_silently = 204, closes
    collector.clients.clear()
    node.run("sync")
    assert [payload_of(body)["snapshot"]["version"] for body in collector.bodies][:3] == [1, 2, 3]
    assert len(collector.bodies) == len(collector.clients)
    assert len(set(collector.clients)) == (len(collector.clients) if closes else 1)


def test_a_collector_that_never_answers_costs_a_sync_seconds_and_the_next_nothing(
    tmp_path: Path, server: Server, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reconciler.commands import reporting as commands

    monkeypatch.setattr(commands, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(commands.report_status, "__kwdefaults__", {"offline": False, "wait_seconds": 0.3})
    collector.delay = 2.0
    node = reporting(tmp_path / "node", server, collector.url)
    node.publish(node.item("a:v1", tiny("a")))
    ran = node.run("sync")
    assert ran.code == 0
    assert node.active() == ["a:v1"]
    for thread in threading.enumerate():
        if thread.name == "report":
            thread.join()
    assert json.loads((node.store / "outbox" / "state.json").read_bytes())["failures"] == 1
    assert len(list((node.store / "outbox").glob("*.status.json"))) == 1


def test_what_the_receiver_will_never_take_does_not_block_the_rest(tmp_path: Path, server: Server, collector: Collector) -> None:
    node = reporting(tmp_path / "node", server, collector.url)
    collector.status = 422
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    assert not list((node.store / "outbox").glob("*.status.json"))


def test_a_redirect_is_not_followed_and_an_asked_wait_is_obeyed(tmp_path: Path, server: Server, collector: Collector) -> None:
    node = reporting(tmp_path / "node", server, collector.url)
    collector.status, collector.headers = 307, {"Location": collector.url}
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    assert collector.asked == 1
    (node.store / "outbox" / "state.json").unlink()
    collector.status, collector.headers = 503, {"Retry-After": "1800"}
    node.run("sync")
    asked = collector.asked
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    node.run("sync")
    assert collector.asked == asked
    assert len(list((node.store / "outbox").glob("*.status.json"))) > 1


def test_offline_nothing_is_posted(tmp_path: Path, server: Server, collector: Collector) -> None:
    node = reporting(tmp_path / "node", server, collector.url)
    node.publish(node.item("a:v1", tiny("a"), serve=False))
    node.run("sync", "--offline")
    assert collector.asked == 0
    assert len(list((node.store / "outbox").glob("*.status.json"))) == 1


def test_init_makes_a_key_that_only_its_owner_reads_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init").code == 0
    before = (tmp_path / "node.key").read_bytes()
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert keys.public_pem(keys.load_private(before, bytes)) == (tmp_path / "node.pub").read_text()
    assert "/node.key" in (tmp_path / ".gitignore").read_text().splitlines()
    assert run("init", "--force").code == 0
    assert (tmp_path / "node.key").read_bytes() == before


def test_enroll_then_report(node: Node, reports: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    node.run("sync")
    other = reports.parent / "others"
    arguments = [str(reports), "--keys", str(other)]
    assert run("fleet", "report", *arguments).code == 1
    assert run("fleet", "enroll", *arguments, "somebody").code == 0
    assert "1 node enrolled" in run("fleet", "enroll", *arguments, "--all").out
    html = reports.parent / "report.html"
    ran = run("fleet", "report", *arguments, "--html", str(html))
    assert (ran.code, "a:v1: 1 serving" in ran.out) == (0, True)
    assert "a:v1" in html.read_text()
