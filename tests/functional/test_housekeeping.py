"""What a node does with what it has: collects what nobody needs, and verifies what it holds."""

from __future__ import annotations

import hashlib
import io
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from reconciler.commands import apply, maintenance, verify
from reconciler.core.events import HashProgress
from reconciler.demo.server import Server
from reconciler.report.terminal import ProgressBars
from tests.node import Node, deaf, flip, later, tiny, traces
from tests.twins.node import EventLog

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

    with later(hours=23) as clock:
        assert maintenance.gc(used.context(clock)) == ()
    with later(hours=25) as clock:
        assert [one.kind for one in maintenance.garbage(used.context(clock))] == ["tree", "blob"]
        maintenance.gc(used.context(clock))

    assert len(used.blobs()) == 1


def test_a_clock_that_is_set_ahead_takes_no_bytes_before_their_grace(used: Node) -> None:
    used.configure("generations = 1\n")
    used.publish(used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0

    ahead = datetime.now(UTC) + timedelta(days=20)
    apply.apply(used.context(lambda: ahead), deaf)
    assert len(used.blobs()) == 2
    assert maintenance.gc(used.context(lambda: ahead + timedelta(days=20))) == ()
    assert maintenance.gc(used.context()) == ()


def test_gc_keeps_what_grace_and_kept_generations_and_the_lock_need(used: Node) -> None:
    off = used.item("c:v1", tiny("c"))
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")), off)
    assert used.run("apply").code == 0
    used.publish(used.item("a:v1", tiny("anew")), off | {"state": "disabled"})  # b is in its grace, a's old content in a kept generation
    assert used.run("apply").code == 0
    before = used.blobs()
    assert len(before) == 4
    reader = (used.store / "active/models/a/v1/a.gguf").open("rb")

    assert used.run("gc", "--json").json["bytes"] == 0
    assert used.blobs() == before
    with later(hours=25) as clock:
        apply.apply(used.context(clock), deaf)
        maintenance.gc(used.context(clock))

    kept = {path.name for path in used.blobs()}
    assert kept == {hashlib.sha256(tiny(seed)).hexdigest() for seed in ("anew", "c")}
    with reader:
        assert reader.read() == tiny("anew")


def test_a_reader_that_holds_a_file_open_reads_on_after_it_is_deleted(used: Node) -> None:
    used.configure('grace = "0s"\n')
    with (used.store / "active/models/a/v1/a.gguf").open("rb") as reader:
        head = reader.read(10)
        used.publish()
        assert used.run("apply").code == 0
        assert used.blobs() == []

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
    assert [one.name for one in maintenance.garbage(used.context(lambda: old)) if one.kind == "partial"] == [wanted.name]


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
    path = used.blobs()[0]
    flip(path)

    found = used.run("verify", "--json")
    assert found.code == 3
    assert [one["kind"] for one in found.json["damage"]] == ["blob"]
    assert used.states() == {"a:v1": "active"}
    repaired = used.run("verify", "--repair", "--json")

    assert repaired.code == 0, repaired
    assert (used.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert used.run("verify", "--json").json["damage"] == []


def test_what_cannot_be_repaired_is_not_served(used: Node, server: Server) -> None:
    flip(used.blobs()[0])
    server.files.clear()

    ran = used.run("verify", "--repair")

    assert ran.code == 3
    assert used.states() == {"a:v1": "pending"}
    assert used.active() == []


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


def test_verify_says_how_far_it_is(used: Node) -> None:
    log = EventLog()

    verify.verify(used.context(), log, progress=True)

    shown = [(one.done, one.total) for one in log.of(HashProgress)]
    assert shown[-1] == (len(tiny("a")), len(tiny("a")))
    assert shown == sorted(shown)


def test_a_terminal_shows_how_far_verify_is() -> None:
    seen = io.StringIO()
    with ProgressBars(Console(file=seen, force_terminal=True, width=100)) as people:
        people(HashProgress(done=1 << 20, total=4 << 20))
        people._progress.refresh()
        assert "hashing" in seen.getvalue()
        assert "1.0 MiB of 4.0 MiB" in seen.getvalue()
        people(HashProgress(done=4 << 20, total=4 << 20))
        assert not people._tasks


def test_a_file_that_is_no_blob_among_the_blobs_is_reported_and_neither_used_nor_deleted(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    (blob,) = node.blobs()
    strange = [blob.with_name("notes.txt"), node.store / "blobs" / "sha256" / "00" / blob.name, node.store / "trees" / "x"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept by a person")

    ran = node.run("verify", "--json")

    assert ran.code == 0
    assert ran.json["unexpected"] == [str(path) for path in sorted(strange[:2]) + strange[2:]]
    assert ran.json["damage"] == []
    ran = node.run("verify")
    assert [path for path in strange if f"{path.parent}/{path.name[:12]}" not in ran.out] == []
    assert ran.out.count("is no blob and no tree") == len(strange)
    assert node.run("gc", "--dry-run", "--json").json["items"] == []
    assert [node.run(command).code for command in ("gc", "plan", "apply", "status")] == [0, 0, 0, 0]
    assert all(path.read_text() == "kept by a person" for path in strange)
    assert node.states() == {"a:v1": "active"}


def test_what_nobody_needs_is_deleted_although_its_like_is_in_a_wrong_folder(node: Node) -> None:
    node.configure('grace = "0s"\n')
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    copies = [node.store / "blobs" / "sha256" / "00" / blob.name for blob in node.blobs()]
    copies[0].parent.mkdir(exist_ok=True)
    for copy in copies:
        copy.write_text("a copy")
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0

    assert node.run("gc", "--dry-run", "--json").json["items"] == []
    assert node.run("gc").code == 0
    assert node.run("verify", "--json").json["unexpected"] == [str(copy) for copy in sorted(copies)]
