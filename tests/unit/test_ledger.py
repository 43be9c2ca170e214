"""The ledger: bounded, read without a trace, put aside when it is damaged, and no place for forged lines."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reconciler.core.errors import DiskFull, StoreError
from reconciler.core.events import Incident
from reconciler.core.state import Passed, Record, TreeSeen
from reconciler.core.trust import TrustState
from reconciler.ports import TestReport
from reconciler.store import ledger as ledgers
from reconciler.store import test_facts
from reconciler.store.ledger import Change, Ledger, Listing, Verification
from tests.crash.scenario import KILLED, child
from tests.storenode import traces
from tests.twins.content import name_of

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
INCIDENT = Incident(kind="hash-mismatch", model="a:v1", blob="b", source="s", detail="d")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.writing(path) as writing:
        yield writing


# -- incidents and history -------------------------------------------------------------------------


def test_the_same_incident_within_a_day_is_counted_and_not_repeated(ledger: Ledger) -> None:
    for minutes in range(0, 60, 5):
        ledger.log_incident(INCIDENT, NOW + timedelta(minutes=minutes))
    ledger.log_incident(Incident(kind="hash-mismatch", model="b:v1"), NOW)

    first, second = ledger.incidents()
    assert (first.times, first.at, first.last_at) == (12, NOW, NOW + timedelta(minutes=55))
    assert (second.model, second.times) == ("b:v1", 1)
    assert ledger.incident_totals() == {"hash-mismatch": 13}


@pytest.mark.parametrize("refused", ["INSERT INTO incidents", "DELETE FROM incidents", "COMMIT"])
def test_an_incident_is_written_as_a_whole_or_not_at_all(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    ledger.log_incident(INCIDENT, NOW)
    write = Ledger._write

    def full(self: Ledger, statement: str, values: Iterable[object]) -> None:
        if statement.startswith(refused):
            raise DiskFull("no room")
        write(self, statement, values)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_write", full)
        with pytest.raises(DiskFull):
            ledger.log_incident(Incident(kind="hash-mismatch", model="b:v1"), NOW)

    assert [one.model for one in ledger.incidents()] == ["a:v1"]
    assert ledger.incident_totals() == {"hash-mismatch": 1}
    ledger.log_incident(Incident(kind="hash-mismatch", model="c:v1"), NOW)
    assert ledger.incident_totals() == {"hash-mismatch": 2}


def test_the_same_incident_after_a_day_is_told_again(ledger: Ledger) -> None:
    ledger.log_incident(INCIDENT, NOW)
    ledger.log_incident(INCIDENT, NOW + timedelta(hours=25))

    assert len(ledger.incidents()) == 2


def test_a_test_that_could_not_be_made_is_told_until_one_is_made_and_gone_when_the_model_is(ledger: Ledger) -> None:
    unable, made = TestReport(verdict="unable", reason="no sandbox"), TestReport(verdict="bad", reason="it is bad")
    ledger.tested("a:v1", unable, None, NOW)
    ledger.tested("b:v1", unable, None, NOW)

    assert test_facts.untested(ledger, "a:v1") == (unable, NOW)
    assert ledger.report("a:v1") is None
    ledger.tested("a:v1", made, None, NOW)
    ledger.forget("b:v1")
    assert (test_facts.untested(ledger, "a:v1"), test_facts.untested(ledger, "b:v1")) == (None, None)
    assert ledger.report("a:v1") == (made, NOW)


def test_what_a_command_line_has_served_is_bounded_and_the_newest_stay(ledger: Ledger) -> None:
    for number in range(20):
        tree = name_of(str(number).encode())
        passed = Passed(tree=tree, smoke="s", engine="vllm", engine_version="1", device="cpu", at=NOW)
        ledger.tested("a:v1", TestReport(verdict="passed", command="one"), passed, NOW)

    assert ledger.served("one") == {name_of(str(number).encode()) for number in range(4, 20)}
    assert ledger.served("another") == frozenset()


def test_incidents_and_history_are_bounded_and_the_oldest_go(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_INCIDENTS", 10)
    monkeypatch.setattr(ledgers, "MAX_HISTORY", 10)
    for number in range(25):
        ledger.log_incident(Incident(kind="source-failed", detail=str(number)), NOW)
        ledger.record_change(Change(at=NOW, generation=number, actor="apply", what="w", lock="l", added=("a",), removed=()))

    assert [one.detail for one in ledger.incidents(99)] == [str(number) for number in range(15, 25)]
    assert [one.generation for one in ledger.history(99)] == list(range(15, 25))
    assert [one.generation for one in ledger.history(3)] == [22, 23, 24]
    assert ledger.incident_totals() == {"source-failed": 25}


@pytest.mark.parametrize("text", ["\x1b[31mred", "line\nforged", "a\rb", "\u202eevil", "\x00", "tab\t", "\u2028"])
def test_no_servers_words_forge_a_line_or_a_colour(ledger: Ledger, text: str) -> None:
    ledger.log_incident(Incident(kind="source-failed", detail=text), NOW)

    (found,) = ledger.incidents()
    assert found.detail.isprintable()


def test_a_long_text_is_cut(ledger: Ledger) -> None:
    ledger.log_incident(Incident(kind="source-failed", detail="x" * 10_000), NOW)

    (found,) = ledger.incidents()
    assert found.detail == "x" * ledgers.MAX_TEXT + "…"


# -- what is remembered ----------------------------------------------------------------------------


def test_everything_is_there_after_a_restart(path: Path) -> None:
    seen = TreeSeen(digest="t", recipe="r", blobs=("b",), bytes=3)
    listing = (Listing(path="m", digest="b", size=3),)
    verification = Verification(size=3, inode=2**63 - 1, mtime_ns=2**62, verified_at=NOW)
    with Ledger.writing(path) as writing:
        writing.record_verified({"b": verification})
        writing.record_tree(seen, listing)
        writing.put(Record(id="a:v1", state="active"))
        writing.tested("a:v1", TestReport(verdict="bad", reason="no"), None, NOW)
        writing.set_fact("floor", TrustState(version=3))

    with Ledger.reading(path) as reading:
        assert reading.verifications() == {"b": verification}
        assert reading.trees() == {"r": ("t", listing)}
        assert reading.report("a:v1") == (TestReport(verdict="bad", reason="no"), NOW)
        assert reading.report("b:v1") is None
        assert reading.trust_state() == TrustState(version=3)


def test_what_is_forgotten_is_gone(ledger: Ledger) -> None:
    ledger.record_verified({"b": Verification(size=3, inode=1, mtime_ns=1, verified_at=NOW)})
    ledger.record_tree(TreeSeen(digest="t", recipe="r", blobs=(), bytes=0), ())
    ledger.set_fact("key", 1)

    ledger.forget_blobs(["b"])
    ledger.forget_trees(["t"])
    ledger.set_fact("key", None)

    assert (ledger.verifications(), ledger.trees(), ledger.fact("key", int)) == ({}, {}, None)


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE models SET record = 'not json'", "UPDATE models SET record = x'00ff'", "UPDATE models SET passed = '{}'",
        "UPDATE blobs SET verified_at = 'yesterday'", "UPDATE trees SET listing = '[1]'", "UPDATE facts SET value = '\"x\"'",
    ],
)  # fmt: skip
def test_a_spoiled_row_is_as_good_as_forgotten(path: Path, spoil: str) -> None:
    with Ledger.writing(path) as writing:
        writing.put(Record(id="a:v1", state="active"))
        writing.tested("a:v1", TestReport(verdict="bad"), None, NOW)
        writing.record_verified({"b": Verification(size=3, inode=1, mtime_ns=1, verified_at=NOW)})
        writing.record_tree(TreeSeen(digest="t", recipe="r", blobs=(), bytes=0), ())
        writing.set_fact("floor", TrustState(version=3))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(spoil)
    connection.close()

    with Ledger.reading(path) as reading:
        assert set(reading.records()) <= {"a:v1"}
        assert reading.passed() == {}
        assert len(reading.verifications()) == 1
        assert set(reading.trees()) <= {"r"}
        assert reading.trust_state() in {None, TrustState(version=3)}


# -- opening ---------------------------------------------------------------------------------------


def test_reading_leaves_no_trace(path: Path, ledger: Ledger) -> None:
    ledger.put(Record(id="a:v1", state="active"))
    before = traces(path.parent)

    with Ledger.reading(path) as reading:
        assert set(reading.records()) == {"a:v1"}
        assert traces(path.parent) == before
    with Ledger.reading(path.parent / "missing.db") as reading:
        assert reading.records() == {}

    assert traces(path.parent) == before


def test_a_reader_cannot_write(path: Path, ledger: Ledger) -> None:
    ledger.put(Record(id="a:v1", state="active"))
    with Ledger.reading(path) as reading, pytest.raises(StoreError):
        reading.put(Record(id="a:v1", state="failed"))


def test_a_closed_ledger_refuses(path: Path) -> None:
    with Ledger.writing(path) as writing:
        pass

    with pytest.raises(StoreError):
        writing.put(Record(id="a:v1", state="active"))


def hot(path: Path) -> None:
    """Leave a ledger as a process does that died in the middle of a transaction: half written, with a hot journal."""

    def die() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("PRAGMA cache_spill = 1")
        connection.execute("BEGIN IMMEDIATE")
        for number in range(2000):
            connection.execute("INSERT INTO facts VALUES (?, ?)", (f"torn{number}", b"x" * 500))
        os._exit(KILLED)

    assert child(die) == KILLED
    assert path.with_name("ledger.db-journal").stat().st_size > 0


def test_a_hot_journal_is_read_without_writing_and_rolled_back_by_the_next_writer(path: Path) -> None:
    with Ledger.writing(path) as writing:
        writing.put(Record(id="a:v1", state="active"))
    hot(path)
    before = traces(path.parent)

    with Ledger.reading(path) as reading:
        assert set(reading.records()) == {"a:v1"}
        assert reading.fact("torn7", str) is None
    assert traces(path.parent) == before

    with Ledger.writing(path) as writing:
        assert set(writing.records()) == {"a:v1"}
        assert writing.fact("torn7", str) is None
    assert not path.with_name("ledger.db-journal").exists()


def test_a_journal_without_its_ledger_brings_nothing_back(path: Path) -> None:
    with Ledger.writing(path) as writing:
        writing.put(Record(id="a:v1", state="active"))
    hot(path)
    path.unlink()

    with Ledger.writing(path) as writing:
        assert writing.records() == {}


def test_a_damaged_ledger_is_put_aside_once_and_said_to_be(path: Path) -> None:
    for data in (b"garbage" * 1000, b"other garbage" * 1000):
        path.write_bytes(data)
        with Ledger.writing(path) as writing:
            assert writing.records() == {}
            (found,) = writing.incidents()
            assert found.kind == "crash-recovered"

    assert path.with_name("ledger.db.damaged").read_bytes() == b"other garbage" * 1000
    assert sorted(found.name for found in path.parent.iterdir()) == ["ledger.db", "ledger.db.damaged"]


def test_a_damaged_ledger_reads_as_an_empty_one(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)

    with Ledger.reading(path) as reading:
        assert (reading.records(), reading.trust_state()) == ({}, None)


def test_a_full_disk_is_called_by_its_name(path: Path) -> None:
    with Ledger.writing(path) as writing:
        assert writing._connection is not None
        writing._connection.execute("PRAGMA max_page_count = 20")
        with pytest.raises(DiskFull):
            writing.set_fact("large", "x" * 1_000_000)


def test_a_readers_path_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c%20d e"
    folder.mkdir()
    with Ledger.writing(folder / "ledger.db") as writing:
        writing.put(Record(id="a:v1", state="active"))

    with Ledger.reading(folder / "ledger.db") as reading:
        assert set(reading.records()) == {"a:v1"}


def test_readers_are_not_in_the_writers_way(path: Path, ledger: Ledger) -> None:
    with Ledger.reading(path) as reading:
        for number in range(50):
            ledger.put(Record(id=f"m{number}:v1", state="active"))
            assert len(reading.records()) == number + 1


def test_a_copy_of_the_store_has_a_ledger_that_reads(path: Path, ledger: Ledger, tmp_path: Path) -> None:
    ledger.put(Record(id="a:v1", state="active"))
    shutil.copyfile(path, tmp_path / "copy.db")

    with Ledger.reading(tmp_path / "copy.db") as reading:
        assert set(reading.records()) == {"a:v1"}


def test_a_link_in_the_place_of_the_ledger_is_not_written_through(tmp_path: Path) -> None:
    theirs, path = tmp_path / "theirs.db", tmp_path / "ledger.db"
    with Ledger.writing(theirs):
        pass
    before = theirs.read_bytes()
    path.symlink_to(theirs)

    with Ledger.writing(path) as ledger:
        ledger.set_fact("ours", 1)

    assert theirs.read_bytes() == before
    assert not path.is_symlink()


def test_a_link_to_nowhere_is_a_damaged_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.symlink_to(tmp_path / "nowhere")

    with Ledger.reading(path) as ledger:
        assert ledger.damaged


def test_what_the_database_refuses_says_what_to_do() -> None:
    from reconciler.store import ledger_database

    refused = ledger_database.store_error(sqlite3.DatabaseError("file is not a database"), None)
    assert refused.hint == "run `reconcile apply`: it puts a damaged ledger aside"
