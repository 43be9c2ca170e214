"""Servers that follow the active set, on a whole node: told once for each change, told again until they have it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from reconciler.commands import status
from reconciler.report import metrics
from reconciler.store import generations
from reconciler.store.ledger import Ledger
from tests.network import Document
from tests.node import Node, later, tiny


class Listener(HTTPServer):
    """A router that is told of sets: it remembers each body, and refuses while ``refuses``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Told)
        self.told: list[Document] = []
        self.asked = 0
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models"


class _Told(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        if not self.server.refuses:
            self.server.told.append(json.loads(body))
        self.send_response(503 if self.server.refuses else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        del format, args


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def table(listener: Listener, **changes: Any) -> str:
    keys = {"kind": "http", "name": "router", "reload": listener.address} | changes
    return "[[serve]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())


@pytest.fixture
def told(node: Node, listener: Listener) -> Node:
    """A node whose router is told of sets, with one model."""
    node.configure(table(listener))
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    return node


def ids(index: Document) -> list[str]:
    return [model["id"] for model in index["models"]]


# -- when a server is told


def test_a_server_is_told_of_each_set_once(told: Node, listener: Listener) -> None:
    assert [ids(index) for index in listener.told] == [["a:v1"]]
    assert told.run("apply").code == 0
    assert told.run("sync").code == 0
    assert len(listener.told) == 1

    told.publish(told.item("a:v1", tiny("a")), told.item("b:v1", tiny("b")), told.item("c:v1", tiny("c")))
    assert told.run("apply").code == 0
    assert [ids(index) for index in listener.told] == [["a:v1"], ["a:v1", "b:v1", "c:v1"]], "once a run, after its last swap"
    assert listener.told[-1] == told.index()


def test_a_server_that_is_down_for_three_cycles_follows_without_a_person(told: Node, listener: Listener) -> None:
    listener.refuses = True
    before = told.index()["generation"]
    told.publish(told.item("a:v1", tiny("a")), told.item("b:v1", tiny("b")))
    for _ in range(3):
        assert told.run("sync").code == 0
        (server,) = told.run("status", "--json").json["serve"]
        assert (server["name"], server["kind"], server["generation"]) == ("router", "http", before)
        assert "503" in server["error"]
    active = told.index()["generation"]
    assert told.kinds().count("serve-failed") == 1
    assert told.run("incidents", "--json").json[-1]["times"] == 1
    text = metrics.render(status.node_metrics(told.context()), told.context().clock()).decode()
    assert f'reconcile_serve_generation{{server="router"}} {before}.0' in text
    assert f"reconcile_generation {active}.0" in text
    assert "server router has generation" in told.run("status").out
    assert "503" in told.run("doctor", "--offline").out

    listener.refuses = False
    assert told.run("sync").code == 0
    (server,) = told.run("status", "--json").json["serve"]
    assert (server["generation"], server["error"]) == (active, "")
    assert ids(listener.told[-1]) == ["a:v1", "b:v1"]
    listener.refuses = True
    told.publish(told.item("a:v1", tiny("a")))
    assert told.run("sync").code == 0
    assert [one["times"] for one in told.run("incidents", "--json").json if one["kind"] == "serve-failed"] == [2]


def test_a_server_that_refuses_holds_up_no_other(node: Node, listener: Listener, tmp_path: Path) -> None:
    script = f"import sys, pathlib; pathlib.Path({str(tmp_path / 'told')!r}).write_bytes(sys.stdin.buffer.read())"
    command = table(listener, kind="command", name="second", reload=[sys.executable, "-c", script])
    node.configure(table(listener, reload="http://127.0.0.1:1/nobody") + command)
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0

    first, second = node.run("serve list", "--json").json["servers"]
    assert (first["generation"], second["generation"]) == (0, node.index()["generation"])
    assert "cannot be reached" in first["error"]
    assert json.loads((tmp_path / "told").read_bytes()) == node.index()


def test_a_router_sees_between_the_swap_and_the_reload_who_lags(node: Node, listener: Listener) -> None:
    script = "import pathlib, sys; sys.exit(pathlib.Path('store/serving.json').read_text())"
    node.configure(table(listener, kind="command", name="late", reload=[sys.executable, "-c", script]))
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0

    (late,) = node.run("serve list", "--json").json["servers"]
    seen = json.loads(late["error"].partition("exited with 1: ")[2])
    assert (seen["schema"], seen["generation"], seen["servers"][0]["generation"]) == (1, node.index()["generation"], 0)
    written = json.loads((node.store / "serving.json").read_bytes())
    assert set(written["servers"][0]) == {"name", "kind", "generation", "at", "error"}


def test_each_server_gets_the_models_that_it_asks_for(node: Node, listener: Listener) -> None:
    node.configure(table(listener, models=["task:embedding", "b"]))
    embedding: Document = {"tasks": ["embedding"], "smoke": {"task": "embedding", "prompt": "Hello"}}
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")), node.item("e:v1", tiny("e", "embedding"), **embedding))
    assert node.run("apply").code == 0

    assert ids(listener.told[-1]) == ["b:v1", "e:v1"]
    assert node.run("serve list", "--json").json["servers"][0]["models"] == ["b:v1", "e:v1"]


def test_a_server_that_lags_keeps_its_trees_on_the_disk(told: Node, listener: Listener) -> None:
    (old,) = told.index()["models"]
    tree = told.store / old["resolved"]
    listener.refuses = True
    told.publish(told.item("b:v1", tiny("b")))
    assert told.run("apply").code == 0
    with later(days=30):
        assert told.run("gc").code == 0
        assert (tree / "a.gguf").read_bytes() == tiny("a")
        listener.refuses = False
        assert told.run("serve reload").code == 0
        assert told.run("gc").code == 0
    assert not tree.exists()


# -- by hand


def test_reload_by_hand_tells_a_server_that_has_the_set_already(told: Node, listener: Listener) -> None:
    assert told.run("serve reload", "router").code == 0
    assert len(listener.told) == 2
    listener.refuses = True
    ran = told.run("serve reload", "--json")
    assert (ran.code, ran.json["servers"][0]["generation"]) == (1, told.index()["generation"])
    unknown = told.run("serve reload", "nobody")
    assert (unknown.code, "there are: router" in unknown.err) == (64, True)


def test_a_file_is_written_before_its_server_starts_and_the_next_run_tells_it(node: Node, listener: Listener) -> None:
    node.configure(table(listener, kind="llama-swap", name="swap", path="serve/swap.yaml"))
    assert node.run("serve write").code == 0
    assert '"models": {}' in (node.folder / "serve" / "swap.yaml").read_text()
    assert listener.asked == 0
    node.publish(node.item("a:v1", tiny("a")))
    listener.refuses = True
    assert node.run("apply").code == 0
    assert str((node.store / node.index()["models"][0]["resolved"]).resolve()) in (node.folder / "serve" / "swap.yaml").read_text()
    assert "/active/" not in (node.folder / "serve" / "swap.yaml").read_text()


# -- the index


def test_the_index_says_all_that_a_router_asks(told: Node) -> None:
    index = told.index()
    (model,) = index["models"]
    state = told.run("status", "--json").json

    assert index["network"] == told.network.name
    assert index["snapshot"] == {"version": 1, "digest": state["snapshot"]["digest"], "expires_at": state["snapshot"]["expires_at"]}
    assert (index["lock"], index["active_digest"]) == (state["lock"], state["active_digest"])
    assert index["swapped_at"] is not None
    assert (model["name"], model["version"], model["current"]) == ("a", "v1", True)
    assert (told.store / model["resolved"] / model["entrypoint"]).samefile(told.store / "active" / model["path"] / model["entrypoint"])
    (file,) = model["files"]
    assert (file["path"], file["role"], file["size"], file["tested"]) == ("a.gguf", "model", len(tiny("a")), True)
    assert (told.store / "blobs" / "sha256" / file["digest"][7:9] / file["digest"][7:]).read_bytes() == tiny("a")
    assert (model["architecture"], model["context_length"], model["embedding_length"], model["quantization"]) == ("llama", 256, 32, "F16")
    assert model["parameters"] > 10_000
    assert model["chat_template"] is False
    assert model["needs"] == {"gpu_memory": 0, "memory": 0}
    assert (model["tested"]["device"], model["tested"]["engine"]) == ("cpu", "llama-cpp")


def test_a_new_expiry_reaches_the_index_without_a_swap(told: Node, listener: Listener) -> None:
    before, folder = told.index(), (told.store / "active").resolve()
    made = folder.stat().st_mtime_ns
    told.publish(told.item("a:v1", tiny("a")))
    assert told.run("apply").code == 0
    after = told.index()

    assert (after["generation"], after["swapped_at"]) == (before["generation"], before["swapped_at"])
    assert (before["snapshot"]["version"], after["snapshot"]["version"]) == (1, 2)
    assert folder.stat().st_mtime_ns == made, "the folder says since when the set serves"
    assert listener.told[-1] == after
    assert told.run("status", "--json").json["drift"] == []


def test_an_index_of_an_older_version_is_read_and_completed(told: Node) -> None:
    index = told.store / "active" / "index.json"
    short = {"id", "tasks", "runtime", "path", "entrypoint", "bytes", "tree", "current"}
    old = {"schema": 1, "generation": told.index()["generation"], "models": [{key: told.index()["models"][0][key] for key in short}]}
    whole = told.index()
    index.chmod(0o644)
    index.write_text(json.dumps(old))
    assert told.run("plan", "--detailed-exitcode").code == 0
    assert told.run("apply").code == 0

    assert told.index()["models"] == whole["models"]
    assert told.index()["generation"] == whole["generation"]


def test_a_generation_is_what_its_links_say_and_not_its_description(told: Node) -> None:
    context = told.context()
    entries = generations.current(context.layout).entries
    with Ledger.reading(context.layout.ledger) as ledger:
        assert ledger.fact("serve", dict[str, Any]) is not None
    assert set(entries["a:v1"].__struct_fields__) == {"id", "tasks", "runtime", "path", "entrypoint", "bytes", "tree", "current"}


# -- settings


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('kind = "ollma"', "Invalid enum value 'ollma'"),
        ('kind = "http"\nname = "a b"\nreload = "http://127.0.0.1/"', "its name is not"),
        ('kind = "llama-server"', "needs a path"),
        ('kind = "http"\npath = "x"\nreload = "http://127.0.0.1/"', "so it has no path"),
        ('kind = "http"', "needs the URL"),
        ('kind = "http"\nreload = ["x"]', "is a URL"),
        ('kind = "command"\nreload = "http://127.0.0.1/"', "needs a command"),
        ('kind = "llama-server"\npath = "x"\nreload = "ftp://x/"', "neither a URL"),
        ('kind = "llama-server"\npath = "x"\nreload = "http://user:secret@127.0.0.1/"', "neither a URL"),
        ('kind = "llama-server"\npath = "store/blobs"', "is in the store"),
        ('kind = "llama-server"\npath = "models.lock"', "is also"),
        ('kind = "llama-server"\npath = "x"\nmodels = ["A B"]', "'A B' is no model id"),
        ('kind = "llama-server"\npath = "x"\ndrain = "soon"', "drain: not a number"),
        ('kind = "llama-server"\npath = "x"\noptions = { model = "y" }', "options: 'model' is written by reconcile"),
        ('kind = "llama-server"\npath = "x"\nrelaod = "y"', "unknown key 'serve.relaod'"),
        ('kind = "http"\nreload = "http://a/"\n[[serve]]\nkind = "http"\nreload = "http://a/"', "'main' is there twice"),
    ],
)
def test_a_table_that_cannot_work_is_refused_with_its_key(node: Node, lines: str, fault: str) -> None:
    node.configure(f"[[serve]]\n{lines}\n")
    ran = node.run("serve list")

    assert ran.code == 1
    assert fault in ran.err
    assert "secret" not in ran.err


def test_a_reload_command_that_others_can_change_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    script = node.folder / "tell"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o777)
    node.configure('[[serve]]\nkind = "command"\nname = "router"\nreload = ["./tell"]\n')
    monkeypatch.chdir(node.folder)
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    from tests.node import run

    ran = run("serve", "list")
    assert (ran.code, "[[serve]] router reload" in ran.err) == (1, True)
