"""An update is never an outage: what is replaced serves until what replaces it does, on a node made of memory twins."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from reconciler.core import plan
from reconciler.core.errors import BadEnvelope
from reconciler.core.events import Swapped
from reconciler.core.lock import Lock
from tests.twins.content import Files, changed, name_of
from tests.twins.node import POLICY, MemoryNode

V1: Files = {"a.gguf": b"one"}
V2: Files = {"a.gguf": b"two"}
V3: Files = {"a.gguf": b"three"}


@pytest.fixture
def node() -> MemoryNode:
    """Return a node on which ``a:v1`` serves."""
    made = MemoryNode()
    made.policy = changed(POLICY, grace_seconds=86400.0)
    made.run(made.lock(made.item("a:v1", V1)))
    assert made.active() == {"a:v1": V1}
    return made


def update(node: MemoryNode, **changes: Any) -> Lock:
    """Return the lock in which v2 replaces v1."""
    return node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v2", V2, replaces=["a:v1"], **changes))


def swaps(node: MemoryNode) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(event.added, event.removed) for event in node.heard.of(Swapped)]


def test_both_change_in_one_swap(node: MemoryNode) -> None:
    before = len(swaps(node))

    node.run(update(node))

    assert node.active() == {"a:v2": V2}
    assert swaps(node)[before:] == [(("a:v2",), ("a:v1",))]
    assert node.ledger.records["a:v1"].reason.startswith("replaced: ")
    assert node.heard.kinds() == []


@pytest.mark.parametrize("trouble", ["no source", "bad test", "unable", "does not fit", "not healthy"])
def test_an_update_that_does_not_succeed_leaves_the_old_version_serving(node: MemoryNode, trouble: str) -> None:
    lock = update(node, **({"gpu_memory": 1 << 50} if trouble == "does not fit" else {}))
    if trouble == "no source":
        node.internet.remove(V2["a.gguf"])
    elif trouble in {"bad test", "unable"}:
        node.tester.verdicts["a:v2"] = (trouble.removesuffix(" test"), "no")
    elif trouble == "not healthy":
        node.hooks.verdict = lambda _: "sick"

    for _ in range(3):
        node.run(lock)
        assert node.active() == {"a:v1": V1}

    reasons = {change.id: change.reason for change in node.plan(lock).models}
    assert reasons["a:v1"] == "retired-by-snapshot: it serves until a:v2 is active here"


def test_a_retired_model_is_never_installed_anew() -> None:
    node = MemoryNode()
    node.internet.remove(V2["a.gguf"])
    lock = node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v2", V2, serve=False, replaces=["a:v1"]))

    node.run(lock)

    assert node.active() == {}
    assert name_of(V1["a.gguf"]) not in node.internet.asked
    assert node.ops(lock).get("a:v1") is None


def test_a_retired_model_that_is_not_here_is_no_incident_where_it_would_not_fit() -> None:
    node = MemoryNode()
    lock = node.lock(node.item("a:v1", V1, state="retired", gpu_memory=1 << 50), node.item("a:v2", V2, replaces=["a:v1"]))

    node.run(lock)

    assert node.active() == {"a:v2": V2}
    assert node.heard.kinds() == []
    assert not node.plan(lock).changes


def test_a_chain_of_twenty_thousand_versions_is_planned_in_linear_time() -> None:
    node = MemoryNode()
    names = [f"a:v{number}" for number in range(1, 20_001)]
    shared = node.item("a:v0", V1)["artifacts"]
    items = [
        node.network.model(name, b"x", state="retired" if name != names[-1] else "enabled", replaces=[f"a:v{number}"])
        | {"artifacts": shared}
        for number, name in enumerate(names)
    ]
    lock = node.lock(*(item | {"entrypoint": "a.gguf"} for item in items))

    assert node.ops(lock) == {names[-1]: "install"}


def test_its_bytes_go_after_the_grace_period(node: MemoryNode) -> None:
    lock = update(node)
    node.run(lock)
    assert node.ops(lock) == {}
    node.clock.forward(hours=25)
    assert node.ops(lock) == {"a:v1": "remove"}

    node.run(lock)

    assert "a:v1" not in node.ledger.records
    assert node.ops(lock) == {}


@pytest.mark.parametrize("end", ["disabled", "removed", "failed"])
def test_it_serves_again_without_a_download_when_its_replacement_ends(node: MemoryNode, end: str) -> None:
    node.run(update(node))
    asked = list(node.internet.asked)
    if end == "disabled":
        lock = update(node, state="disabled")
    elif end == "removed":
        lock = node.lock(node.item("a:v1", V1, state="retired"), node.item("b:v1", {"b": b"b"}, replaces=["a:v1"]))
        node.internet.remove(b"b")
    else:
        lock = update(node)
        node.facts = changed(node.facts, device="another")
        node.tester.verdicts["a:v2"] = ("bad", "no")
        node.run(lock)

    node.run(lock)

    assert node.active() == {"a:v1": V1}
    assert node.internet.asked[len(asked) :] in ([], [name_of(b"b")])
    assert node.ledger.records["a:v1"].unlisted_since is None


def test_a_node_that_slept_through_versions_follows_the_chain(node: MemoryNode) -> None:
    lock = node.lock(
        node.item("a:v1", V1, state="retired"),
        node.item("a:v2", V2, state="retired", replaces=["a:v1"]),
        node.item("a:v3", V3, replaces=["a:v2"]),
    )

    node.run(lock)

    assert node.active() == {"a:v3": V3}
    assert name_of(V2["a.gguf"]) not in node.internet.asked


def test_a_chain_through_a_version_that_is_not_listed_any_more_ends_there(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v3", V3, replaces=["a:v2"]))

    node.run(lock)

    assert set(node.active()) == {"a:v1", "a:v3"}  # nothing says that v3 replaces v1: v2, which did, is gone


def test_damage_in_a_retired_model_is_repaired_while_it_must_serve(node: MemoryNode) -> None:
    lock = update(node)
    node.internet.remove(V2["a.gguf"])
    node.blobs.hot[name_of(V1["a.gguf"])] = b"rot"
    node.damaged.add(name_of(V1["a.gguf"]))

    node.run(lock)

    assert node.active() == {"a:v1": V1}


def test_damage_in_a_replaced_model_costs_no_download(node: MemoryNode) -> None:
    lock = update(node)
    node.run(lock)
    asked = list(node.internet.asked)
    node.blobs.hot[name_of(V1["a.gguf"])] = b"rot"
    node.damaged.add(name_of(V1["a.gguf"]))

    node.run(lock)

    assert node.active() == {"a:v2": V2}
    assert node.internet.asked == asked


def test_an_archived_model_stays_while_a_server_may_still_read_from_it(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", V1, state="archived"), node.item("b:v1", V2, replaces=["a:v1"]))
    node.servers.lag = True
    for _ in range(2):
        node.run(lock)
        assert node.active() == {"b:v1": V2}
        assert name_of(V1["a.gguf"]) in node.blobs.hot

    node.servers.lag = False
    node.run(lock)
    assert name_of(V1["a.gguf"]) in node.blobs.cold
    assert node.ledger.records["a:v1"].state == "archived"


def test_an_archived_model_waits_for_what_replaces_it_under_another_name(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", V1, state="archived"), node.item("b:v1", V2, replaces=["a:v1"]))
    node.internet.remove(V2["a.gguf"])
    node.run(lock)
    assert node.active() == {"a:v1": V1}
    node.internet.add(V2["a.gguf"])
    before = len(swaps(node))

    node.run(lock)
    node.run(lock)

    assert node.active() == {"b:v1": V2}
    assert swaps(node)[before:] == [(("b:v1",), ("a:v1",))]
    assert node.ledger.records["a:v1"].state == "archived"


def test_unlisted_still_stops_at_once(node: MemoryNode) -> None:
    node.internet.remove(V2["a.gguf"])

    node.run(node.lock(node.item("a:v2", V2, serve=False, replaces=["a:v1"])))

    assert node.active() == {}


def test_both_stay_where_nothing_is_retired(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", V1), node.item("a:v2", V2, replaces=["a:v1"])))

    assert node.active() == {"a:v1": V1, "a:v2": V2}


def test_an_update_and_its_grace_period_leave_nothing_to_do(node: MemoryNode) -> None:
    lock = update(node)
    node.run(lock)

    assert not node.plan(lock).changes
    node.clock.forward(hours=25)
    node.run(lock)
    assert not node.plan(lock).changes


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a:v1", ["a:v1"])], "in a circle"),
        ([("a:v1", ["a:v2"]), ("a:v2", ["a:v1"])], "in a circle"),
        ([("a:v1", ["a:v3"]), ("a:v2", ["a:v1"]), ("a:v3", ["a:v2"])], "in a circle"),
        ([("a:v1", ["a:v0"]), ("b:v1", ["a:v0"])], "is replaced by"),
        ([("a:v1", ["a"])], "regex"),
    ],
)
def test_replacements_that_contradict_each_other_are_refused(items: list[tuple[str, list[str]]], message: str) -> None:
    node = MemoryNode()

    with pytest.raises(BadEnvelope, match=message):
        node.lock(*(node.item(name, {"m": name.encode()}, replaces=old) for name, old in items))


def test_two_may_replace_one_where_only_one_of_them_is_enabled() -> None:
    node = MemoryNode()

    node.lock(node.item("a:v2", V2, state="retired", replaces=["a:v1"]), node.item("a:v3", V3, replaces=["a:v1", "a:v2"]))


def test_the_lock_of_a_list_without_replacements_has_none() -> None:
    from reconciler.core import lock as locks

    node = MemoryNode()

    assert b"replaces" not in locks.encode(node.lock(node.item("a:v1", V1)))
    assert b'replaces = [\n    "a:v1",\n]' in locks.encode(node.lock(node.item("a:v2", V2, replaces=["a:v1"])))


def test_the_grace_period_begins_when_it_is_replaced_and_not_when_it_is_retired(node: MemoryNode) -> None:
    lock = update(node)
    node.internet.remove(V2["a.gguf"])
    node.run(lock)
    node.clock.forward(days=30)
    node.internet.add(V2["a.gguf"])

    node.run(lock)

    record = node.ledger.records["a:v1"]
    assert record.unlisted_since is not None
    assert node.clock() - record.unlisted_since < timedelta(minutes=1)


def test_what_a_rollback_took_back_is_held_until_other_content_is_listed(node: MemoryNode) -> None:
    lock = update(node)
    state = node.state()
    (recipe,) = (model.recipe for model in lock.model if model.id == "a:v2")
    held = changed(state, held={"a:v2": recipe})
    other = node.lock(node.item("a:v1", V1, state="retired"), node.item("a:v2", V3, replaces=["a:v1"]))

    def planned(wanted: Lock) -> tuple[str, str]:
        made = plan.diff(wanted, "sha256:" + "0" * 64, held, node.facts, node.policy, now=node.clock())
        change = next(change for change in made.models if change.id == "a:v2")
        return change.op, change.reason.partition(":")[0]

    assert planned(lock) == ("keep", "held")
    assert planned(other) == ("install", "not-installed")
