"""The life of a model on a whole node: states, cold storage, grace, quarantine, retests, hooks, rollback, housekeeping."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from reconciler import settings as settings_
from reconciler.demo.server import Server
from reconciler.engine import look, run, upkeep, verify, wary
from reconciler.fetch.verify import Checked, Hashers
from reconciler.ports import Event, Fetched, FetchFailed, HashProgress, Want
from reconciler.report.terminal import Moving
from reconciler.runtime import devices, packages
from tests.demand import own_disk
from tests.network import Document
from tests.node import Node, Ran, tiny, traces
from tests.twins import Heard, Internet, StagingFetcher, name_of

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


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own."""
    with own_disk(tmp_path / "other", 16, "cold storage on another file system") as place:
        yield place


def deaf(event: Event) -> None:
    del event


def settings_of(node: Node) -> settings_.Settings:
    return settings_.decode((node.folder / "reconcile.toml").read_bytes(), node.folder)


def blobs(node: Node) -> list[Path]:
    return sorted(path for path in (node.store / "blobs").rglob("*") if path.is_file())


def active(node: Node) -> list[str]:
    return sorted(model["id"] for model in node.index()["models"])


def kinds(node: Node) -> list[str]:
    return [one["kind"] for one in node.run("incidents", "--json").json]


def records(node: Node) -> list[Document]:
    return [json.loads(path.read_bytes()) for path in sorted((node.store / "quarantine").glob("*/record.json"))]


def model_of(ran: Ran, model: str) -> Document:
    found: Document = next(one for one in ran.json["models"] if one["id"] == model)
    return found


