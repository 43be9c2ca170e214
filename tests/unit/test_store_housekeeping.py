"""Housekeeping: what nobody needs goes, what anybody needs stays, and looking changes nothing."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from reconciler.core import strict_json
from reconciler.core.lock import Lock
from reconciler.core.state import ServerState
from reconciler.store import blobs, clock, generations, quarantine, serving
from reconciler.store.garbage import ASIDE_SECONDS, PARTIAL_SECONDS, GarbageCollector
from reconciler.store.housekeeping import StoreHousekeeping
from reconciler.store.ledger import Ledger, Verification
from reconciler.store.quarantine import QuarantineRecord
from tests.storenode import StoreNode, memory, traces
from tests.twins.content import Files, changed, name_of
from tests.twins.node import POLICY

A: Files = {"a.gguf": b"A" * 5000, "shared": b"S" * 100}
B: Files = {"b.gguf": b"B" * 5000, "shared": b"S" * 100}


@pytest.fixture
def node() -> Iterator[StoreNode]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield StoreNode(Path(folder))


def garbage(node: StoreNode, lock: Lock) -> list[tuple[str, str]]:
    with Ledger.reading(node.layout.ledger) as ledger:
        return [(one.kind, one.name) for one in collector(node, lock, ledger).garbage()]


def collector(node: StoreNode, lock: Lock, ledger: Ledger) -> GarbageCollector:
    return GarbageCollector(node.layout, ledger, lock, node.policy, node.clock)


def housekeeping(node: StoreNode, lock: Lock, ledger: Ledger) -> StoreHousekeeping:
    return StoreHousekeeping(node.layout, ledger, lock, node.policy, node.clock)


def hot(node: StoreNode) -> set[str]:
    return {path.name for path in node.layout.blobs.glob("*/*/*")}


def digits(data: bytes) -> str:
    return name_of(data).partition(":")[2]


def test_looking_for_waste_changes_nothing(node: StoreNode) -> None:
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))
    lock = node.lock(node.item("a:v1", A))
    before = traces(node.root)

    garbage(node, lock)

    assert traces(node.root) == before


def test_the_bytes_of_an_unlisted_model_stay_for_its_grace_and_what_is_shared_stays_for_good(node: StoreNode) -> None:
    node.policy = changed(POLICY, grace_seconds=3600.0, generations=1)
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    assert digits(B["b.gguf"]) in hot(node)

    node.clock.forward(minutes=61)
    node.run(lock)

    assert hot(node) == {digits(data) for data in A.values()}
    assert len(list(node.layout.trees.glob("*/*/*"))) == 1
    assert garbage(node, lock) == []


def test_as_many_generations_are_kept_as_the_policy_says(node: StoreNode) -> None:
    node.policy = changed(POLICY, generations=3, grace_seconds=1e9)
    for number in range(8):
        lock = node.lock(node.item("a:v1", A), node.item("b:v1", B, state="enabled" if number % 2 else "disabled"))
        node.run(lock)

    assert len(generations.numbers(node.layout)) == 3
    assert generations.current(node.layout).number == generations.numbers(node.layout)[-1]


def test_a_node_that_is_never_healthy_with_a_new_model_does_not_gather_generations(node: StoreNode) -> None:
    node.policy = changed(POLICY, generations=3)
    node.run(node.lock(node.item("a:v1", A)))
    wanted = node.lock(node.item("a:v1", A), node.item("b:v1", B))
    node.hooks.verdict = lambda _: "sick"

    for _ in range(12):
        node.clock.forward(hours=25)
        node.run(wanted)

    assert set(node.active()) == {"a:v1"}
    assert max(generations.numbers(node.layout)) > 12, "each run tries again"
    assert len(generations.numbers(node.layout)) <= 3 + 3 + 1


def test_what_a_kept_generation_serves_stays(node: StoreNode) -> None:
    node.policy = changed(POLICY, grace_seconds=1e9)
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", B))
    node.run(lock)

    assert garbage(node, lock) == []
    first = generations.read(node.layout, 1)
    assert {path.name for path in node.layout.tree(first.entries["a:v1"].tree).iterdir()} == set(A)


def test_a_strange_blob_and_a_strange_tree_go(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    strange = node.layout.blob(name_of(b"strange"))
    strange.parent.mkdir(parents=True)
    strange.write_bytes(b"strange")
    (node.layout.tree(name_of(b"tree")) / "sub").mkdir(parents=True)
    assert garbage(node, lock) == [("tree", name_of(b"tree")), ("blob", name_of(b"strange"))]

    node.run(lock)

    assert not strange.exists()
    assert garbage(node, lock) == []
    assert node.faults({"a:v1": [A]}) == []


def test_cold_storage_is_swept_when_nobody_asks_for_it_any_more(node: StoreNode) -> None:
    node.policy = changed(POLICY, grace_seconds=3600.0)
    node.run(node.lock(node.item("a:v1", A)))
    archived = node.lock(node.item("a:v1", A, state="archived"))
    node.run(archived)
    assert len(list(node.layout.cold.rglob("*/*/*/*"))) == 2
    assert garbage(node, archived) == []

    without = node.lock()
    node.run(without)
    assert len(list(node.layout.cold.rglob("*/*/*/*"))) == 2
    node.clock.forward(hours=2)
    node.run(without)

    assert list(node.layout.cold.rglob("*/*/*/*")) == []


def test_a_tree_of_an_archived_model_that_a_killed_run_left_goes_though_an_older_generation_names_it(node: StoreNode) -> None:
    node.policy = changed(POLICY, grace_seconds=3600.0, generations=9)
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))
    tree = node.layout.tree(generations.current(node.layout).entries["a:v1"].tree)
    lock = node.lock(node.item("a:v1", A, state="archived"), node.item("b:v1", B))
    node.run(lock)
    assert len(generations.numbers(node.layout)) > 1
    tree.mkdir(parents=True)  # as where it was killed between forgetting and deleting it

    node.run(lock)

    assert not tree.exists()


def test_a_damaged_copy_that_was_set_aside_goes_after_a_week(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A, state="archived"))
    node.run(node.lock(node.item("a:v1", A)))
    node.run(lock)
    blobs.set_aside(node.layout, name_of(A["a.gguf"]))
    aside = next(node.layout.cold.glob("blobs/*/*/.*"))
    assert garbage(node, lock) == []

    node.clock.forward(seconds=time.time() - node.clock().timestamp() + ASIDE_SECONDS + 60)
    node.run(lock)

    assert not aside.exists()


def partial(node: StoreNode, data: bytes, age: float = 0.0) -> Path:
    folder = node.layout.staging / name_of(data).replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").write_bytes(b"half")
    then = node.clock().timestamp() - age
    os.utime(folder, (then, then))
    return folder


def test_a_partial_download_stays_while_somebody_may_continue_it(node: StoreNode) -> None:
    node.tester.verdicts["a:v1"] = ("unable", "busy")
    lock = node.lock(node.item("a:v1", A, memory=1 << 50), node.item("b:v1", B))
    node.run(lock)
    wanted, stale, strange = partial(node, A["a.gguf"]), partial(node, A["shared"], PARTIAL_SECONDS + 1), partial(node, b"nobody's")

    node.run(lock)

    assert (wanted.exists(), stale.exists(), strange.exists()) == (True, False, False)


def test_a_partial_download_of_what_is_here_goes_unless_what_is_here_is_damaged(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    damaged, here = partial(node, A["a.gguf"]), partial(node, A["shared"])
    with Ledger.writing(node.layout.ledger) as ledger:
        ledger.record_verified({name_of(A["a.gguf"]): Verification(size=-1, inode=0, mtime_ns=0, verified_at=node.clock())})

    assert garbage(node, lock) == [("partial", here.name)]
    assert damaged.exists()


def test_what_a_run_left_in_the_making_goes(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    for name in ("unpack-12", "tree-34/sub", "small-78"):
        (node.layout.staging / name).mkdir(parents=True)
    (node.layout.staging / "thaw-56").write_bytes(b"x")
    for folder in (node.layout.root, node.layout.generations, node.layout.trust, node.layout.trust / "snapshots"):
        (folder / ".x.123456.tmp").write_bytes(b"x")
    assert len(node.leftovers()) == 8

    node.run(lock)

    assert node.leftovers() == []


def test_many_blobs_are_forgotten_and_deleted_together(node: StoreNode, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    kept = hot(node)
    for number in range(300):
        path = node.layout.blob(name_of(b"%d" % number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    forgotten: list[int] = []
    forget = Ledger.forget_blobs

    def counted(self: Ledger, names: Collection[str]) -> None:
        forgotten.append(len(names))
        forget(self, names)

    monkeypatch.setattr(Ledger, "forget_blobs", counted)
    with Ledger.writing(node.layout.ledger) as ledger:
        collector(node, lock, ledger).collect()

    assert hot(node) == kept
    assert sum(forgotten) == 300
    assert len(forgotten) < 10, "each is a transaction, which is synced"
    assert max(forgotten) <= 64, "a full disk has no room for a large one"


def test_no_more_is_freed_than_was_asked_for(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    for number in range(5):
        path = node.layout.blob(name_of(f"waste{number}".encode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    with Ledger.writing(node.layout.ledger) as ledger:
        made = collector(node, lock, ledger)

        assert made.free(made.garbage(), at_most=1500) == 2000
        assert len(made.garbage()) == 3
        assert all(one.reason for one in made.garbage())


# -- quarantine ------------------------------------------------------------------------------------


def test_what_failed_is_kept_with_a_record_and_takes_no_room(node: StoreNode) -> None:
    node.tester.verdicts["a:v1"] = ("bad", "expected Paris, found London")
    node.run(node.lock(node.item("a:v1", A)))

    (folder,) = node.layout.quarantine.iterdir()
    record = strict_json.decode((folder / "record.json").read_bytes(), QuarantineRecord)
    assert (record.model, record.detail) == ("a:v1", "expected Paris, found London")
    assert record.report is not None
    kept = {path.name.partition("-")[2]: path for path in folder.iterdir() if path.name != "record.json"}
    assert set(kept) == set(A)
    assert kept["a.gguf"].samefile(node.layout.blob(name_of(A["a.gguf"])))
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_failed_is_on_the_disk_with_all_its_names_when_the_run_goes_on(node: StoreNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a folder whose last sync came before its last name a power cut may leave less than ``status`` says is there."""
    on_the_disk: dict[str, set[str]] = {}

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").resolve()
        if path.is_dir():
            on_the_disk[path.name] = {child.name for child in path.iterdir()}

    monkeypatch.setattr(os, "fsync", fsync)
    node.tester.verdicts["a:v1"] = ("bad", "no")
    node.run(node.lock(node.item("a:v1", A)))

    (folder,) = node.layout.quarantine.iterdir()
    assert on_the_disk["quarantine"] == {folder.name}
    assert on_the_disk[folder.name] == {child.name for child in folder.iterdir()}
    assert len(on_the_disk[folder.name]) == 1 + len(A)


