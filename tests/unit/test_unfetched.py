"""That no source answered is no failure of the model (SPEC 8), on a node made of memory twins."""

from __future__ import annotations

import pytest

from tests.twins.content import Files, name_of
from tests.twins.node import MemoryNode

A: Files = {"a.gguf": b"one"}
NEW: Files = {"a.gguf": b"two"}
B: Files = {"b.gguf": b"bbb"}


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode()


def test_a_model_that_no_source_gives_stays_absent_and_the_others_are_installed(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A, serve=False), node.item("b:v1", B))

    outcome = node.run(lock)

    assert (outcome.unfetched, outcome.failed, outcome.untested) == (("a:v1",), (), ())
    record = node.ledger.records["a:v1"]
    assert (record.state, record.attempts, record.last_error) == ("absent", 0, "")
    assert record.reason.startswith("source-failed: ")
    assert node.housekeeping.quarantined == []
    assert node.heard.kinds() == ["source-failed"]
    assert node.active() == {"b:v1": B}


def test_it_is_tried_again_in_each_run_and_no_attempt_is_counted(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A, serve=False))
    for _ in range(3):
        node.run(lock)
        assert node.ops(lock) == {"a:v1": "install"}
        assert node.ledger.records["a:v1"].attempts == 0
    assert node.internet.asked == [name_of(A["a.gguf"])] * 3
    assert next(change.reason for change in node.plan(lock).models).startswith("source-failed: ")

    node.internet.add(A["a.gguf"])
    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert node.ledger.records["a:v1"].reason.startswith("up-to-date")


def test_an_older_copy_serves_on_while_no_source_gives_the_new_content(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", NEW, serve=False))

    for _ in range(3):
        assert node.run(lock).unfetched == ("a:v1",)
        assert node.active() == {"a:v1": A}
        change = node.plan(lock).models[0]
        assert (change.op, change.from_, change.reason.partition(":")[0]) == ("install", "active", "source-failed")

    node.internet.add(NEW["a.gguf"])
    node.run(lock)
    assert node.active() == {"a:v1": NEW}


def test_a_damaged_copy_that_no_source_mends_stops_serving_and_comes_back_with_its_source(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.damage(A["a.gguf"])
    node.internet.remove(A["a.gguf"])

    for _ in range(2):
        assert node.run(lock).unfetched == ("a:v1",)
        assert node.active() == {}
        assert node.ledger.records["a:v1"].state == "pending"
        assert node.ledger.records["a:v1"].attempts == 0

    node.internet.add(A["a.gguf"])
    node.run(lock)
    assert node.active() == {"a:v1": A}


def test_wrong_bytes_are_a_failure_and_stay_one_while_no_source_answers(node: MemoryNode) -> None:
    item = node.item("a:v1", A)
    lock = node.lock(item)
    url = item["artifacts"][0]["urls"][0]
    node.internet.pages[url] = b"eno"
    assert node.run(lock).failed == ("a:v1",)
    assert node.ledger.records["a:v1"].attempts == 1

    del node.internet.pages[url]
    assert node.run(lock).unfetched == ("a:v1",)

    record = node.ledger.records["a:v1"]
    assert (record.state, record.attempts) == ("failed", 1)
    assert record.last_error.startswith("hash-mismatch: ")


def test_an_update_that_no_source_gives_leaves_what_it_replaces_serving(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", A, state="retired"), node.item("a:v2", NEW, serve=False, replaces=["a:v1"]))

    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert node.ledger.records["a:v2"].state == "absent"
