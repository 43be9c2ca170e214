"""The life of a model on a whole node: states, grace, versions, quarantine, sources, retests, hooks, plans and their flags."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reconciler.commands import apply, blob_sources, status
from reconciler.demo.server import Server
from reconciler.ports import Fetched, FetchFailed, Want
from reconciler.runtime import devices, engines
from tests.network import Document
from tests.node import Node, Ran, deaf, flip, later, tiny
from tests.twins.content import name_of
from tests.twins.fetch import Internet, MemoryFetcher
from tests.twins.node import EventLog

#: A test job that no model passes.
IMPOSSIBLE = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s", "expect": {"regex": "^never said$"}}


@pytest.fixture
def asked(server: Server) -> list[str]:
    """The paths that the server was asked for, in order."""
    paths: list[str] = []
    real = server.body

    def body(path: str) -> bytes | None:
        paths.append(path)
        return real(path)

    server.body = body  # type: ignore[method-assign]
    return paths


def model_of(ran: Ran, model: str) -> Document:
    found: Document = next(one for one in ran.json["models"] if one["id"] == model)
    return found


# -- disable, archive, remove ----------------------------------------------------------------------


def test_disabled_and_enabled_again_without_a_download_or_a_test(used: Node, server: Server) -> None:
    item = used.item("a:v1", tiny("a"))
    used.publish(item | {"state": "disabled"})
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "inactive"}
    assert used.active() == []
    tested = used.run("status", "a:v1", "--json").json["models"][0]["tested_at"]
    server.files.clear()

    used.publish(item)
    assert used.run("apply").code == 0

    assert used.active() == ["a:v1"]
    assert used.run("status", "a:v1", "--json").json["models"][0]["tested_at"] == tested


def test_an_unlisted_model_is_back_for_free_within_its_grace_and_gone_after_it(used: Node, server: Server) -> None:
    item, other = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.publish(other)
    assert used.run("apply").code == 0
    assert used.active() == ["b:v1"]
    assert len(used.blobs()) == 2
    server.files.clear()
    used.publish(item, other)
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1"]

    used.publish(other)
    assert used.run("apply").code == 0
    with later(hours=23) as clock:
        apply.apply(used.context(clock), deaf)
    assert len(used.blobs()) == 2
    with later(hours=25) as clock:
        apply.apply(used.context(clock), deaf)

    assert [path.name for path in used.blobs()] == [hashlib.sha256(tiny("b")).hexdigest()]


def test_without_grace_an_unlisted_model_goes_at_once(used: Node) -> None:
    used.configure('grace = "0s"\n')
    used.publish()

    assert used.run("apply").code == 0

    assert used.blobs() == []
    assert used.states() == {}
    assert used.active() == []
    assert used.run("plan", "--detailed-exitcode").code == 0


@pytest.mark.parametrize("trouble", ["full disk", "dead server"])
def test_an_unlisted_model_stops_serving_whatever_else_fails(used: Node, trouble: str) -> None:
    if trouble == "full disk":
        text = (used.folder / "reconcile.toml").read_text()
        (used.folder / "reconcile.toml").write_text(text.replace('reserve = "1MiB"', 'reserve = "100000TiB"'))
    used.publish(used.item("b:v1", tiny("b"), serve=trouble != "dead server"))

    ran = used.run("apply")

    assert ran.code == (1 if trouble == "full disk" else 3), ran
    assert used.active() == []
    assert not (used.store / "active/models/a").exists()


# -- versions --------------------------------------------------------------------------------------


def test_a_version_serves_until_its_successor_does_and_they_swap_in_one_generation(used: Node, server: Server) -> None:
    old, new = used.item("a:v1", tiny("a")), used.item("a:v2", tiny("a2"), serve=False)
    used.publish(old | {"state": "archived"}, new)
    assert used.run("apply").code == 3
    assert used.active() == ["a:v1"]
    assert used.states() == {"a:v1": "active", "a:v2": "absent"}
    before = used.index()["generation"]

    server.add(tiny("a2"))
    assert used.run("apply").code == 0

    assert used.active() == ["a:v2"]
    assert used.index()["generation"] == before + 1
    last = used.run("history", "--json").json[-1]
    assert (last["added"], last["removed"]) == (["a:v2"], ["a:v1"])
    assert used.states() == {"a:v1": "archived", "a:v2": "active"}


@pytest.mark.parametrize("fault", ["dead server", "bad model"])
def test_other_content_under_an_id_keeps_the_old_copy_while_the_new_one_fails(used: Node, server: Server, fault: str) -> None:
    new = used.item("a:v1", tiny("anew"), serve=fault != "dead server")
    bad = new | {"smoke": IMPOSSIBLE}
    used.publish(bad if fault == "bad model" else new)
    assert used.run("apply").code == 3
    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert used.active() == ["a:v1"]
    assert used.run("status", "--json").json["models"][0]["attempts"] == (fault == "bad model")

    server.add(tiny("anew"))
    used.publish(new)
    assert used.run("apply").code == 0

    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("anew")


# -- failure, quarantine, sources ------------------------------------------------------------------


def test_what_fails_its_test_is_kept_with_a_record_and_only_tested_again(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)
    assert node.run("apply").code == 3
    record = node.records()[0]
    assert record["model"] == "a:v1"
    assert "never said" in record["detail"]
    assert record["report"]["verdict"] == "bad"
    assert record["tree"].startswith("sha256:")
    assert [path.read_bytes() for path in (node.store / "quarantine").glob("*/0000-*")] == [tiny("a")]
    assert "attempt 1" in node.run("status").out
    server.files.clear()

    planned = node.run("plan", "--json").json
    ran = node.run("apply", "--json")

    assert [(blob["op"], planned["summary"]["download_bytes"]) for blob in planned["blobs"]] == [("check", 0)]
    assert ran.code == 3
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 2
    assert "smoke-failed" in model_of(node.run("status", "--json"), "a:v1")["last_error"]
    node.publish(item | {"smoke": {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"}})
    assert node.run("apply").code == 0
    assert node.active() == ["a:v1"]
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 0


def test_bad_bytes_of_a_failed_model_are_fetched_again(node: Node) -> None:
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)
    assert node.run("apply").code == 3
    path = node.blobs()[0]
    seen = path.stat()
    flip(path)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # nothing but a hash can tell

    node.publish(item | {"smoke": {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"}})
    ran = node.run("apply", "--json")

    assert ran.code == 0, ran
    assert "blob-ready" in {event["type"] for event in ran.events}
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")


def test_wrong_bytes_leave_a_record_of_what_was_expected_found_and_from_where(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    digest = item["artifacts"][0]["digest"]
    server.lies = {server.path_of(digest)}

    assert node.run("apply").code == 3

    record = node.records()[0]
    found = hashlib.sha256(bytes(byte ^ 0xFF for byte in tiny("a"))).hexdigest()
    assert record["model"] == "a:v1"
    for told in (digest, f"sha256:{found}", server.address):
        assert told in record["detail"]
    incident = next(one for one in node.run("incidents", "--json").json if one["kind"] == "hash-mismatch")
    assert (incident["blob"], incident["source"]) == (digest, f"{server.address}{server.path_of(digest)}")
    assert f"sha256:{found}" in incident["detail"]


def test_incidents_are_one_json_line_each_for_who_ships_logs(node: Node) -> None:
    for word in ("one", "two"):
        node.publish(node.item("a:v1", tiny(word), smoke=IMPOSSIBLE))
        assert node.run("apply").code == 3

    ran = node.run("incidents", "--lines")

    assert ran.code == 0
    assert ran.events == node.run("incidents", "--json").json
    assert len(ran.events) > 1


def test_a_ledger_that_cannot_be_read_is_no_quiet_life(used: Node) -> None:
    (used.store / "ledger.db").write_bytes(b"no database")

    for command in ("incidents", "history"):
        ran = used.run(command)
        assert ran.code == 1, ran
        assert "what happened is not known" in ran.err
    assert any("the ledger cannot be read" in text for text in used.run("plan", "--json").json["drift"])
    assert used.run("apply").code == 0
    assert [one["kind"] for one in used.run("incidents", "--json").json] == ["crash-recovered"]


def test_quarantine_is_bounded(node: Node) -> None:
    size = len(tiny("a"))
    node.configure(f'quarantine = "{2 * size + size // 2}B"\n')
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)

    for _ in range(5):
        assert node.run("apply").code == 3

    assert len(node.records()) == 2
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 5


def test_a_source_that_lied_is_asked_last_in_the_next_run(node: Node, server: Server, asked: list[str]) -> None:
    item = node.item("a:v1", tiny("a"))
    digest = item["artifacts"][0]["digest"].removeprefix("sha256:")
    item["artifacts"][0]["urls"] = [f"{server.address}/liar/{digest}", f"{server.address}/mirror/{digest}"]
    server.files |= {f"/liar/{digest}": tiny("a")}
    server.lies = {f"/liar/{digest}"}
    node.publish(item)
    assert node.run("apply").code == 3  # the mirror has nothing yet
    server.files |= {f"/mirror/{digest}": tiny("a")}
    asked.clear()

    assert node.run("apply").code == 0

    assert set(asked) == {f"/mirror/{digest}"}


def test_a_source_that_lied_is_asked_again_where_there_is_no_other(tmp_path: Path) -> None:
    internet, heard = Internet(), EventLog()
    wants = [Want(digest=name_of(data), size=3, sources=(f"https://{data.decode()}/x", "https://honest/x")) for data in (b"one", b"two")]
    internet.pages = {"https://one/x": b"one", "https://two/x": b"two"}
    fetcher = blob_sources.FetcherWithHistory(MemoryFetcher(tmp_path, internet), frozenset({(name_of(b"one"), "https://one/x")}))

    outcomes = {outcome.digest: outcome for outcome in fetcher.fetch(wants, heard)}

    assert all(isinstance(outcome, Fetched) for outcome in outcomes.values())
    assert internet.asked == [name_of(b"one"), name_of(b"two"), name_of(b"one")]
    internet.pages.clear()
    outcomes = {outcome.digest: outcome for outcome in fetcher.fetch(wants, heard)}
    assert [type(outcome) for outcome in outcomes.values()] == [FetchFailed, FetchFailed]


def test_a_node_uses_its_own_mirror_only_where_the_network_allows_it(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"), urls=[f"{server.address}/nothing"])
    node.configure(f'\n[download]\nfallback = ["{server.address}/{{algorithm}}/{{hex}}"]\n')

    node.publish(item, sources={"allow_node_fallback": False})
    assert node.run("apply").code == 3
    node.publish(item, sources={"allow_node_fallback": True})
    assert node.run("apply").code == 0

    assert node.active() == ["a:v1"]


def test_retry_begins_anew(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"))
    server.lies = {server.path_of(item["artifacts"][0]["digest"])}
    node.publish(item)
    assert node.run("apply").code == 3
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 1
    assert node.run("retry", "b:v1").code == 64
    assert node.run("retry", "a:v1").code == 0
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 0
    server.lies = set()

    assert node.run("apply").code == 0

    assert node.active() == ["a:v1"]
    assert node.run("retry", "a:v1").code == 64


# -- retests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["runtime", "device", "test job"])
def test_a_change_of_what_a_test_stands_for_calls_for_another(
    used: Node, monkeypatch: pytest.MonkeyPatch, server: Server, what: str
) -> None:
    server.files.clear()
    if what == "runtime":
        monkeypatch.setattr(engines, "package_version", lambda name: "0.3.99")
    elif what == "device":
        monkeypatch.setattr(devices, "device_label", lambda found: "1 x another")
    else:
        used.publish(used.item("a:v1", tiny("a"), serve=False, smoke={"prompt": "Bye", "max_tokens": 2}))

    planned = used.run("plan", "--json").json["models"][0]
    assert used.run("apply").code == 0

    word = {"runtime": "runtime-changed", "device": "device-changed", "test job": "test-changed"}[what]
    assert (planned["op"], planned["reason"].partition(":")[0]) == ("retest", word)
    assert used.run("status", "a:v1", "--json").json["models"][0]["test"]["verdict"] == "passed"
    assert used.run("plan", "--detailed-exitcode").code == 0


def test_a_test_grows_old(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")), retest_after="7d")
    assert node.run("apply").code == 0
    later = datetime.now(UTC) + timedelta(days=7, minutes=1)
    then = node.context(lambda: later)

    assert not apply.preview(node.context(lambda: later - timedelta(minutes=2))).plan.changes
    due = apply.preview(then).plan.models[0]
    apply.apply(then, deaf)

    assert (due.op, due.reason.partition(":")[0]) == ("retest", "retest-due")
    assert not apply.preview(then).plan.changes
    assert [model.state for model in status.status(then).models] == ["active"]


def test_a_failed_retest_takes_the_model_away_in_one_swap(used: Node) -> None:
    item, other = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.publish(item, other)
    assert used.run("apply").code == 0
    before = used.index()["generation"]
    used.publish(item | {"smoke": IMPOSSIBLE}, other)

    assert used.run("apply").code == 3

    assert used.active() == ["b:v1"]
    assert used.index()["generation"] == before + 1
    last = used.run("history", "--json").json[-1]
    assert (last["added"], last["removed"]) == ([], ["a:v1"])
    assert used.states() == {"a:v1": "failed", "b:v1": "active"}


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", ['["sh", "-c", "echo too slow >&2; exit 1"]', '["sleep", "600"]', '["/no/such/program"]'])
def test_an_unhealthy_node_returns_to_what_served_before(used: Node, hooks: str) -> None:
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = {hooks}\nhealthy_timeout = "1s"\n')
    before = used.index()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))

    ran = used.run("apply")

    assert ran.code == 3, ran
    assert (used.index()["generation"], used.index()["models"]) == (before["generation"], before["models"])
    assert used.states() == {"a:v1": "active", "b:v1": "failed"}
    assert "not healthy" in model_of(used.run("status", "--json"), "b:v1")["last_error"]
    assert any("is not healthy" in one["detail"] for one in used.run("incidents", "--json").json)
    assert "went back" in used.run("history", "--json").json[-1]["what"]
    (used.folder / "reconcile.toml").write_text(text)
    assert used.run("apply").code == 3, "it is remembered, and not swapped in and out at each run"
    assert "`reconcile retry b:v1`" in model_of(used.run("status", "--json"), "b:v1")["reason"]
    assert used.run("retry", "b:v1").code == 0
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1"]


def test_what_a_killed_run_had_not_asked_about_is_asked_by_the_next(used: Node) -> None:
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = ["sh", "-c", "kill -KILL $PPID"]\n')
    before = used.index()["models"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    command = [sys.executable, "-m", "reconciler", "apply", "--config", str(used.folder / "reconcile.toml")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert used.active() == ["a:v1", "b:v1"]
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = ["sh", "-c", "echo too slow >&2; exit 1"]\n')

    assert used.run("apply").code == 3

    assert used.index()["models"] == before
    assert used.states() == {"a:v1": "active", "b:v1": "failed"}
    (used.folder / "reconcile.toml").write_text(text)
    assert used.run("apply").code == 3, "it is remembered, and not swapped in and out at each run"
    assert "`reconcile retry b:v1`" in model_of(used.run("status", "--json"), "b:v1")["reason"]
    assert used.run("retry", "b:v1").code == 0
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1"]


def test_hooks_hear_the_index_on_their_standard_input(node: Node) -> None:
    text = (node.folder / "reconcile.toml").read_text()
    hooks = f"""[hooks]