def flip(path: Path) -> None:
    """Change one byte of a read-only file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


# -- disable, archive, remove ----------------------------------------------------------------------


def test_disabled_and_enabled_again_without_a_download_or_a_test(used: Node, server: Server) -> None:
    item = used.item("a:v1", tiny("a"))
    used.publish(item | {"state": "disabled"})
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "inactive"}
    assert active(used) == []
    tested = used.run("status", "a:v1", "--json").json["models"][0]["tested_at"]
    server.files.clear()

    used.publish(item)
    assert used.run("apply").code == 0

    assert active(used) == ["a:v1"]
    assert used.run("status", "a:v1", "--json").json["models"][0]["tested_at"] == tested


def test_archived_to_another_file_system_and_back_without_a_download(node: Node, server: Server, other_disk: Path) -> None:
    node.configure(f'archive = "{other_disk}/cold"\n')
    item, other = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))
    node.publish(item, other)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"}, other)
    assert node.run("apply").code == 0
    cold = [path for path in other_disk.rglob("*") if path.is_file()]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in cold] == [item["artifacts"][0]["digest"].removeprefix("sha256:")]
    assert cold[0].stat().st_dev != node.store.stat().st_dev
    assert node.states() == {"a:v1": "archived", "b:v1": "active"}
    node.run("gc")  # what the generation before needs is still there; only the archived copy counts from here on
    server.files.clear()

    node.publish(item, other)
    planned = node.run("plan", "--json").json
    assert node.run("apply").code == 0

    assert planned["summary"]["download_bytes"] == 0
    assert [blob["op"] for blob in planned["blobs"]] == ["restore"]
    assert active(node) == ["a:v1", "b:v1"]
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert not [path for path in other_disk.rglob("*") if path.is_file()]


def test_a_cold_copy_that_rotted_is_noticed_and_fetched(node: Node, other_disk: Path) -> None:
    node.configure(f'archive = "{other_disk}/cold"\n')
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0
    flip(next(path for path in other_disk.rglob("*") if path.is_file()))

    node.publish(item)
    assert node.run("apply").code == 0

    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert "blob-damaged" in kinds(node)


@pytest.mark.parametrize("command", [["verify"], ["verify", "--repair"], ["agent", "--once"]])
def test_a_scrub_sets_aside_what_rotted_in_cold_storage(node: Node, command: list[str]) -> None:
    node.configure('\n[agent]\nscrub_after = "1s"\n')
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0
    assert node.run("verify", "--json").json["checked"] == 1
    copy = next((node.store / "archive").glob("blobs/*/*/*"))
    flip(copy)

    ran = node.run(*command)

    assert ran.code == (3 if command == ["verify"] else 0), ran
    assert "blob-damaged" in kinds(node)
    assert node.states() == {"a:v1": "absent"}
    assert copy.with_name(f".{copy.name}.damaged").exists()
    assert node.run("verify").code == 0
    assert node.run("plan").code == 0, "an archived model is not fetched to be archived"
    node.publish(item)
    assert node.run("apply").code == 0
    assert active(node) == ["a:v1"]


def test_a_cold_copy_that_cannot_be_read_now_keeps_its_name(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0

    def killed(_: Hashers, files: list[tuple[str, int, Path]], *__: object) -> Iterator[Checked]:
        return (Checked(digest=name, ok=False, error="killed") for name, _size, _path in files)

    with monkeypatch.context() as patched:
        patched.setattr(Hashers, "check_many", killed)
        assert node.run("verify").code == 3

    assert node.states() == {"a:v1": "archived"}
    assert node.run("verify").code == 0


def test_verify_says_how_far_it_is(used: Node) -> None:
    heard = Heard()

    verify.verify(settings_.decode((used.folder / "reconcile.toml").read_bytes(), used.folder, ""), heard, progress=True)

    told = [(one.done, one.total) for one in heard.of(HashProgress)]
    assert told[-1] == (len(tiny("a")), len(tiny("a")))
    assert told == sorted(told)


def test_a_terminal_shows_how_far_verify_is() -> None:
    seen = io.StringIO()
    with Moving(Console(file=seen, force_terminal=True, width=100)) as people:
        people(HashProgress(done=1 << 20, total=4 << 20))
        people._progress.refresh()
        assert "hashing" in seen.getvalue()
        assert "1.0 MiB of 4.0 MiB" in seen.getvalue()
        people(HashProgress(done=4 << 20, total=4 << 20))
        assert not people._tasks


def test_a_whole_cold_copy_is_hashed_in_its_turn(node: Node) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item, node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"}, node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    flip(next((node.store / "archive").glob("blobs/*/*/*")))

    assert sorted(node.run("verify", "--sample", "50%").code for _ in range(2)) == [0, 3], "never hashed: first; then the other's turn"


def test_cold_storage_that_is_away_keeps_the_model_where_it_is(used: Node) -> None:
    (used.folder / "file").write_bytes(b"mine")
    used.configure('archive = "file/cold"\n')
    used.publish(used.item("a:v1", tiny("a"), state="archived"))

    ran = used.run("apply")

    assert ran.code in {1, 3}, ran
    assert "Traceback" not in ran.err
    assert len(blobs(used)) == 1
    used.configure("")
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "archived"}


def test_an_unlisted_model_is_back_for_free_within_its_grace_and_gone_after_it(used: Node, server: Server) -> None:
    item, other = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.publish(other)
    assert used.run("apply").code == 0
    assert active(used) == ["b:v1"]
    assert len(blobs(used)) == 2
    server.files.clear()
    used.publish(item, other)
    assert used.run("apply").code == 0
    assert active(used) == ["a:v1", "b:v1"]

    used.publish(other)
    assert used.run("apply").code == 0
    run.apply(settings_of(used), deaf, clock=lambda: datetime.now(UTC) + timedelta(hours=23))
    assert len(blobs(used)) == 2
    run.apply(settings_of(used), deaf, clock=lambda: datetime.now(UTC) + timedelta(hours=25))

    assert [path.name for path in blobs(used)] == [hashlib.sha256(tiny("b")).hexdigest()]


def test_without_grace_an_unlisted_model_goes_at_once(used: Node) -> None:
    used.configure('grace = "0s"\n')
    used.publish()

    assert used.run("apply").code == 0

    assert blobs(used) == []
    assert used.states() == {}
    assert active(used) == []
    assert used.run("plan", "--detailed-exitcode").code == 0


@pytest.mark.parametrize("trouble", ["full disk", "dead server"])
def test_an_unlisted_model_stops_serving_whatever_else_fails(used: Node, trouble: str) -> None:
    if trouble == "full disk":
        text = (used.folder / "reconcile.toml").read_text()
        (used.folder / "reconcile.toml").write_text(text.replace('reserve = "1MiB"', 'reserve = "100000TiB"'))
    used.publish(used.item("b:v1", tiny("b"), serve=trouble != "dead server"))

    ran = used.run("apply")

    assert ran.code == (1 if trouble == "full disk" else 3), ran
    assert active(used) == []
    assert not (used.store / "active/models/a").exists()


# -- versions --------------------------------------------------------------------------------------


def test_a_version_serves_until_its_successor_does_and_they_swap_in_one_generation(used: Node, server: Server) -> None:
    old, new = used.item("a:v1", tiny("a")), used.item("a:v2", tiny("a2"), serve=False)
    used.publish(old | {"state": "archived"}, new)
    assert used.run("apply").code == 3
    assert active(used) == ["a:v1"]
    assert used.states() == {"a:v1": "active", "a:v2": "failed"}
    before = used.index()["generation"]

    server.add(tiny("a2"))
    assert used.run("apply").code == 0

    assert active(used) == ["a:v2"]
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
    assert active(used) == ["a:v1"]
    assert used.run("status", "--json").json["models"][0]["attempts"] == 1

    server.add(tiny("anew"))
    used.publish(new)
    assert used.run("apply").code == 0

    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("anew")


# -- failure, quarantine, sources ------------------------------------------------------------------


def test_what_fails_its_test_is_kept_with_a_record_and_only_tested_again(node: Node, server: Server) -> None:
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)
    assert node.run("apply").code == 3
    record = records(node)[0]
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
    assert active(node) == ["a:v1"]
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 0


def test_bad_bytes_of_a_failed_model_are_fetched_again(node: Node) -> None:
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)
    assert node.run("apply").code == 3
    path = blobs(node)[0]
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

    record = records(node)[0]
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
    node.configure(f'quarantine = "{2 * size + size // 2}"\n')
    item = node.item("a:v1", tiny("a"), smoke=IMPOSSIBLE)
    node.publish(item)

    for _ in range(5):
        assert node.run("apply").code == 3

    assert len(records(node)) == 2
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
    internet, heard = Internet(), Heard()
    wants = [Want(digest=name_of(data), size=3, sources=(f"https://{data.decode()}/x", "https://honest/x")) for data in (b"one", b"two")]
    internet.pages = {"https://one/x": b"one", "https://two/x": b"two"}
    fetcher = wary.Wary(StagingFetcher(tmp_path, internet), frozenset({(name_of(b"one"), "https://one/x")}))

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

    assert active(node) == ["a:v1"]


def test_retry_begins_anew(node: Node, server: Server) -> None:
    node.publish(node.item("a:v1", tiny("a"), serve=False))
    assert node.run("apply").code == 3
    assert node.run("retry", "b:v1").code == 64
    assert node.run("retry", "a:v1").code == 0
    assert model_of(node.run("status", "--json"), "a:v1")["attempts"] == 0
    server.add(tiny("a"))

    assert node.run("apply").code == 0

    assert active(node) == ["a:v1"]
    assert node.run("retry", "a:v1").code == 64


# -- retests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["runtime", "device", "test job"])
def test_a_change_of_what_a_test_stands_for_calls_for_another(
    used: Node, monkeypatch: pytest.MonkeyPatch, server: Server, what: str
) -> None:
    server.files.clear()
    if what == "runtime":
        monkeypatch.setattr(packages, "version", lambda name: "0.3.99")
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
    settings = settings_of(node)

    assert not run.preview(settings, clock=lambda: later - timedelta(minutes=2)).plan.changes
    due = run.preview(settings, clock=lambda: later).plan.models[0]
    run.apply(settings, deaf, clock=lambda: later)

    assert (due.op, due.reason.partition(":")[0]) == ("retest", "retest-due")
    assert not run.preview(settings, clock=lambda: later).plan.changes
    assert [model.state for model in look.status(settings, clock=lambda: later).models] == ["active"]


def test_a_failed_retest_takes_the_model_away_in_one_swap(used: Node) -> None:
    item, other = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.publish(item, other)
    assert used.run("apply").code == 0
    before = used.index()["generation"]
    used.publish(item | {"smoke": IMPOSSIBLE}, other)

    assert used.run("apply").code == 3

    assert active(used) == ["b:v1"]
    assert used.index()["generation"] == before + 1
    last = used.run("history", "--json").json[-1]
    assert (last["added"], last["removed"]) == ([], ["a:v1"])
    assert used.states() == {"a:v1": "failed", "b:v1": "active"}


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ['["sh", "-c", "echo too slow >&2; exit 1"]', '["sleep", "600"]', '["/no/such/program"]'])
def test_an_unhealthy_node_returns_to_what_served_before(used: Node, gate: str) -> None:
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = {gate}\nhealthy_timeout = "1s"\n')
    before = used.index()
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))

    ran = used.run("apply")

    assert ran.code == 3, ran
    assert used.index() == before
    assert used.states() == {"a:v1": "active", "b:v1": "failed"}
    assert "not healthy" in model_of(used.run("status", "--json"), "b:v1")["last_error"]
    assert any("is not healthy" in one["detail"] for one in used.run("incidents", "--json").json)
    assert "went back" in used.run("history", "--json").json[-1]["what"]
    (used.folder / "reconcile.toml").write_text(text)
    assert used.run("apply").code == 0
    assert active(used) == ["a:v1", "b:v1"]


def test_what_a_killed_run_had_not_asked_about_is_asked_by_the_next(used: Node) -> None:
    text = (used.folder / "reconcile.toml").read_text()
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = ["sh", "-c", "kill -KILL $PPID"]\n')
    before = used.index()["models"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    command = [sys.executable, "-m", "reconciler", "apply", "--config", str(used.folder / "reconcile.toml")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert active(used) == ["a:v1", "b:v1"]
    (used.folder / "reconcile.toml").write_text(f'{text}\n[hooks]\nhealthy = ["sh", "-c", "echo too slow >&2; exit 1"]\n')

    assert used.run("apply").code == 3

    assert used.index()["models"] == before
    assert used.states() == {"a:v1": "active", "b:v1": "failed"}
    (used.folder / "reconcile.toml").write_text(text)
    assert used.run("apply").code == 0
    assert active(used) == ["a:v1", "b:v1"]


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
    assert active(used) == ["b:v1"]


# -- rollback and history --------------------------------------------------------------------------


def test_rollback_returns_to_a_generation_and_the_next_apply_goes_forward(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0

    assert used.run("rollback", "999").code == 64
    assert used.run("rollback").code == 0

    assert active(used) == ["a:v1"]
    assert used.index()["generation"] == first
    changes = used.run("history", "--json").json
    assert changes[-1]["actor"] == "rollback"
    assert changes[-1]["removed"] == ["b:v1"]
    assert [change["actor"] for change in changes[:2]] == ["apply", "apply"]
    assert changes[-1]["lock"] == used.run("status", "--json").json["lock"]
    planned = used.run("plan", "--json").json
    assert planned["summary"]["download_bytes"] == 0
    assert used.run("apply").code == 0
    assert active(used) == ["a:v1", "b:v1"]


@pytest.mark.parametrize("change", ["unlisted", "disabled", "other content"])
def test_rollback_to_what_the_network_took_away_is_refused(used: Node, change: str) -> None:
    first = used.index()["generation"]
    other = used.item("b:v1", tiny("b"))
    match change:
        case "unlisted":
            used.publish(other)
        case "disabled":
            used.publish(used.item("a:v1", tiny("a"), state="disabled"), other)
        case _:
            used.publish(used.item("a:v1", tiny("anew")), other)
    assert used.run("apply").code == 0
    before = used.index()

    ran = used.run("rollback", str(first))

    assert ran.code == 1
    assert "a:v1" in ran.err
    assert used.index() == before


def two_generations(used: Node) -> int:
    first: int = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    return first


def test_rollback_out_of_a_damaged_generation(used: Node) -> None:
    first = two_generations(used)
    index = used.store / "active/index.json"
    index.chmod(0o644)
    index.write_bytes(b"{}")

    assert used.run("rollback").code == 0

    assert used.index()["generation"] == first
    assert active(used) == ["a:v1"]


def test_rollback_serves_no_bytes_that_are_not_known_to_be_good(used: Node) -> None:
    two_generations(used)
    serving = used.index()
    flip(next(path for path in blobs(used) if path.read_bytes() == tiny("a")))

    ran = used.run("rollback")

    assert ran.code == 1, ran
    assert "not known to be good: a:v1" in ran.err
    assert used.index() == serving


def test_rollback_follows_no_link_that_was_planted_in_a_kept_generation(used: Node, tmp_path: Path) -> None:
    first = two_generations(used)
    link = used.store / f"generations/{first}/models/a/v1"
    true = link.readlink()
    link.unlink()
    link.symlink_to(tmp_path, target_is_directory=True)

    assert used.run("rollback").code == 0

    assert active(used) == ["a:v1"]
    assert (used.store / "active/models/a/v1").readlink() == true


def test_kept_generations_are_bounded(node: Node) -> None:
    node.configure("generations = 3\n")
    one, two = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))
    for turn in range(6):
        node.publish(one, two | {"state": "enabled" if turn % 2 else "disabled"})
        assert node.run("apply").code == 0

    kept = sorted(int(path.name) for path in (node.store / "generations").iterdir())
    assert len(kept) == 3
    assert node.index()["generation"] == kept[-1]


# -- gc --------------------------------------------------------------------------------------------


def strewn(node: Node, count: int, size: int) -> list[str]:
    """Leave blobs in the store that nobody asked for."""
    names = []
    for number in range(count):
        data = bytes([number]) * size
        digits = hashlib.sha256(data).hexdigest()
        path = node.store / "blobs/sha256" / digits[:2] / digits
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
        names.append(f"sha256:{digits}")
    return names


def test_gc_says_what_would_go_and_why_and_stops_at_its_bound(used: Node) -> None:
    names = strewn(used, 3, 1000)
    before = traces(used.folder)

    dry = used.run("gc", "--dry-run", "--json").json

    assert traces(used.folder) == before
    assert {item["name"] for item in dry["items"] if item["kind"] == "blob"} == set(names)
    assert dry["bytes"] == 3000
    assert all(item["reason"] for item in dry["items"])
    assert used.run("gc", "--max", "1500", "--json").json["bytes"] == 2000
    assert used.run("gc", "--json").json["bytes"] == 1000
    assert used.run("gc", "--json").json["items"] == []
    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")


def test_gc_frees_what_an_unlisted_model_left_once_its_grace_is_over(used: Node) -> None:
    used.configure("generations = 1\n")
    used.publish(used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    later = datetime.now(UTC) + timedelta(hours=25)

    assert upkeep.gc(settings_of(used), clock=lambda: datetime.now(UTC) + timedelta(hours=23)) == ()
    assert [one.kind for one in upkeep.waste(settings_of(used), clock=lambda: later)] == ["tree", "blob"]
    upkeep.gc(settings_of(used), clock=lambda: later)

    assert len(blobs(used)) == 1


def test_gc_keeps_what_grace_and_kept_generations_and_the_lock_need(used: Node) -> None:
    off = used.item("c:v1", tiny("c"))
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")), off)
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("anew")), off | {"state": "disabled"})  # b is in its grace, a's old content in a kept generation
    assert used.run("apply").code == 0
    before = blobs(used)
    assert len(before) == 4
    reader = (used.store / "active/models/a/v1/a.gguf").open("rb")

    assert used.run("gc", "--json").json["bytes"] == 0
    assert blobs(used) == before
    later = datetime.now(UTC) + timedelta(hours=25)
    run.apply(settings_of(used), deaf, clock=lambda: later)
    upkeep.gc(settings_of(used), clock=lambda: later)

    kept = {path.name for path in blobs(used)}
    assert kept == {hashlib.sha256(tiny(seed)).hexdigest() for seed in ("anew", "c")}
    with reader:
        assert reader.read() == tiny("anew")


def test_a_reader_that_holds_a_file_open_reads_on_after_it_is_deleted(used: Node) -> None:
    used.configure('grace = "0s"\n')
    with (used.store / "active/models/a/v1/a.gguf").open("rb") as reader:
        head = reader.read(10)
        used.publish()
        assert used.run("apply").code == 0
        assert blobs(used) == []

        assert head + reader.read() == tiny("a")


def test_partial_downloads_go_by_age_and_only_what_nobody_continues(used: Node) -> None:
    later = used.item("b:v1", tiny("b"), serve=False)
    used.publish(used.item("a:v1", tiny("a")), later)
    wanted = used.store / "staging" / later["artifacts"][0]["digest"].replace(":", "-")
    strange = used.store / "staging" / f"sha256-{'0' * 64}"
    for folder in (wanted, strange):
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"half")

    items = used.run("gc", "--json").json["items"]

    assert [(item["kind"], item["name"]) for item in items] == [("partial", strange.name)]
    assert wanted.exists()
    old = datetime.now(UTC) + timedelta(days=8)
    assert [one.name for one in upkeep.waste(settings_of(used), clock=lambda: old) if one.kind == "partial"] == [wanted.name]


# -- verify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ledger", ["whole", "lost"])
def test_verify_says_that_the_trees_of_active_models_are_gone(used: Node, ledger: str) -> None:
    shutil.rmtree(used.store / "trees")
    if ledger == "lost":
        (used.store / "ledger.db").unlink()

    found = used.run("verify", "--json")

    assert found.code == 3
    assert {(one["kind"], one["detail"]) for one in found.json["damage"]} >= {("tree", "it is gone")}
    assert used.run("verify", "--repair").code == 0
    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")


def test_what_is_gone_and_needed_by_nobody_is_drift_once(used: Node) -> None:
    item, other = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.configure("generations = 1\n")
    used.publish(item, other)
    assert used.run("apply").code == 0
    old = (used.store / "ledger.db").read_bytes()
    used.publish(item, other | {"state": "archived"})
    assert used.run("apply").code == 0
    (used.store / "ledger.db").write_bytes(old)  # a backup that was put back

    assert used.run("plan", "--json").json["drift"] != []
    assert used.run("apply").code == 0
    assert used.run("apply").code == 0

    assert used.run("plan", "--json").json["drift"] == []


def test_verify_finds_one_byte_and_repairs_it_while_readers_never_miss(used: Node) -> None:
    path = blobs(used)[0]
    flip(path)

    found = used.run("verify", "--json")
    assert found.code == 3
    assert [one["kind"] for one in found.json["damage"]] == ["blob"]
    assert used.states() == {"a:v1": "active"}
    repaired = used.run("verify", "--repair", "--json")

    assert repaired.code == 0, repaired
    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert used.run("verify", "--json").json["damage"] == []


def test_what_cannot_be_repaired_fails_and_is_not_served(used: Node, server: Server) -> None:
    flip(blobs(used)[0])
    server.files.clear()

    ran = used.run("verify", "--repair")

    assert ran.code == 3
    assert used.states() == {"a:v1": "failed"}
    assert active(used) == []


def test_verify_takes_a_share_the_longest_unchecked_first_at_the_rate_given(node: Node) -> None:
    node.publish(*(node.item(f"m{number}:v1", tiny(f"m{number}")) for number in range(10)))
    assert node.run("apply").code == 0

    first = node.run("verify", "--sample", "10%", "--limit", "100MiB", "--json").json
    assert first["checked"] == 1
    seen = [node.run("verify", "--sample", "30%", "--json").json["checked"] for _ in range(3)]

    assert seen == [3, 3, 3]
    assert node.run("verify", "--sample", "0%").code == 64


def test_a_lost_ledger_is_hashed_and_tested_again_and_nothing_is_fetched(used: Node, server: Server) -> None:
    one, two = used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b"))
    used.publish(one, two)
    assert used.run("apply").code == 0
    used.publish(one, two | {"state": "disabled"})
    assert used.run("apply").code == 0
    (used.store / "ledger.db").unlink()
    server.files.clear()

    planned = used.run("plan", "--json").json
    assert used.run("apply").code == 0

    assert planned["summary"]["download_bytes"] == 0
    assert {blob["op"] for blob in planned["blobs"]} == {"check"}
    assert used.states() == {"a:v1": "active", "b:v1": "inactive"}
    assert used.run("plan", "--detailed-exitcode").code == 0


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


def test_offline_touches_no_network_and_locked_fetches_no_lock(used: Node, asked: list[str]) -> None:
    held = (used.folder / "models.lock").read_bytes()
    (used.folder / "published.json").write_bytes(used.network.snapshot(used.item("b:v1", tiny("b"))))

    assert used.run("sync", "--locked").code == 0
    assert used.run("sync", "--offline").code == 0
    assert (used.folder / "models.lock").read_bytes() == held
    assert active(used) == ["a:v1"]
    assert used.run("lock").code == 0
    ran = used.run("sync", "--offline")

    assert ran.code == 3
    assert asked == []
    assert "offline" in model_of(used.run("status", "--json"), "b:v1")["last_error"]
    assert used.run("sync", "--locked").code == 0
    assert active(used) == ["b:v1"]


def test_a_lock_that_was_edited_is_refused_with_locked_too(used: Node) -> None:
    path = used.folder / "models.lock"
    path.write_bytes(path.read_bytes().replace(b"a:v1", b"b:v1"))

    ran = used.run("sync", "--locked")

    assert ran.code == 4
    assert "error[lock-mismatch]" in ran.err
    assert active(used) == ["a:v1"]
