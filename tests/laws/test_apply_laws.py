"""
Convergence, over twins and over a real store: whatever happened before, a run takes the node to its lock, and a second does nothing.

The model to compare with is small: after a clean run, what is active is exactly what the lock lists as enabled.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reconciler.core.lock import Lock
from tests.storenode import StoreNode, memory
from tests.twins.content import Files, changed, name_of
from tests.twins.node import POLICY, MemoryNode, SnapshotAuthor

IDS = ("a:v1", "a:v2", "b:v1", "c:v1")
CONTENTS: tuple[Files, ...] = ({"m": b"one" * 9}, {"m": b"two" * 9, "n": b"shared" * 9}, {"m": b"three" * 9, "n": b"shared" * 9})
BOXED: Files = {"m": b"four" * 9, "box/n": b"shared" * 9}

#: A snapshot: for each id its content and its state; an id that is left out is not listed.
wanted = st.tuples(st.integers(0, 3), st.sampled_from(["enabled", "enabled", "disabled", "archived"]))
snapshots = st.dictionaries(st.sampled_from(IDS), wanted)
#: What happens before a run: a blob rots, seen or unseen; the memory is lost; a test fails, or cannot be made; a server is away.
troubles = st.sampled_from(["", "", "rot", "hidden rot", "lost ledger", "bad test", "no test", "no server", "clock", "cut short"])
stories = st.lists(st.tuples(snapshots, troubles, st.integers(0, 3)), min_size=1, max_size=6)


def lock_of(word: SnapshotAuthor, snapshot: dict[str, tuple[int, str]]) -> Lock:
    items = []
    for name, (content, state) in snapshot.items():
        files, boxed = (CONTENTS[content], None) if content < 3 else ({}, BOXED)
        items.append(word.item(name, files, boxed=boxed, state=state))
    return word.lock(*items)


def expected(snapshot: dict[str, tuple[int, str]]) -> dict[str, Files]:
    return {name: (*CONTENTS, BOXED)[content] for name, (content, state) in snapshot.items() if state == "enabled"}


@given(stories, st.sampled_from([0.0, 1e9]))
@example([({"a:v1": (3, "enabled")}, "", 0), ({"a:v1": (0, "enabled")}, "rot", 0), ({"a:v1": (3, "enabled")}, "", 0)], 0.0)
@settings(max_examples=60, deadline=None)
def test_every_story_ends_with_what_the_lock_lists(story: list[tuple[dict[str, tuple[int, str]], str, int]], grace: float) -> None:
    node = MemoryNode()
    node.policy = changed(POLICY, grace_seconds=grace)
    for snapshot, trouble, index in story:
        lock = lock_of(node, snapshot)
        before = dict(node.active())
        pages = dict(node.internet.pages)
        trouble_in_memory(node, trouble, index)
        node.run(lock)

        assert set(node.active()) <= {name for name in IDS if snapshot.get(name, (0, ""))[1] in {"enabled", "archived"}}
        for name, files in node.active().items():
            assert files in (expected(snapshot).get(name), before.get(name)), "neither what is listed nor what was there"
        node.tester.verdicts.clear()
        node.internet.pages = pages
        node.run(lock)
        node.run(lock)
        assert node.active() == expected(snapshot)
        assert not node.plan(lock).changes
        made = len(node.generations.sequence)
        assert not node.run(lock).changed
        assert len(node.generations.sequence) == made


def trouble_in_memory(node: MemoryNode, trouble: str, index: int) -> None:
    held = sorted(node.blobs.hot)
    match trouble:
        case "rot" | "hidden rot" if held:
            data = node.blobs.hot[held[index % len(held)]]
            if name_of(data) in held:
                node.damage(data, known=trouble == "rot")
        case "lost ledger":
            node.lose_ledger()
        case "bad test":
            node.tester.verdicts[IDS[index]] = ("bad", "no")
        case "no test":
            node.tester.verdicts[IDS[index]] = ("unable", "busy")
        case "no server":
            node.internet.pages.clear()
        case "clock":
            node.clock.forward(days=3)
        case "cut short":
            node.ledger.running = True
        case _:
            pass


@given(stories)
@example([({"a:v1": (0, "enabled")}, "", 0), ({"a:v1": (0, "disabled")}, "hidden rot", 0), ({"a:v1": (0, "enabled")}, "", 0)])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_real_store_ends_there_too(story: list[tuple[dict[str, tuple[int, str]], str, int]]) -> None:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        node = StoreNode(Path(folder))
        for snapshot, trouble, index in story:
            lock = lock_of(node, snapshot)
            pages = dict(node.internet.pages)
            trouble_on_disk(node, trouble, index)
            node.run(lock)
            node.tester.verdicts.clear()
            node.internet.pages = pages
            node.run(lock)
            node.run(lock)

            assert node.active() == expected(snapshot)
            assert not node.plan(lock).changes
            assert node.leftovers() == []
            assert node.faults({name: [*CONTENTS, BOXED] for name in IDS}, node.doubted()) == []
            active = node.layout.active.readlink() if node.layout.active.is_symlink() else None
            assert not node.run(lock).changed
            assert (node.layout.active.readlink() if active else None) == active


def trouble_on_disk(node: StoreNode, trouble: str, index: int) -> None:
    held = sorted(node.layout.blobs.glob("*/*/*"))
    match trouble:
        case "rot" | "hidden rot" if held:
            path = held[index % len(held)]
            data = path.read_bytes()
            path.chmod(0o644)
            path.write_bytes(data + b"more" if trouble == "rot" else b"rot" + data[3:])
            path.chmod(0o444)
        case "lost ledger":
            node.layout.ledger.unlink(missing_ok=True)
        case "bad test":
            node.tester.verdicts[IDS[index]] = ("bad", "no")
        case "no test":
            node.tester.verdicts[IDS[index]] = ("unable", "busy")
        case "no server":
            node.internet.pages.clear()
        case "clock":
            node.clock.forward(days=3)
        case _:
            pass


# -- updates ---------------------------------------------------------------------------------------

#: One step of a network's life: how many versions it publishes before the node looks again, whether it still lists the oldest ones, and
#: what happens on the node.
steps = st.tuples(st.integers(0, 3), st.booleans(), troubles, st.integers(0, 3))


@given(st.lists(steps, min_size=1, max_size=8), st.sampled_from([0.0, 1e9]))
@settings(max_examples=60, deadline=None)
def test_a_name_that_served_serves_through_every_update(story: list[tuple[int, bool, str, int]], grace: float) -> None:
    node = MemoryNode()
    node.policy = changed(POLICY, grace_seconds=grace)
    newest, oldest = 1, 1
    lock = updated(node, oldest, newest)
    node.run(lock)
    for published, shortens, trouble, index in story:
        newest += published
        serving = min(int(name.partition(":v")[2]) for name in node.active())
        oldest = serving if shortens else oldest  # the operator's tools keep a version listed while nodes may still serve it
        pages = dict(node.internet.pages)
        lock = updated(node, oldest, newest)
        if trouble not in {"rot", "hidden rot"}:  # of damaged bytes without a source nobody can serve
            trouble_in_memory(node, trouble, index)
        node.tester.verdicts = {f"a:v{newest}": verdict for verdict in node.tester.verdicts.values()}
        node.run(lock)

        assert len(node.active()) == 1, "one version serves, before and after"
        node.tester.verdicts.clear()
        node.internet.pages = pages | node.internet.pages
        for model in range(1, newest + 1):
            node.internet.add(version(model)["m"])
        node.run(lock)
        node.run(lock)
        assert set(node.active()) == {f"a:v{newest}"}
        assert not node.plan(lock).changes


def version(number: int) -> Files:
    return {"m": b"version %d" % number}


def updated(node: MemoryNode, oldest: int, newest: int) -> Lock:
    """Return the lock of the list in which each version replaces the one before, and all but the newest are retired."""
    items = []
    for number in range(oldest, newest + 1):
        replaces = [f"a:v{number - 1}"] if number > 1 else []
        state = "enabled" if number == newest else "retired"
        items.append(node.item(f"a:v{number}", version(number), state=state, replaces=replaces))
    return node.lock(*items)
