"""How a run ends, on a node made of memory twins: the question whether the node is healthy, runs that are cut short, what is told."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from reconciler.core import lifecycle
from reconciler.core.errors import FetchError
from reconciler.core.events import Announced, ModelDone, ModelPhase, Swapped
from reconciler.core.state import Generation
from tests.twins.content import Files, name_of, tar
from tests.twins.fetch import MemoryFetcher
from tests.twins.node import MemoryNode

A: Files = {"a.gguf": b"aaaa"}
B: Files = {"b.gguf": b"bbbb"}
C: Files = {"c.gguf": b"cccc"}


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode()


# -- health ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "something"])
def test_an_unhealthy_node_goes_back_and_what_it_added_failed(node: MemoryNode, before: str) -> None:
    items = [node.item("c:v1", C)] if before == "something" else []
    node.run(node.lock(*items))
    had = set(node.active())
    node.hooks.verdict = lambda made: "exited with 1" if "a:v1" in made.entries else ""
    lock = node.lock(node.item("a:v1", A), *items)

    outcome = node.run(lock)

    assert set(node.active()) == had
    assert outcome.failed == ("a:v1",)
    assert node.ledger.records["a:v1"].state == "failed"
    assert "not healthy" in node.ledger.records["a:v1"].last_error
    assert node.heard.kinds() == ["smoke-failed"]
    assert node.hooks.told[-1] == node.servers.told[-1] == node.generations.active.number
    node.hooks.verdict = lambda _: ""
    assert node.run(lock).failed == ("a:v1",), "it is not swapped in and out at each run"
    assert set(node.active()) == had
    node.clock.forward(minutes=11)
    node.run(lock)
    assert set(node.active()) == had | {"a:v1"}


def test_the_pauses_between_tries_of_what_the_node_is_not_healthy_with_grow_to_a_day(node: MemoryNode) -> None:
    node.hooks.verdict = lambda _: "no"
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    for pause in (10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440):
        node.clock.forward(minutes=pause - 1)
        node.run(lock)
        asked = len(node.hooks.asked)
        node.clock.forward(minutes=2)
        node.run(lock)
        assert len(node.hooks.asked) == asked + 1, f"after {pause} minutes"


def test_other_content_is_tried_at_once_whatever_the_node_was_not_healthy_with(node: MemoryNode) -> None:
    node.hooks.verdict = lambda made: "no" if node.active().get("a:v1") == A else ""
    node.run(node.lock(node.item("a:v1", A)))

    node.run(node.lock(node.item("a:v1", B)))

    assert node.active() == {"a:v1": B}


def test_of_models_that_came_together_the_innocent_ones_come_back_one_by_one(node: MemoryNode) -> None:
    node.hooks.verdict = lambda made: "no" if "b:v1" in made.entries else ""
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B), node.item("c:v1", C))
    assert node.run(lock).failed == ("a:v1", "b:v1", "c:v1")

    node.clock.forward(minutes=11)
    found = [(node.run(lock), set(node.active()))[1] for _ in range(3)]

    assert found == [{"a:v1"}, {"a:v1"}, {"a:v1", "c:v1"}]


def test_hooks_and_servers_are_told_once_a_run_and_the_hook_is_asked_after_both(node: MemoryNode) -> None:
    order: list[str] = []

    def healthy(made: Generation) -> str:
        order.append(f"asked {made.number} {node.servers.told[-1]} {node.hooks.told[-1]}")
        return ""

    node.hooks.verdict = healthy
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B), node.item("c:v1", C)))

    last = node.generations.active.number
    assert node.hooks.told == node.servers.told == [last]
    assert order == [f"asked {last} {last} {last}"]
    assert len(node.heard.of(Announced)) == 1


@pytest.mark.parametrize("way", ["enabled again", "another job", "failed before"])
def test_an_archive_is_not_unpacked_again_for_a_test(node: MemoryNode, way: str) -> None:
    if way == "failed before":
        node.tester.verdicts["a:v1"] = ("bad", "no words")
    node.run(node.lock(node.item("a:v1", A, boxed=B)))
    if way == "enabled again":
        node.run(node.lock(node.item("a:v1", A, boxed=B, state="disabled")))
    node.tester.verdicts.clear()
    node.heard.events.clear()
    item = node.item("a:v1", A, boxed=B)
    if way == "another job":
        item["smoke"] = {"prompt": "Other", "max_tokens": 4, "timeout": "60s"}

    node.run(node.lock(item))

    assert node.active() == {"a:v1": A | B}
    assert "unpacking" not in {event.phase for event in node.heard.events if isinstance(event, ModelPhase)}


class Killed(BaseException):
    """The run ends here, as by kill -9."""


def kill(_: Generation) -> str:
    raise Killed


@pytest.mark.parametrize("verdict", ["", "exited with 1"])
@pytest.mark.parametrize("before", ["nothing", "something", "an older content"])
def test_a_run_that_is_cut_short_while_the_node_is_asked_leaves_no_model_unasked(node: MemoryNode, before: str, verdict: str) -> None:
    others = [node.item("c:v1", C)] if before == "something" else []
    node.run(node.lock(*([node.item("a:v1", B)] if before == "an older content" else others)))
    had = node.active()
    lock = node.lock(node.item("a:v1", A), *others)
    node.hooks.verdict = kill
    with pytest.raises(Killed):
        node.run(lock)
    assert node.active()["a:v1"] == A
    node.hooks.verdict = lambda made: verdict if node.active().get("a:v1") == A else ""

    outcome = node.run(lock)

    assert node.active() == (had if verdict else had | {"a:v1": A})
    assert outcome.failed == (("a:v1",) if verdict else ())
    assert node.ledger.records["a:v1"].state == ("failed" if verdict else "active")
    assert node.hooks.told[-1] == node.generations.active.number
    node.hooks.verdict = lambda _: ""
    node.clock.forward(minutes=11)
    node.run(lock)
    assert node.active() == had | {"a:v1": A}
    assert node.ops(lock) == {}


def test_a_version_comes_back_when_a_run_was_cut_short_and_its_successor_is_not_healthy(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", A, state="archived"), node.item("a:v2", B))
    node.hooks.verdict = kill
    with pytest.raises(Killed):
        node.run(lock)
    node.hooks.verdict = lambda made: "no" if "a:v2" in made.entries else ""

    node.run(lock)

    assert node.active() == {"a:v1": A}


def test_an_archived_version_comes_back_when_its_successor_is_not_healthy(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.hooks.verdict = lambda made: "no" if "a:v2" in made.entries else ""

    node.run(node.lock(node.item("a:v1", A, state="archived"), node.item("a:v2", B)))

    assert node.active() == {"a:v1": A}


def test_what_failed_its_test_in_this_run_does_not_come_back_with_the_set_before(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A), node.item("c:v1", C)))
    node.hooks.verdict = lambda made: "no" if "b:v1" in made.entries else ""
    node.tester.verdicts["a:v1"] = ("bad", "no")
    asked = node.item("a:v1", A, smoke={"prompt": "another test"})

    node.run(node.lock(asked, node.item("b:v1", B), node.item("c:v1", C)))

    assert node.active() == {"c:v1": C}


def test_nobody_is_asked_about_a_swap_that_only_takes_away(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A), node.item("c:v1", C)))
    node.hooks.verdict = lambda _: "never"

    node.run(node.lock(node.item("c:v1", C)))

    assert set(node.active()) == {"c:v1"}


# -- runs that end badly ---------------------------------------------------------------------------


def test_a_run_that_was_cut_short_is_finished_and_said_to_have_been(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.ledger.running = True
    assert node.plan(lock).changes

    node.run(lock)

    assert node.heard.kinds() == ["crash-recovered"]
    assert not node.ledger.running
    assert not node.plan(lock).changes


def test_a_run_that_stops_stops_its_transfers(node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B))
    closed = threading.Event()

    class Endless(MemoryFetcher):
        def fetch(self, wants, report):  # type: ignore[no-untyped-def]
            yield next(super().fetch(wants, report))
            closed.wait(30)
            raise FetchError("closed")

        def close(self) -> None:
            closed.set()

    monkeypatch.setattr("tests.twins.node.MemoryFetcher", Endless)
    monkeypatch.setattr(node.generations, "swap", _refuse)

    with pytest.raises(OSError, match="the disk says no"):
        node.run(lock)

    assert closed.is_set()
    assert node.tester.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("bring", "test", "hash"))]
    assert node.ledger.running


def _refuse(_entries: object) -> None:
    raise OSError("the disk says no")


def test_a_fetcher_that_raises_ends_what_waits_and_fails_no_model(node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MemoryFetcher):
        def fetch(self, wants, report):  # type: ignore[no-untyped-def]
            yield next(super().fetch(wants, report))
            raise RuntimeError("a bug")

    monkeypatch.setattr("tests.twins.node.MemoryFetcher", Broken)

    outcome = node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))

    assert (len(outcome.internal_errors), outcome.failed) == (1, ())
    assert len(node.active()) == 1


# -- what is told ----------------------------------------------------------------------------------


def test_every_reason_starts_with_a_word_of_the_closed_list(node: MemoryNode) -> None:
    node.tester.verdicts = {"b:v1": ("bad", "no"), "c:v1": ("unable", "busy")}
    lock = node.lock(
        node.item("a:v1", A), node.item("b:v1", B), node.item("c:v1", C), node.item("d:v1", {"d": b"d"}, memory=1 << 50),
        node.item("e:v1", {"e": b"e"}, state="disabled"),
    )  # fmt: skip
    node.run(lock)
    node.run(lock)
    later = node.lock(node.item("a:v1", A, state="archived"), node.item("e:v1", {"e": b"e"}))
    node.clock.ahead += timedelta(days=1)
    node.run(later)

    said = {done.reason for done in node.heard.of(ModelDone)} | {record.reason for record in node.ledger.records.values()}
    said |= {change.reason for made in (lock, later) for change in node.plan(made).models}
    assert {reason.partition(":")[0] for reason in said} <= set(lifecycle.REASONS)


def test_swaps_say_what_came_and_what_went(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("b:v1", B)))

    told = [(swap.added, swap.removed) for swap in node.heard.of(Swapped)]
    assert told == [(("a:v1",), ()), ((), ("a:v1",)), (("b:v1",), ())]


@pytest.mark.parametrize("how", ["not listed", "its test", "its repair", "its older copy"])
def test_swaps_say_why_a_model_went(node: MemoryNode, how: str) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    if how == "its test":
        node.tester.verdicts = {"a:v1": ("bad", "no")}
        node.clock.forward(days=8)
        lock = node.lock(node.item("a:v1", A), retest_after="7d")
    if how in {"its repair", "its older copy"}:
        node.damage(next(iter(A.values())))
        lock = lock if how == "its repair" else node.lock(node.item("a:v1", B))
        node.internet.pages = dict.fromkeys(node.internet.pages, b"lie")

    node.run(node.lock() if how == "not listed" else lock)

    last = node.heard.of(Swapped)[-1]
    assert (last.added, last.removed) == ((), ("a:v1",))
    assert last.what == {
        "not listed": "removed or disabled by the snapshot",
        "its older copy": "damaged",
    }.get(how, "failed its repair or its test")


def test_an_archive_is_asked_for_as_one_blob(node: MemoryNode) -> None:
    node.run(node.lock(node.item("b:v1", {}, boxed=B)))

    assert node.internet.asked == [name_of(tar(B))]


def test_an_archive_that_rotted_is_hashed_and_fetched_though_its_members_are_whole(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A, boxed=B))
    node.run(lock)
    box = tar(B)
    node.damage(box, known=False)

    assert node.ops(lock) == {"a:v1": "retest"}
    node.run(lock)

    assert node.blobs.hot[name_of(box)] == box
    assert node.active() == {"a:v1": A | B}