def test_quarantine_is_bounded_and_the_oldest_goes(node: StoreNode) -> None:
    node.policy = changed(POLICY, quarantine_bytes=12_000)
    node.tester.verdicts["a:v1"] = ("bad", "no")
    lock = node.lock(node.item("a:v1", A))
    for _ in range(6):
        node.run(lock)

    assert len(list(node.layout.quarantine.iterdir())) == 2


def test_a_quarantine_that_cannot_be_kept_stops_nothing(node: StoreNode) -> None:
    node.run(node.lock())
    node.layout.quarantine.write_bytes(b"in the way")
    node.tester.verdicts["a:v1"] = ("bad", "no")

    outcome = node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))

    assert (outcome.failed, outcome.active) == (("a:v1",), ("b:v1",))


# -- what a clock wrote that was ahead -------------------------------------------------------------


def follow(node: StoreNode) -> None:
    with Ledger.writing(node.layout.ledger) as ledger:
        clock.follow(node.layout, ledger, node.clock(), node.clock.boot_time())


def test_a_partial_download_from_the_future_goes_a_week_after_the_clock_is_right(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(node.lock())
    folder = node.layout.staging / name_of(A["a.gguf"]).replace(":", "-")
    folder.mkdir()
    late = time.time() + 200 * 86400
    os.utime(folder, (late, late))

    follow(node)
    assert garbage(node, lock) == []
    node.clock.forward(seconds=PARTIAL_SECONDS + 60)
    assert garbage(node, lock) == [("partial", folder.name)]


def test_a_copy_that_was_set_aside_in_the_future_goes_a_week_after_the_clock_is_right(node: StoreNode) -> None:
    node.run(node.lock())
    path = node.layout.cold / "blobs/sha256/aa/.x.damaged"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"rot")
    os.utime(path)
    node.clock.move(timedelta(days=-200))
    before = path.lstat().st_ctime_ns

    follow(node)

    assert path.lstat().st_ctime_ns > before


