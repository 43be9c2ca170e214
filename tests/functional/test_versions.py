"""
A node that an earlier version set up: its documents, its lock and its store, kept in ``tests/corpus`` as that version wrote them.

And the other way round: what a newer version wrote is said to be that, and is not changed.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.store import ledger_database, store_format
from tests.node import Node, Ran, run, tiny, traces

TOP = Path(__file__).parents[2]
CORPUS = TOP / "tests" / "corpus"
VERSIONS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())


class Kept:
    """A node of an earlier version, unpacked in *folder*."""

    def __init__(self, version: str, folder: Path) -> None:
        self.kept, self.folder = CORPUS / version, folder
        folder.mkdir()
        for name in ("root.json", "snapshot.json", "models.lock"):
            shutil.copy(self.kept / name, folder)
        (folder / "reconcile.toml").write_text('[store]\nreserve = "1MiB"\n')
        with tarfile.open(self.kept / "store.tar.gz") as archive:
            archive.extractall(folder, filter="tar")

    def run(self, *arguments: str) -> Ran:
        return run(*arguments, "--config", str(self.folder / "reconcile.toml"))


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    return Kept(request.param, tmp_path / "node")


def number(store: Path) -> int:
    with sqlite3.connect(store / "ledger.db") as ledger:
        found: int = ledger.execute("PRAGMA user_version").fetchone()[0]
    ledger.close()
    return found


def test_a_snapshot_of_an_earlier_version_compiles_to_the_very_lock_that_it_wrote(kept: Kept) -> None:
    assert kept.run("lock", "--check").code == 0
    assert kept.run("lock").code == 0
    assert (kept.folder / "models.lock").read_bytes() == (kept.kept / "models.lock").read_bytes()


def test_a_store_of_an_earlier_version_is_read_without_a_trace(kept: Kept) -> None:
    before = traces(kept.folder)
    states = {model["id"]: model["state"] for model in kept.run("status", "--json").json["models"]}
    assert states == {"a:v1": "active", "b:v1": "absent", "c:v1": "failed"}
    made = kept.run("plan", "--json").json
    assert {one["id"]: one["op"] for one in made["models"]}["a:v1"] in {"keep", "retest"}
    assert {one["digest"]: one["op"] for one in made["blobs"] if one["op"] == "fetch"} == {}
    assert kept.run("incidents", "--json").json[0]["kind"] == "smoke-failed"
    assert traces(kept.folder) == before


def test_a_store_of_an_earlier_version_is_taken_over_as_it_is(kept: Kept) -> None:
    before = (kept.folder / "store" / "active" / "models" / "a" / "v1" / "a.gguf").read_bytes()
    tree = kept.run("status", "--json").json["active_digest"]
    assert kept.run("verify").code == 0
    assert kept.run("apply", "--offline", "--yes", "--except", "c:v1").code in {0, 3}
    assert kept.run("status", "--json").json["active_digest"] == tree
    assert (kept.folder / "store" / "active" / "models" / "a" / "v1" / "a.gguf").read_bytes() == before
    assert number(kept.folder / "store") == ledger_database.FORMAT
    assert (kept.folder / "store" / "format").read_text() == f"{store_format.FORMAT}\n"
    assert kept.run("incidents", "--json").json
    assert not (kept.folder / "store" / "ledger.db.damaged").exists()


#: A step that a later version may have.
STEP = "CREATE TABLE later (x); INSERT INTO later SELECT id FROM models; DELETE FROM facts"
KILLED = """
import os, sqlite3, sys
from pathlib import Path
from reconciler.store import ledger_database
connect, left = sqlite3.connect, [int(sys.argv[2])]
def counted(*words, **given):
    made = connect(*words, **given)
    def step(statement):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
    made.set_trace_callback(step)
    return made