activated = ["sh", "-c", "cat > {node.folder}/activated"]
healthy = ["sh", "-c", "cat > {node.folder}/healthy"]
"""
    (node.folder / "reconcile.toml").write_text(f"{text}\n{hooks}")
    node.publish(node.item("a:v1", tiny("a")))

    assert node.run("apply").code == 0

    assert json.loads((node.folder / "activated").read_bytes()) == node.index()
    assert json.loads((node.folder / "healthy").read_bytes()) == node.index()


def test_a_hook_that_fails_to_be_told_is_a_warning(used: Node) -> None:
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nactivated = ["sh", "-c", "echo no >&2; exit 3"]\n')
    used.publish(used.item("b:v1", tiny("b")))

    ran = used.run("apply")

    assert ran.code == 0, ran
    assert "the activated hook exited with 3: no" in ran.out
    assert used.active() == ["b:v1"]


# -- plans and flags -------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["lock", "generation", "floor"])
def test_a_saved_plan_is_refused_when_the_world_moved(used: Node, tmp_path: Path, moved: str) -> None:
    items = [used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))]
    used.publish(*items)
    saved = tmp_path / "plan.json"
    match moved:
        case "lock":
            assert used.run("plan", "--out", str(saved)).code == 0
            used.publish(*items, used.item("c:v1", tiny("c")))
        case "floor":
            assert used.run("plan", "--out", str(saved)).code == 0
            used.publish(*items)
        case _:
            assert used.run("apply").code == 0
            assert used.run("rollback").code == 0
            assert used.run("resume").code == 0
            assert used.run("plan", "--out", str(saved)).code == 0
            assert used.run("apply").code == 0
    before = used.index()

    ran = used.run("apply", str(saved), "--json")

    assert ran.code == 1
    assert json.loads(ran.out.splitlines()[-1])["error"]["name"] == "stale-plan"
    assert used.index() == before


def test_only_and_except_leave_the_others_alone(node: Node) -> None:
    node.publish(*(node.item(f"{name}:v1", tiny(name)) for name in "abc"))

    assert node.run("apply", "--only", "a:v1").code == 0
    assert node.states() == {"a:v1": "active", "b:v1": "absent", "c:v1": "absent"}
    assert node.run("apply", "--except", "c:v1").code == 0

    assert node.states() == {"a:v1": "active", "b:v1": "active", "c:v1": "absent"}
    planned = node.run("plan", "--except", "c:v1", "--detailed-exitcode", "--json")
    assert planned.code == 0
    assert model_of(planned, "c:v1")["reason"].startswith("excluded")
    assert node.run("plan", "--detailed-exitcode").code == 2


@pytest.mark.parametrize("chosen", [("--only", "b:v1"), ("--except", "a:v1")], ids=["only", "except"])
def test_what_the_network_disables_stops_though_it_is_left_out(used: Node, chosen: tuple[str, str]) -> None:
    used.publish(used.item("a:v1", tiny("a"), state="disabled"), used.item("b:v1", tiny("b")))

    assert used.run("apply", *chosen).code == 0

    assert used.states()["a:v1"] == "inactive"
    assert "a:v1" not in used.active()


def test_offline_touches_no_network_and_locked_fetches_no_lock(used: Node, asked: list[str]) -> None:
    held = (used.folder / "models.lock").read_bytes()
    (used.folder / "published.json").write_bytes(used.network.snapshot(used.item("b:v1", tiny("b"))))

    assert used.run("sync", "--locked").code == 0
    assert used.run("sync", "--offline").code == 0
    assert (used.folder / "models.lock").read_bytes() == held
    assert used.active() == ["a:v1"]
    assert used.run("lock").code == 0
    ran = used.run("sync", "--offline")

    assert ran.code == 3
    assert asked == []
    assert "offline" in model_of(used.run("status", "--json"), "b:v1")["reason"]
    assert used.run("sync", "--locked").code == 0
    assert used.active() == ["b:v1"]


def test_a_lock_that_was_edited_is_refused_with_locked_too(used: Node) -> None:
    path = used.folder / "models.lock"
    path.write_bytes(path.read_bytes().replace(b"a:v1", b"b:v1"))

    ran = used.run("sync", "--locked")

    assert ran.code == 4
    assert "error[lock-mismatch]" in ran.err
    assert used.active() == ["a:v1"]
