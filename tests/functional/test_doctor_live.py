"""What ``doctor`` tries: the snapshot, the next root and the sources as a sync asks them, the hooks' programs, and who holds the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from reconciler.store import writer_lock
from tests import hostile_server as bad
from tests.hostile_server import Exchange, HostileServer, honest
from tests.node import Node, tiny

PATH = "/snapshot.json"


@pytest.fixture
def network() -> Iterator[HostileServer]:
    with HostileServer() as made:
        yield made


def findings(node: Node, *words: str) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in node.run("doctor", "--json", *words).json["findings"]}


def point_at(node: Node, network: HostileServer, extra: str = "") -> None:
    roots = network.url("/{version}.root.json")
    network.on(PATH, honest((node.folder / "published.json").read_bytes()))
    text = f'[network]\nsnapshot = "{network.url(PATH)}"\nroot_updates = "{roots}"\n\n[store]\nreserve = "1MiB"\n{extra}'
    (node.folder / "reconcile.toml").write_text(text)


def test_the_published_snapshot_is_fetched_and_verified(used: Node, network: HostileServer) -> None:
    point_at(used, network)
    assert "version 1, validly signed" in findings(used)["published snapshot"]["text"]
    network.on(PATH, honest(b'{"payloadType": "x", "payload": "e30=", "signatures": []}'))
    found = findings(used)["published snapshot"]
    assert (found["level"], "bad-" in found["text"]) == ("error", True)
    network.on(PATH, bad.login_page)
    assert "a web page" in findings(used)["published snapshot"]["text"]
    assert findings(used, "--offline")["published snapshot"]["text"] == "not checked (--offline)"


@pytest.mark.parametrize(
    ("off", "level", "said"), [(0, "ok", "agrees"), (3690, "error", "1h 1m behind"), (-3690, "error", "1h 1m ahead of")]
)
def test_the_clock_is_compared_with_the_servers(used: Node, network: HostileServer, off: int, level: str, said: str) -> None:
    point_at(used, network)
    envelope = (used.folder / "published.json").read_bytes()

    def dated(it: Exchange) -> None:
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=off), usegmt=True)
        it.head(200, ("Content-Length", len(envelope)), ("Date", at))
        it.body(envelope)

    network.on(PATH, dated)
    found = findings(used)["clock of the server"]
    assert (found["level"], said in found["text"]) == (level, True), found


def test_the_next_root_is_looked_for(used: Node, network: HostileServer) -> None:
    point_at(used, network)
    network.on("/2.root.json", bad.status(404))
    assert "none beside root 1" in findings(used)["newer root"]["text"]
    network.on("/2.root.json", honest(used.network.rotate()))
    assert "root 2 is there: the next sync applies it" in findings(used)["newer root"]["text"]
    network.on("/2.root.json", honest(used.network.root(signers=())))
    assert findings(used)["newer root"]["level"] == "error"
    used.configure("")
    assert findings(used)["newer root"]["level"] == "warning"


def test_each_source_is_asked_for_a_byte(node: Node, network: HostileServer) -> None:
    data = tiny("a")
    address = network.on("/a.gguf", honest(data))
    node.publish(node.item("a:v1", data, urls=[address]))
    name = f"source 127.0.0.1:{network.port}"
    assert findings(node)[name]["level"] == "ok"
    assert len(network.asked("/a.gguf")) == 1
    network.on("/a.gguf", bad.status(403))
    found = findings(node)[name]
    assert (found["level"], "403" in found["text"], bool(found["hint"])) == ("warning", True, True)
    assert name not in findings(node, "--offline")


def test_a_hooks_program_that_is_missing_is_named(used: Node) -> None:
    used.configure('\n[hooks]\nhealthy = ["./gone.sh"]\nactivated = ["true"]\n')
    found = findings(used)
    assert found["hook healthy"]["level"] == "error"
    assert found["hook activated"]["level"] == "ok"


def test_who_holds_the_store_is_said(used: Node) -> None:
    assert findings(used)["store lock"]["text"] == "nobody holds the store"
    with writer_lock.hold(used.context().layout.lock_file):
        assert f"held by process {os.getpid()}" in findings(used)["store lock"]["text"]


def test_doctor_ends_with_one_sentence_about_the_whole(used: Node) -> None:
    used.configure('\n[hooks]\nhealthy = ["./gone.sh"]\n')
    ran = used.run("doctor")
    assert ran.code == 1
    assert ran.out.splitlines()[-1].startswith("This node needs attention: 1 error (hook healthy)")
    assert used.run("doctor", "--json").json["verdict"] == ran.out.splitlines()[-1]