sqlite3.connect = counted
ledger_database.STEPS += (sys.argv[3],)
ledger_database.FORMAT += 1
ledger_database.open_writable(Path(sys.argv[1])).close()
"""


def test_killed_at_any_statement_of_the_migration_the_ledger_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    kept = Kept(VERSIONS[0], tmp_path / "node")
    path, whole = kept.folder / "store" / "ledger.db", (kept.folder / "store" / "ledger.db").read_bytes()
    for count in range(1, 100):
        path.with_name("ledger.db-journal").unlink(missing_ok=True)
        path.write_bytes(whole)
        ran = subprocess.run([sys.executable, "-c", KILLED, str(path), str(count), STEP], cwd=TOP, capture_output=True, timeout=60)
        with sqlite3.connect(path) as ledger:
            found = ledger.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in ledger.execute("SELECT name FROM sqlite_master")}
            assert ledger.execute("SELECT count(*) FROM models").fetchone()[0] > 0
        ledger.close()
        assert ("later" in tables) == (found == ledger_database.FORMAT + 1), (count, found)
        again = subprocess.run([sys.executable, "-c", KILLED, str(path), "0", STEP], cwd=TOP, capture_output=True, timeout=60)
        assert (again.returncode, number(path.parent)) == (0, ledger_database.FORMAT + 1)
        if ran.returncode == 0:
            break
    assert ran.returncode == 0, ran.stderr
    assert count > 5


def test_a_migration_that_fails_changes_nothing(used: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_database, "STEPS", (*ledger_database.STEPS, "CREATE TABLE later (x); INSERT INTO nowhere VALUES (1)"))
    monkeypatch.setattr(ledger_database, "FORMAT", ledger_database.FORMAT + 1)
    assert used.run("apply", "--yes").code == 1
    monkeypatch.undo()
    with sqlite3.connect(used.store / "ledger.db") as ledger:
        assert not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'later'").fetchall()
    ledger.close()
    assert number(used.store) == ledger_database.FORMAT
    assert used.run("apply", "--yes").code == 0


def newer_ledger(store: Path) -> None:
    with sqlite3.connect(store / "ledger.db") as ledger:
        ledger.execute(f"PRAGMA user_version = {ledger_database.FORMAT + 1}")
    ledger.close()


def newer_store(store: Path) -> None:
    (store / "format").write_text(f"{store_format.FORMAT + 1}\n")


@pytest.mark.parametrize("make", [newer_ledger, newer_store])
@pytest.mark.parametrize("command", ["plan", "apply --yes", "sync", "status", "verify", "gc", "rollback", "lock"])
def test_what_a_newer_version_wrote_is_refused_with_what_to_do_and_not_changed(used: Node, make: object, command: str) -> None:
    assert callable(make)
    make(used.store)
    before = traces(used.store)
    name, *options = command.split()
    ran = used.run(name, *options)
    assert (ran.code, "error[store-newer]" in ran.err) == (1, True), ran
    assert "hint: use that version or a newer one; a store is not converted back" in ran.err
    after = traces(used.store)
    assert {path: seen for path, seen in after.items() if path != "."} == {path: seen for path, seen in before.items() if path != "."}


@pytest.mark.parametrize("make", [newer_ledger, newer_store])
def test_the_doctor_names_a_newer_store(used: Node, make: object) -> None:
    assert callable(make)
    make(used.store)
    ran = used.run("doctor")
    assert "newer version" in ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err


def test_a_new_store_has_the_numbers_of_this_version(node: Node, server: Server) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply", "--yes").code == 0
    assert (number(node.store), store_format.read(node.context().layout)) == (ledger_database.FORMAT, store_format.FORMAT)


@pytest.mark.parametrize("text", [b"", b"x", b"-1\n", b"99999999999\n", b"2\n2\n", b"\xff"])
def test_a_damaged_number_is_mended_and_refuses_nothing(used: Node, text: bytes) -> None:
    (used.store / "format").write_bytes(text)
    assert used.run("apply", "--yes").code == 0
    assert json.loads(used.run("status", "--json").out)["models"][0]["state"] == "active"
