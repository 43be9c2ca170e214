"""One suite for the ledger on a disk and its memory twin: what is put is there, also after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from reconciler.core.state import Passed, Record
from reconciler.ports import Ledger as Port
from reconciler.ports import TestReport
from reconciler.store.ledger import Ledger
from tests.twins.content import name_of
from tests.twins.store import MemoryLedger

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
RECORD = Record(id="a:v1", state="active", recipe="r", blobs=("x",), reason="up-to-date: nothing to do", since=NOW)
PASSED = Passed(tree=name_of(b"t"), smoke=name_of(b"s"), engine="llama-cpp", engine_version="0.3.36", device="cpu", at=NOW)
REPORT = TestReport(verdict="passed", tokens=4)

#: Records, passed tests, and whether a run is going on.
Memory = tuple[dict[str, Record], dict[str, Passed], bool]
Look = Callable[[], Memory]


@pytest.fixture(params=["memory", "disk"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Port, Look]]:
    if request.param == "memory":
        twin = MemoryLedger()
        yield twin, lambda: (twin.records, twin.passes, twin.running)
        return

    def look() -> Memory:
        with Ledger.reading(tmp_path / "ledger.db") as reading:
            return reading.records(), reading.passed(), bool(reading.fact("running", bool))

    with Ledger.writing(tmp_path / "ledger.db") as writing:
        yield writing, look


def test_a_record_is_remembered_and_replaced(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.put(Record(id="a:v1", state="pending"))
    port.put(RECORD)

    assert look()[0] == {"a:v1": RECORD}


def test_forgetting_takes_the_test_with_it(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.put(RECORD)
    port.tested("a:v1", REPORT, PASSED, NOW)

    port.forget("a:v1")
    port.forget("a:v1")

    assert look() == ({}, {}, False)


def test_a_passed_test_is_remembered_and_a_failed_one_takes_it_back(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.put(RECORD)
    port.tested("a:v1", REPORT, PASSED, NOW)
    assert look()[:2] == ({"a:v1": RECORD}, {"a:v1": PASSED})

    port.tested("a:v1", TestReport(verdict="bad", reason="no"), None, NOW)

    assert look()[:2] == ({"a:v1": RECORD}, {})


def test_a_test_that_could_not_be_made_takes_no_passed_one_back(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.put(RECORD)
    port.tested("a:v1", REPORT, PASSED, NOW)
    port.tested("a:v1", TestReport(verdict="unable", reason="the GPU is busy"), None, NOW)

    assert look() == ({"a:v1": RECORD}, {"a:v1": PASSED}, False)


def test_a_test_of_a_model_without_a_record_makes_it_pending(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.tested("a:v1", REPORT, PASSED, NOW)

    assert look()[0]["a:v1"].state == "pending"


def test_putting_a_record_keeps_its_test(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.tested("a:v1", REPORT, PASSED, NOW)
    port.put(RECORD)

    assert look()[1] == {"a:v1": PASSED}


def test_a_run_that_began_is_remembered_until_it_ended(ledger: tuple[Port, Look]) -> None:
    port, look = ledger
    port.set_running(running=True)
    assert look()[2]

    port.set_running(running=False)

    assert not look()[2]
