"""What a run does, on a node made of memory twins: the order of effects, and that one model's trouble stays its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reconciler.core.errors import DiskFull, StoreError
from reconciler.core.events import RunEnded, RunStarted
from reconciler.ports import FetchFailed, Want
from tests.twins.content import Files, changed, name_of
from tests.twins.fetch import MemoryFetcher
from tests.twins.node import FACTS, POLICY, MemoryNode

A: Files = {"a.gguf": b"aaaa"}
B: Files = {"b.gguf": b"bbbb"}
C: Files = {"c.gguf": b"cccc"}


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode()


# -- installing ------------------------------------------------------------------------------------


def test_a_run_installs_tests_and_activates(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", {}, boxed=B))

    outcome = node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert (outcome.active, outcome.failed, outcome.changed) == (("a:v1", "b:v1"), (), True)
    assert sorted(node.tester.jobs) == ["a:v1", "b:v1"]
    assert [type(event) for event in (node.heard.events[0], node.heard.events[-1])] == [RunStarted, RunEnded]


def test_a_second_run_changes_nothing(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B))
    node.run(lock)
    before = (node.generations.active, dict(node.ledger.records), list(node.internet.asked), list(node.tester.jobs))

    outcome = node.run(lock)

    assert not outcome.changed
    assert not node.plan(lock).changes
    assert (node.generations.active, node.ledger.records, node.internet.asked, node.tester.jobs) == before


def test_a_blob_that_two_models_share_is_fetched_once(node: MemoryNode) -> None:
    shared = {"shared.bin": b"shared"}

    node.run(node.lock(node.item("a:v1", A | shared), node.item("b:v1", B | shared)))

    assert sorted(node.internet.asked) == sorted(name_of(data) for data in (b"aaaa", b"bbbb", b"shared"))
    assert set(node.active()) == {"a:v1", "b:v1"}


@pytest.mark.parametrize("trouble", ["wrong bytes", "bad test", "bad archive", "no entrypoint"])
def test_a_failed_model_never_takes_another_with_it(node: MemoryNode, trouble: str) -> None:
    bad = node.item("b:v1", B)
    if trouble == "wrong bytes":
        node.internet.pages[bad["artifacts"][0]["urls"][0]] = b"eeee"
    elif trouble == "bad test":
        node.tester.verdicts["b:v1"] = ("bad", "it says nothing")
    elif trouble == "bad archive":
        bad = node.item("b:v1", B | {"box": b"no tar"})
        bad["artifacts"][1]["unpack"] = "tar"
    else:
        bad = node.item("b:v1", {}, boxed=B, entrypoint="elsewhere.gguf")
    lock = node.lock(node.item("a:v1", A), bad, node.item("c:v1", C))

    outcome = node.run(lock)

    assert set(node.active()) == {"a:v1", "c:v1"}
    assert outcome.failed == ("b:v1",)
    record = node.ledger.records["b:v1"]
    assert (record.state, record.attempts) == ("failed", 1)
    assert record.last_error
    assert record.reason.startswith("failed-before: ")


def test_a_bug_of_this_program_is_blamed_on_no_model(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B), node.item("c:v1", C))
    node.tester.crashes.add("b:v1")

    outcome = node.run(lock)

    assert (outcome.internal_errors, outcome.failed, outcome.untested) == (("b:v1",), (), ())
    assert set(node.active()) == {"a:v1", "c:v1"}
    assert "b:v1" not in node.ledger.records
    assert node.housekeeping.quarantined == []
    assert node.heard.kinds() == ["internal-error"]
    node.tester.crashes.clear()
    node.run(lock)
    assert set(node.active()) == {"a:v1", "b:v1", "c:v1"}


def test_an_older_copy_serves_on_however_often_the_disk_refuses_the_new_one(node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DiskFull("no inodes are left")

    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", {"a.gguf": b"anew"}))
    with monkeypatch.context() as broken:
        broken.setattr(type(node.blobs), "adopt", refuse)
        for _ in range(3):
            node.run(lock)
            assert node.active() == {"a:v1": A}
            assert node.ops(lock) == {"a:v1": "install"}

    node.run(lock)

    assert node.active() == {"a:v1": {"a.gguf": b"anew"}}


@pytest.mark.parametrize("error", [DiskFull("no inodes are left"), StoreError("Read-only file system"), StoreError("File too large")])
@pytest.mark.parametrize("where", ["the tree", "the name of a blob", "the download"])
def test_what_the_disk_refuses_is_blamed_on_no_model(
    node: MemoryNode, monkeypatch: pytest.MonkeyPatch, error: StoreError, where: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    def refused(_self: object, wants: list[Want], _report: object) -> Iterator[FetchFailed]:
        for want in wants:
            yield FetchFailed(digest=want.digest, error=error)

    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B), node.item("c:v1", C))
    with monkeypatch.context() as broken:
        broken.setattr(type(node.trees), "assemble", refuse) if where == "the tree" else None
        broken.setattr(type(node.blobs), "adopt", refuse) if where == "the name of a blob" else None
        broken.setattr(MemoryFetcher, "fetch", refused) if where == "the download" else None
        outcome = node.run(lock)

    assert outcome.failed == ("a:v1", "b:v1", "c:v1")
    assert {record.state for record in node.ledger.records.values()} == {"absent"}
    assert all(error.message in record.reason and not record.attempts for record in node.ledger.records.values())
    assert node.housekeeping.quarantined == []
    assert node.heard.kinds() == ["disk-full"] * isinstance(error, DiskFull), "one incident, however many models"
    node.run(lock)
    assert set(node.active()) == {"a:v1", "b:v1", "c:v1"}


def test_a_repair_that_the_disk_refuses_ends_service_and_blames_nobody(node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.damage(next(iter(A.values())))

    def refuse(*_: object, **__: object) -> None:
        raise DiskFull("no space")

    with monkeypatch.context() as broken:
        broken.setattr(type(node.trees), "assemble", refuse)
        node.run(lock)

    assert node.active() == {}
    assert node.ledger.records["a:v1"].state == "pending"
    assert node.housekeeping.quarantined == []
    node.run(lock)
    assert set(node.active()) == {"a:v1"}


def test_a_bug_while_blobs_are_moved_leaves_every_model_as_it_was(node: MemoryNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(MemoryFetcher, "fetch", broken)

    outcome = node.run(node.lock(node.item("a:v1", A), node.item("b:v1", B)))

    assert (outcome.internal_errors, outcome.failed) == (("a:v1", "b:v1"), ())
    assert node.ledger.records == {}


# -- one test for one content ----------------------------------------------------------------------


def test_the_same_content_and_test_under_many_ids_is_tested_once(node: MemoryNode) -> None:
    lock = node.lock(*(node.item(f"m{number}:v1", A) for number in range(40)))

    node.run(lock)

    assert len(node.active()) == 40
    assert len(node.tester.jobs) == 1
    assert not node.plan(lock).changes


def test_a_pass_counts_for_an_id_that_is_listed_later(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", A))
    assert node.ops(lock) == {"b:v1": "enable"}

    node.run(lock)
    alone = node.lock(node.item("b:v1", A))
    node.run(alone)

    assert node.active() == {"b:v1": A}
    assert node.tester.jobs == ["a:v1"]
    assert not node.plan(alone).changes  # the pass is its own now: it does not go with the id that it came from


def test_a_pass_of_another_id_claims_no_device_that_did_not_run_it(node: MemoryNode) -> None:
    node.facts = changed(node.facts, device="NVIDIA X, driver 1")  # and the test job ran on the CPU beside it
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", A)))

    assert node.tester.jobs == ["a:v1"]
    assert (node.ledger.reports["b:v1"].device, node.ledger.reports["b:v1"].compared) == ("cpu", 9)


@pytest.mark.parametrize("other", ["test", "engine", "device", "tree"])
def test_a_pass_counts_for_nothing_that_it_does_not_depend_on(node: MemoryNode, other: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    second = node.item("b:v1", B if other == "tree" else A)
    if other == "test":
        second["smoke"] = {"prompt": "Other", "max_tokens": 4, "timeout": "60s"}
    if other == "engine":
        node.facts = changed(node.facts, engines={"llama-cpp": "0.3.99"})
    if other == "device":
        node.facts = changed(node.facts, device="another GPU")

    node.run(node.lock(node.item("a:v1", A), second))

    assert "b:v1" in node.tester.jobs or len(node.tester.jobs) == 2
    assert set(node.active()) == {"a:v1", "b:v1"}


def test_a_content_that_fails_its_test_fails_under_every_id(node: MemoryNode) -> None:
    node.tester.verdicts = {"a:v1": ("bad", "no"), "b:v1": ("bad", "no")}

    outcome = node.run(node.lock(node.item("a:v1", A), node.item("b:v1", A)))

    assert outcome.failed == ("a:v1", "b:v1")


def test_a_failed_model_is_tried_again_and_its_attempts_are_counted(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.tester.verdicts["a:v1"] = ("bad", "it says nothing")
    node.run(lock)

    node.run(lock)

    assert node.ledger.records["a:v1"].attempts == 2
    assert len(node.housekeeping.quarantined) == 2
    assert node.internet.asked == [name_of(b"aaaa")]  # its bytes were good: only the test is made again
    node.tester.verdicts.clear()
    node.run(lock)
    assert node.active() == {"a:v1": A}
    assert (node.ledger.records["a:v1"].attempts, node.ledger.records["a:v1"].last_error) == (0, "")


def test_a_test_that_could_not_run_leaves_it_pending_never_failed(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.tester.verdicts["a:v1"] = ("unable", "sandbox-unavailable: no bubblewrap")

    outcome = node.run(lock)

    assert (outcome.failed, outcome.untested) == ((), ("a:v1",))
    assert node.ledger.records["a:v1"].state == "pending"
    assert node.ledger.records["a:v1"].reason == "not-tested: sandbox-unavailable: no bubblewrap"
    assert node.active() == {}
    assert node.heard.kinds() == ["sandbox-unavailable"]
    assert node.ops(lock) == {"a:v1": "retest"}
    node.tester.verdicts.clear()
    node.run(lock)
    assert node.active() == {"a:v1": A}
    assert len(node.internet.asked) == 1


# -- what may not serve ----------------------------------------------------------------------------


class Watching(MemoryFetcher):
    """Remembers which models were active when the first byte was asked for."""

    seen: list[set[str]]

    def __init__(self, node: MemoryNode, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._node = node

    def fetch(self, *arguments):  # type: ignore[no-untyped-def]
        self._node.before_fetching = set(self._node.generations.active.entries)  # type: ignore[attr-defined]
        yield from super().fetch(*arguments)


@pytest.mark.parametrize("state", ["unlisted", "disabled"])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_the_network_takes_away_stops_serving_at_the_first_swap_before_any_fetch(
    node: MemoryNode, monkeypatch: pytest.MonkeyPatch, state: str, damaged: bool
) -> None:
    stays, other = node.item("c:v1", C), node.item("b:v1", B)
    node.run(node.lock(node.item("a:v1", A), stays))
    swaps = len(node.generations.sequence)
    monkeypatch.setattr("tests.twins.node.MemoryFetcher", lambda *arguments: Watching(node, *arguments))
    if damaged:
        node.damage(b"aaaa")
    items = [stays, other] if state == "unlisted" else [node.item("a:v1", A, state="disabled"), stays, other]

    node.run(node.lock(*items))

    assert node.before_fetching == {"c:v1"}  # type: ignore[attr-defined]
    assert set(node.generations.sequence[swaps].entries) == {"c:v1"}
    assert set(node.active()) == {"b:v1", "c:v1"}


def test_a_disabled_model_is_kept_and_enabled_without_a_download_or_a_test(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("a:v1", A, state="disabled")))
    assert node.active() == {}
    assert node.ledger.records["a:v1"].state == "inactive"
    asked, jobs = list(node.internet.asked), list(node.tester.jobs)

    lock = node.lock(node.item("a:v1", A))
    assert node.ops(lock) == {"a:v1": "enable"}
    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert (node.internet.asked, node.tester.jobs) == (asked, jobs)


def test_many_are_enabled_in_one_swap(node: MemoryNode) -> None:
    names = [f"m{number}:v1" for number in range(5)]
    files = [{"m.gguf": name.encode()} for name in names]
    node.run(node.lock(*map(node.item, names, files)))
    node.run(node.lock(*(node.item(name, data, state="disabled") for name, data in zip(names, files, strict=True))))
    swaps = len(node.generations.sequence)

    node.run(node.lock(*map(node.item, names, files)))

    assert [set(made.entries) for made in node.generations.sequence[swaps:]] == [set(names)]


def test_a_disabled_model_in_doubt_never_loops(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", A, state="disabled"))
    node.run(lock)
    node.facts = changed(FACTS, engines={"llama-cpp": "0.4.0"})
    node.blobs.doubtful.add(name_of(b"aaaa"))

    assert not node.plan(lock).changes
    node.run(lock)
    assert not node.plan(lock).changes


# -- versions --------------------------------------------------------------------------------------


def test_the_old_version_leaves_in_the_very_swap_that_brings_the_new_one(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    swaps = len(node.generations.sequence)

    node.run(node.lock(node.item("a:v1", A, state="archived"), node.item("a:v2", B)))

    assert [set(made.entries) for made in node.generations.sequence[swaps:]] == [{"a:v2"}]
    assert node.blobs.cold == {name_of(b"aaaa"): b"aaaa"}
    assert node.ledger.records["a:v1"].state == "archived"


@pytest.mark.parametrize("verdict", ["bad", "unable", "not fetched", "left out"])
def test_the_old_version_serves_while_the_new_one_is_not_there(node: MemoryNode, verdict: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    lock = node.lock(node.item("a:v1", A, state="archived"), node.item("a:v2", B))
    if verdict == "not fetched":
        node.internet.remove(b"bbbb")
    elif verdict == "left out":
        node.policy = changed(POLICY, excluded=("a:v2",))
    else:
        node.tester.verdicts["a:v2"] = (verdict, "no")

    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert node.blobs.cold == {}
    assert node.ops(lock)["a:v1"] == "archive"
    node.tester.verdicts.clear()
    node.internet.add(b"bbbb")
    node.policy = POLICY
    node.run(lock)
    assert node.active() == {"a:v2": B}
    assert node.ops(lock) == {}


def test_an_archived_model_comes_back_from_cold_storage_without_a_download(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("a:v1", A, state="archived")))
    assert (node.active(), node.blobs.hot) == ({}, {})
    node.internet.pages.clear()

    lock = node.lock(node.item("a:v1", A, serve=False))
    assert node.ops(lock) == {"a:v1": "restore"}
    node.run(lock)

    assert node.active() == {"a:v1": A}
    assert node.blobs.cold == {}
    assert node.internet.asked == [name_of(b"aaaa")]


def test_what_rotted_in_cold_storage_is_fetched(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("a:v1", A, state="archived")))
    node.blobs.cold[name_of(b"aaaa")] = b"rot!"

    node.run(node.lock(node.item("a:v1", A)))

    assert node.active() == {"a:v1": A}
    assert "blob-damaged" in node.heard.kinds()
    assert len(node.internet.asked) == 2


def test_a_move_to_cold_storage_that_was_cut_short_is_finished(node: MemoryNode) -> None:
    two = A | {"more.bin": b"more"}
    node.run(node.lock(node.item("a:v1", two)))
    lock = node.lock(node.item("a:v1", two, state="archived"))
    node.run(node.lock(node.item("a:v1", two, state="disabled")))
    node.blobs.archive(name_of(b"more"))  # and then the plug was pulled

    assert node.ops(lock) == {"a:v1": "archive"}
    node.run(lock)

    assert set(node.blobs.cold) == {name_of(b"aaaa"), name_of(b"more")}
    assert node.ops(lock) == {}


def test_a_blob_that_an_archived_model_shared_moves_when_nobody_else_needs_it(node: MemoryNode) -> None:
    shared = {"shared.bin": b"shared"}
    node.run(node.lock(node.item("a:v1", A | shared), node.item("b:v1", B | shared)))
    node.run(node.lock(node.item("a:v1", A | shared, state="archived"), node.item("b:v1", B | shared)))
    assert set(node.blobs.cold) == {name_of(b"aaaa")}

    lock = node.lock(node.item("a:v1", A | shared, state="archived"))
    node.run(lock)

    assert set(node.blobs.cold) == {name_of(b"aaaa"), name_of(b"shared")}
    assert node.ops(lock) == {}


# -- content that changes --------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["bad", "unable"])
def test_bad_new_content_keeps_the_old_copy_active(node: MemoryNode, verdict: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.tester.verdicts["a:v1"] = (verdict, "no")
    lock = node.lock(node.item("a:v1", B))

    outcome = node.run(lock)

    assert node.active() == {"a:v1": A}
    assert outcome.failed == (("a:v1",) if verdict == "bad" else ())
    (change,) = node.plan(lock).models
    assert (change.op, change.from_, change.reason.partition(":")[0]) == (
        "install", "active", "failed-before" if verdict == "bad" else "not-tested"
    )  # fmt: skip
    node.run(lock)
    assert node.active() == {"a:v1": A}
    node.tester.verdicts.clear()
    node.run(lock)
    assert node.active() == {"a:v1": B}
    assert node.ops(lock) == {}


def test_an_old_copy_that_rots_while_the_new_one_fails_is_not_served(node: MemoryNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.tester.verdicts["a:v1"] = ("bad", "no")
    lock = node.lock(node.item("a:v1", B))
    node.run(lock)
    node.damage(b"aaaa")

    node.run(lock)

    assert node.active() == {}
    assert "blob-damaged" in node.heard.kinds()


@pytest.mark.parametrize("what", ["tasks", "runtime"])
def test_what_the_snapshot_says_anew_of_the_same_content_reaches_the_index(node: MemoryNode, what: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    runtime = {"engine": "llama-cpp", "version": ">=0.3"}
    said: dict[str, Any] = {"tasks": ["chat", "completion"]} if what == "tasks" else {"runtime": runtime}
    lock = node.lock(node.item("a:v1", A, **said))
    assert node.ops(lock) == {"a:v1": "retest"}

    node.run(lock)

    entry = node.generations.active.entries["a:v1"]
    assert (entry.tasks, entry.runtime) == (lock.model[0].tasks, lock.model[0].runtime)
    assert node.ops(lock) == {}


# -- retests ---------------------------------------------------------------------------------------

DUE: dict[str, Callable[[MemoryNode], None]] = {
    "runtime-changed": lambda node: setattr(node, "facts", changed(FACTS, engines={"llama-cpp": "0.3.99"})),
    "device-changed": lambda node: setattr(node, "facts", changed(FACTS, device="a GPU")),
    "retest-due": lambda node: node.clock.forward(days=8),
    "unverified": lambda node: node.blobs.doubtful.add(name_of(b"aaaa")),
}


@pytest.mark.parametrize("why", DUE)
@pytest.mark.parametrize("verdict", ["passed", "bad", "unable", "crash"])
def test_a_retest_decides_whether_a_model_goes_on(node: MemoryNode, why: str, verdict: str) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("c:v1", C), retest_after="7d")
    node.run(lock)
    DUE[why](node)
    if verdict == "crash":
        node.tester.crashes.add("a:v1")
    else:
        node.tester.verdicts["a:v1"] = (verdict, "" if verdict == "passed" else "the GPU is busy")
    change = next(change for change in node.plan(lock).models if change.id == "a:v1")
    assert (change.op, change.reason.partition(":")[0]) == ("retest", why)

    node.run(lock)

    stays = verdict in {"passed", "unable", "crash"}  # a fault of ours is not the model's
    assert set(node.active()) == ({"a:v1", "c:v1"} if stays else {"c:v1"})
    assert node.ledger.records["a:v1"].state == ("active" if stays else "failed")
    assert len(node.internet.asked) == 2
    settled = verdict == "passed" or (stays and why == "unverified")  # it was hashed, and that was all the doubt
    assert (node.ops(lock).get("a:v1") is None) == settled


def test_a_failed_retest_whose_record_outran_its_swap_still_ends_it(node: MemoryNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    node.ledger.records["a:v1"] = changed(node.ledger.records["a:v1"], state="failed")  # the plug was pulled before the swap
    node.tester.verdicts["a:v1"] = ("bad", "no")

    node.run(lock)

    assert node.active() == {}