def test_a_quarantined_model_of_a_clock_that_was_ahead_is_not_the_newest_for_ever(node: StoreNode) -> None:
    node.run(node.lock())
    with Ledger.writing(node.layout.ledger) as ledger:
        keeper = housekeeping(node, node.lock(), ledger)
        node.clock.move(timedelta(days=200))
        keeper.quarantine("a:v1", None, "first", "")
        node.clock.move(timedelta(days=-200))
        for detail in ("second", "third"):
            keeper.quarantine("a:v1", None, detail, "")
            newest = quarantine.newest(node.layout, "a:v1")
            assert newest is not None
            assert f'"detail": "{detail}"' in (newest / "record.json").read_text()


def test_what_a_server_was_last_told_of_stays_until_it_follows(node: StoreNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    (tree,) = [entry.tree for entry in generations.current(node.layout).entries.values()]
    wanted = node.lock(node.item("b:v1", B))
    serving.write(node.layout, 1, [ServerState(name="main", kind="http", generation=1)])
    node.run(wanted)
    node.clock.forward(days=30)
    assert not {("generation", "1"), ("tree", tree), ("blob", name_of(A["a.gguf"]))} & set(garbage(node, wanted))

    serving.write(node.layout, 2, [ServerState(name="main", kind="http", generation=2)])
    assert {("generation", "1"), ("tree", tree), ("blob", name_of(A["a.gguf"]))} <= set(garbage(node, wanted))
