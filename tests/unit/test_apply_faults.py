"""What a run does with damage, a lost ledger, no space and models that the node cannot run, on a node made of memory twins."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.core.errors import DiskFull
from reconciler.core.node import NodeFacts
from tests.twins.content import Files, changed, name_of
from tests.twins.node import FACTS, POLICY, MemoryNode

A: Files = {"a.gguf": b"aaaa"}
B: Files = {"b.gguf": b"bbbb"}
C: Files = {"c.gguf": b"cccc"}


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode()


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["seen by the plan", "found by the hash"])
def test_a_damaged_blob_is_repaired_while_its_model_is_active(node: MemoryNode, known: bool) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.damage(b"aaaa", known=known)
    assert node.ops(lock) == {"a:v1": "repair" if known else "retest"}

    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert all("a:v1" in made.entries for made in node.generations.sequence)
    assert node.ops(lock) == {}


@pytest.mark.parametrize("known", [True, False], ids=["seen by the plan", "found by the hash"])
@pytest.mark.parametrize("ledger", ["there", "lost"])
def test_a_damaged_blob_that_nobody_has_any_more_is_not_served(node: MemoryNode, known: bool, ledger: str) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("c:v1", C))
    node.run(lock)
    node.damage(b"aaaa", known=known)
    node.internet.remove(b"aaaa")
    if ledger == "lost":
        node.lose_ledger()
        node.damaged.clear()

    outcome = node.run(lock)

    assert set(node.active()) == {"c:v1"}
    assert (outcome.unfetched, outcome.failed) == (("a:v1",), ())
    assert node.ledger.records["a:v1"].state == "pending"


# -- a lost memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["passed", "unable", "bad"])
def test_a_lost_ledger_costs_hashing_and_testing_and_no_download(node: MemoryNode, verdict: str) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", {}, boxed=B))
    node.run(lock)
    asked = list(node.internet.asked)
    node.lose_ledger()
    node.tester.verdicts["a:v1"] = (verdict, "no")
    assert node.plan(lock).summary["download_bytes"] == 0

    node.run(lock)

    assert node.internet.asked == asked
    assert set(node.active()) == ({"b:v1"} if verdict == "bad" else {"a:v1", "b:v1"})
    assert (node.ops(lock) == {}) == (verdict == "passed")


# -- grace -----------------------------------------------------------------------------------------


def test_an_unlisted_model_is_free_to_come_back_within_its_grace(node: MemoryNode) -> None:
    node.policy = changed(POLICY, grace_seconds=3600.0)
    lock = node.lock(node.item("a:v1", A), node.item("c:v1", C))
    node.run(lock)
    without = node.lock(node.item("c:v1", C))
    node.run(without)
    assert set(node.active()) == {"c:v1"}
    assert not node.plan(without).changes
    assert "removed-unlisted" in node.heard.kinds()

    node.clock.forward(minutes=59)
    node.run(lock)

    assert set(node.active()) == {"a:v1", "c:v1"}
    assert len(node.internet.asked) == 2
    assert node.ledger.records["a:v1"].unlisted_since is None


def test_an_unlisted_model_is_forgotten_after_its_grace(node: MemoryNode) -> None:
    node.policy = changed(POLICY, grace_seconds=3600.0)
    node.run(node.lock(node.item("a:v1", A), node.item("c:v1", C)))
    lock = node.lock(node.item("c:v1", C))
    node.run(lock)
    node.clock.forward(minutes=61)
    assert node.ops(lock) == {"a:v1": "remove"}

    node.run(lock)

    assert "a:v1" not in node.ledger.records
    assert not node.plan(lock).changes


# -- room ------------------------------------------------------------------------------------------


def test_what_the_disk_has_no_room_for_is_refused_before_the_first_byte(node: MemoryNode) -> None:
    node.facts = changed(FACTS, disk_free_bytes=10)
    node.policy = changed(POLICY, reserve_bytes=8)

    with pytest.raises(DiskFull):
        node.run(node.lock(node.item("a:v1", A)))

    assert node.internet.asked == []
    assert not node.ledger.running


def test_what_may_not_serve_stops_and_what_nobody_needs_goes_although_the_disk_is_full(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A), node.item("c:v1", C)))
    node.facts = changed(FACTS, disk_free_bytes=0)

    with pytest.raises(DiskFull):
        node.run(node.lock(node.item("b:v1", B), node.item("c:v1", C)))

    assert set(node.active()) == {"c:v1"}
    assert "a:v1" not in node.ledger.records  # no grace here
    assert node.housekeeping.swept == 2


# -- nodes that cannot -----------------------------------------------------------------------------

UNFIT: dict[str, dict[str, Any]] = {
    "engine": {"runtime": {"engine": "other"}},
    "version": {"runtime": {"engine": "llama-cpp", "version": ">=9"}},
    "gpu": {"gpu_memory": 1 << 40},
    "memory": {"memory": 1 << 50},
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_model_that_this_node_cannot_run_is_no_change_and_logged_once(node: MemoryNode, what: str) -> None:
    lock = node.lock(node.item("a:v1", A, **UNFIT[what]), node.item("c:v1", C))

    for _ in range(3):
        outcome = node.run(lock)

    assert (outcome.failed, set(node.active())) == ((), {"c:v1"})
    assert node.heard.kinds() == ["incompatible"]
    assert not node.plan(lock).changes
    assert node.internet.asked == [name_of(b"cccc")]
    assert node.ledger.records["a:v1"].state == "absent"


def test_what_serves_goes_on_when_the_node_no_longer_fits(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.facts = NodeFacts(disk_free_bytes=1 << 40)

    node.run(lock)

    assert node.active() == {"a:v1": A}


# -- only and except -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [changed(POLICY, only=("a:v1",)), changed(POLICY, excluded=("b:v1",))], ids=["only", "except"])
def test_what_is_left_out_is_left_alone(node: MemoryNode, policy: object) -> None:
    node.policy = policy  # type: ignore[assignment]
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B))

    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert [change.reason.partition(":")[0] for change in node.plan(lock).models] == ["up-to-date", "excluded"]
    node.policy = POLICY
    node.run(lock)
    assert set(node.active()) == {"a:v1", "b:v1"}
