"""The main job, from a signed snapshot to models that serve, with every part real."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from reconciler.demo import models, network
from reconciler.demo.server import Server
from tests.node import Node, tiny, traces


def test_a_model_is_downloaded_verified_tested_and_served(node: Node) -> None:
    data = tiny("a")
    node.publish(node.item("a:v1", data))

    ran = node.run("apply", "--json")

    assert ran.code == 0, ran
    assert node.states() == {"a:v1": "active"}
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == data
    report = node.run("status", "a:v1", "--json").json["models"][0]["test"]
    assert report["verdict"] == "passed"
    assert report["tokens"] >= 1
    assert report["engine_version"]
    kinds = [event["type"] for event in ran.events]
    assert kinds[0] == "run-started"
    assert kinds[-1] == "run-ended"
    assert len({event["lock"] for event in ran.events}) == 1


def test_chat_in_an_archive_and_an_embedding(node: Node) -> None:
    archive = models.zst(models.tar({"x/chat.gguf": tiny("chat", "chat"), "x/notes.txt": b"hello\n"}))
    chat = node.item("chat:v1", archive, path="chat.tar.zst", tasks=["chat"], smoke={"task": "chat", "prompt": "Hi", "max_tokens": 4})
    chat["artifacts"][0]["unpack"] = "tar.zst"
    chat["entrypoint"] = "x/chat.gguf"
    embed = node.item("embed:v1", tiny("embed", "embedding"), tasks=["embedding"], smoke={"task": "embedding", "expect": {"dimension": 32}})
    node.publish(chat, embed)

    ran = node.run("apply")

    assert ran.code == 0, ran
    assert node.states() == {"chat:v1": "active", "embed:v1": "active"}
    assert (node.store / "active/models/chat/v1/x/notes.txt").read_bytes() == b"hello\n"


def test_second_apply_changes_nothing(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    before = traces(node.folder, ledger=False)

    planned = node.run("plan", "--detailed-exitcode", "--json")
    again = node.run("apply")

    assert planned.code == 0
    assert planned.json["changes"] is False
    assert again.code == 0
    after = traces(node.folder, ledger=False)
    del before["store"], after["store"]  # the ledger's journal comes and goes there
    assert after == before


def test_plan_leaves_no_trace(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    before = traces(node.folder)

    assert node.run("plan", "--detailed-exitcode").code == 2

    assert traces(node.folder) == before
    assert node.run("apply").code == 0
    before = traces(node.folder)
    for command in ("plan", "status", "incidents", "history"):
        assert node.run(command).code == 0
    assert traces(node.folder) == before


def test_every_blob_hashes_to_its_name_and_the_index_lists_exactly_the_active(node: Node) -> None:
    archive = models.tar({"m.gguf": tiny("t"), "empty": b""})
    packed = node.item("t:v1", archive, path="t.tar", entrypoint="m.gguf")
    packed["artifacts"][0]["unpack"] = "tar"
    node.publish(node.item("a:v1", tiny("a")), packed, node.item("off:v1", tiny("c"), state="disabled"))
    assert node.run("apply").code == 0

    blobs = [path for path in (node.store / "blobs").rglob("*") if path.is_file()]

    assert len(blobs) >= 3
    for path in blobs:
        assert hashlib.new(path.parents[1].name, path.read_bytes()).hexdigest() == path.name
        assert path.stat().st_mode & 0o777 == 0o444
    active = sorted(model["id"] for model in node.index()["models"])
    assert active == sorted(id_ for id_, state in node.states().items() if state == "active") == ["a:v1", "t:v1"]


def test_a_reader_never_misses_during_twenty_applies(node: Node) -> None:
    fixed = node.item("fixed:v1", tiny("a"))
    node.publish(fixed)
    assert node.run("apply").code == 0
    path = node.store / "active/models/fixed/v1/fixed.gguf"
    stop, misses, opened = threading.Event(), [], 0

    def read() -> None:
        nonlocal opened
        while not stop.is_set():
            try:
                with path.open("rb") as file:
                    file.read(16)
                opened += 1
            except OSError as error:
                misses.append(error)
            stop.wait(0.0005)

    reader = threading.Thread(target=read)
    reader.start()
    other = node.item("other:v1", tiny("b"))
    try:
        for turn in range(20):
            node.publish(fixed, *([other] if turn % 2 == 0 else []))
            assert node.run("apply").code == 0
    finally:
        stop.set()
        reader.join()

    assert not misses
    assert opened > 100


def test_a_failing_model_never_stops_the_others(node: Node) -> None:
    bad = node.item("bad:v1", b"this is no model at all" * 100)
    gone = node.item("gone:v1", tiny("gone"), serve=False)
    node.publish(bad, gone, node.item("good:v1", tiny("a")))

    ran = node.run("apply")

    assert ran.code == 3
    assert node.states() == {"bad:v1": "failed", "gone:v1": "absent", "good:v1": "active"}
    kinds = {(one["kind"], one["model"]) for one in node.run("incidents", "--json").json}
    assert ("smoke-failed", "bad:v1") in kinds
    assert any(kind == "source-failed" for kind, _ in kinds)


def test_wrong_bytes_fail_the_model_and_the_next_run_heals_it(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    path = server.path_of(item["artifacts"][0]["digest"])
    server.lies = {path}

    assert node.run("apply").code == 3
    assert node.states() == {"a:v1": "failed"}
    assert "hash-mismatch" in {one["kind"] for one in node.run("incidents", "--json").json}
    assert not [one for one in (node.store / "blobs").rglob("*") if one.is_file()]
    server.lies = set()

    assert node.run("sync").code == 0
    assert node.states() == {"a:v1": "active"}


def test_more_gpu_memory_than_there_is_downloads_nothing(node: Node) -> None:
    node.publish(node.item("huge:v1", tiny("a"), gpu_memory=1 << 50), node.item("a:v1", tiny("b")))

    ran = node.run("apply")

    assert ran.code == 0
    assert node.states() == {"a:v1": "active", "huge:v1": "absent"}
    assert node.run("plan", "--detailed-exitcode").code == 0
    assert [one["model"] for one in node.run("incidents", "--json").json if one["kind"] == "incompatible"] == ["huge:v1"]


def test_update_disable_and_remove(node: Node) -> None:
    old, off, gone = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")), node.item("c:v1", tiny("c"))
    node.publish(old, off, gone)
    assert node.run("apply").code == 0

    node.publish(old | {"state": "archived"}, node.item("a:v2", tiny("a2")), off | {"state": "disabled"})
    assert node.run("sync").code == 0

    assert node.states() == {"a:v1": "archived", "a:v2": "active", "b:v1": "inactive", "c:v1": "inactive"}
    assert [model["id"] for model in node.index()["models"]] == ["a:v2"]
    assert node.run("plan", "--detailed-exitcode").code == 0
    node.publish(old | {"state": "archived"}, node.item("a:v2", tiny("a2")), off, gone)
    assert node.run("plan", "--json").json["summary"]["download_bytes"] == 0
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "archived", "a:v2": "active", "b:v1": "active", "c:v1": "active"}


@pytest.mark.parametrize("chosen", [["--only", "a:v1"], ["--except", "b:v1"]], ids=["only", "except"])
def test_a_saved_plan_of_some_models_is_carried_out_for_these(node: Node, tmp_path: Path, chosen: list[str]) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    saved = tmp_path / "saved.json"
    assert node.run("plan", *chosen, "--out", str(saved)).code == 0

    assert node.run("apply", str(saved)).code == 0

    assert node.states()["a:v1"] == "active"
    assert node.states()["b:v1"] == "absent"


def test_a_saved_plan_is_carried_out_or_refused(node: Node, tmp_path: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    saved = tmp_path / "plan.json"
    assert node.run("plan", "--out", str(saved)).code == 0

    assert node.run("apply", str(saved)).code == 0
    stale = node.run("apply", str(saved), "--json")

    assert stale.code == 1
    assert json.loads(stale.out.splitlines()[-1])["error"]["name"] == "stale-plan"


def test_the_committed_lock_describes_exactly_the_models_that_the_demo_makes() -> None:
    from reconciler.core import lock as locks

    lock = locks.decode((network.committed_folder() / "models.lock").read_bytes())

    made = {item.model.artifacts[0].digest: item.model.id for item in network.all_models()}
    assert {artifact.digest: model.id for model in lock.model for artifact in model.artifact} == made


@pytest.mark.parametrize("name", ["lock", "plan"])
def test_what_ci_needs_loads_neither_engine_nor_downloader(node: Node, name: str) -> None:
    import subprocess
    import sys

    node.publish(node.item("a:v1", tiny("a")))
    code = (
        "import sys; from reconciler import cli; code = cli.run(sys.argv[1:]); "
        "heavy = {'llama_cpp', 'aria2p', 'requests', 'numpy', 'gguf'} & set(sys.modules); print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, name, "--config", str(node.folder / "reconcile.toml")], capture_output=True, text=True, check=True
    )

    assert "HEAVY []" in ran.stdout
