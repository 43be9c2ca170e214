"""
A node's life as a random walk: whatever the network says, whatever breaks, whenever the machine starts anew.

``Expected`` is the model to compare with. After each run the contract's invariants hold; after a run in which nothing went wrong, what is
active is exactly what the network enabled, and there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reconciler.core import lifecycle
from reconciler.core.errors import DiskFull
from reconciler.core.lock import Lock
from reconciler.core.state import Generation
from reconciler.store import generations
from tests.storenode import StoreNode
from tests.twins.content import Files, name_of
from tests.twins.fetch import Internet

IDS = ("a:v1", "a:v2", "b:v1", "c:v1")
CONTENTS: tuple[Files, ...] = ({"m": b"one" * 9}, {"m": b"two" * 9, "n": b"shared" * 9}, {"m": b"three" * 9, "n": b"shared" * 9})
BOXED: Files = {"m": b"four" * 9, "box/n": b"shared" * 9}
GRACE = timedelta(hours=24)

Listed = dict[str, tuple[int, str]]


class Expected:
    """The model: what the network lists, what was ever approved under an id, and whose test job fails now."""

    def __init__(self) -> None:
        self.listed: Listed = {}
        self.approved: dict[str, list[Files]] = {name: [] for name in IDS}
        #: Models whose test job does not pass now, with its verdict.
        self.troubled: dict[str, str] = {}
        self.server = "well"
        self.sick = False

    def say(self, listed: Listed) -> None:
        self.listed = listed
        for name, (content, _) in listed.items():
            self.approved[name].append(files(content))

    def enabled(self) -> dict[str, Files]:
        return {name: files(content) for name, (content, state) in self.listed.items() if state == "enabled"}

    def may_serve(self) -> set[str]:
        """Return who may be active: what is enabled, and an archived version that waits for its successor."""
        waiting = {name for name, (_, state) in self.listed.items() if state == "archived" and self._has_successor(name)}
        return {*self.enabled(), *waiting}

    def _has_successor(self, name: str) -> bool:
        return any(other != name and other.partition(":")[0] == name.partition(":")[0] for other in self.enabled())

    @property
    def clean(self) -> bool:
        """Whether a run must succeed now."""
        return not (self.troubled.keys() & self.enabled().keys() or self.server != "well" or self.sick)


class Killed(BaseException):
    """The run ends here, as by kill -9."""


def _kill(_: Generation) -> str:
    raise Killed


def files(content: int) -> Files:
    return (*CONTENTS, BOXED)[content]


contents = st.integers(0, 3)
states = st.sampled_from(["enabled", "enabled", "disabled", "archived"])
names = st.sampled_from(IDS)


class Life(RuleBasedStateMachine):
    """A node with a real store; the downloader and the engine are twins."""

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
        self.internet = Internet()
        self.node = StoreNode(self.folder, self.internet)
        self.node.policy = msgspec.structs.replace(self.node.policy, grace_seconds=GRACE.total_seconds(), generations=3)
        self.expected = Expected()
        self.ran = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # -- what the network says

    @initialize(listed=st.dictionaries(names, st.tuples(contents, st.just("enabled")), min_size=1))
    def begin(self, listed: Listed) -> None:
        self.expected.say(listed)
        self.publish()

    def publish(self) -> None:
        items = []
        for name, (content, state) in self.expected.listed.items():
            own, boxed = ({}, BOXED) if content == 3 else (CONTENTS[content], None)
            items.append(self.node.item(name, own, boxed=boxed, state=state))
        self.lock: Lock = self.node.lock(*items)

    @rule(name=names, content=contents, state=states)
    def lists(self, name: str, content: int, state: str) -> None:
        self.expected.say({**self.expected.listed, name: (content, state)})
        self.publish()

    @precondition(lambda self: self.expected.listed)
    @rule(name=names, state=st.sampled_from(["enabled", "disabled", "archived"]))
    def changes(self, name: str, state: str) -> None:
        if name in self.expected.listed:
            self.lists(name, self.expected.listed[name][0], state)

    @rule(name=names)
    def unlists(self, name: str) -> None:
        self.expected.say({one: said for one, said in self.expected.listed.items() if one != name})
        self.publish()

    # -- what breaks

    @rule(index=st.integers(0, 9), seen=st.booleans())
    def a_blob_rots(self, index: int, seen: bool) -> None:
        held = sorted(self.node.layout.blobs.glob("*/*/*"))
        if held:
            path = held[index % len(held)]
            before = path.stat()
            data = path.read_bytes()
            path.chmod(0o644)
            path.write_bytes(b"rot" + data[3:])
            path.chmod(0o444)
            if not seen:  # nothing but a hash can tell: it is found by verify alone, so the blob's standing is taken from it
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    @rule(index=st.integers(0, 9))
    def a_cold_blob_rots(self, index: int) -> None:
        held = sorted((self.node.layout.cold / "blobs").glob("*/*/*"))
        if held:
            path = held[index % len(held)]
            path.chmod(0o644)
            path.write_bytes(b"rot" + path.read_bytes()[3:])
            path.chmod(0o444)

    @rule()
    def the_ledger_is_lost(self) -> None:
        self.node.layout.ledger.unlink(missing_ok=True)

    @rule()
    def the_generations_are_lost(self) -> None:
        if self.node.layout.generations.exists():
            shutil.rmtree(self.node.layout.generations)

    @rule(answer=st.sampled_from(["well", "lies", "nothing"]))
    def the_server(self, answer: str) -> None:
        self.expected.server = answer

    @rule(name=names, verdict=st.sampled_from(["passed", "passed", "bad", "unable"]))
    def a_test_job(self, name: str, verdict: str) -> None:
        self.expected.troubled.pop(name, None)
        self.node.tester.verdicts.pop(name, None)
        if verdict != "passed":
            self.expected.troubled[name] = verdict
            self.node.tester.verdicts[name] = (verdict, "it says nothing")

    @rule(sick=st.booleans())
    def the_health_check(self, sick: bool) -> None:
        self.expected.sick = sick
        self.node.hooks.verdict = lambda _: "sick" if sick else ""

    @rule(device=st.sampled_from(["cpu", "another"]), version=st.sampled_from(["0.3.36", "0.3.37"]))
    def the_node(self, device: str, version: str) -> None:
        self.node.facts = msgspec.structs.replace(self.node.facts, device=device, engines={"llama-cpp": version})

    @rule()
    def the_disk_fills_up(self) -> None:
        """A run finds no room; what may not serve stops all the same."""
        facts = self.node.facts
        self.node.facts = msgspec.structs.replace(facts, disk_free_bytes=0)
        try:
            self.node.run(self.lock)
        except DiskFull:
            assert set(self.node.active()) <= self.expected.may_serve() | set(self.expected.listed)
            assert list(self.node._active_faults(self.expected.approved)) == []
        finally:
            self.node.facts = facts

    # -- time

    @rule(hours=st.sampled_from([1, 23, 25]))
    def time_passes(self, hours: int) -> None:
        self.node.clock.forward(hours=hours)

    @rule()
    def the_machine_starts_anew(self) -> None:
        before, self.node = self.node, StoreNode(self.folder, self.internet, self.node.network)
        for name in ("policy", "clock", "tester", "servers", "hooks", "facts"):
            setattr(self.node, name, getattr(before, name))

    @rule()
    def a_run_is_killed_while_it_asks(self) -> None:
        """Right after a swap, before the operator's command has answered and the swap is in the history."""
        verdict = self.node.hooks.verdict
        self.node.hooks.verdict = _kill
        try:
            with contextlib.suppress(Killed):
                self.node.run(self.lock)
        finally:
            self.node.hooks.verdict = verdict
        self.ran = True
        retiring = {name for name, (_, state) in self.expected.listed.items() if state == "archived"}  # that is a run's last step
        assert set(self.node.active()) <= self.expected.may_serve() | retiring

    # -- what the node does

    @rule()
    def runs(self) -> None:
        pages, newest = dict(self.internet.pages), max(generations.numbers(self.node.layout), default=0)
        if self.expected.server != "well":
            self.internet.pages = {url: b"lie" + data for url, data in pages.items() if self.expected.server == "lies"}
        try:
            outcome = self.node.run(self.lock)
        finally:
            self.internet.pages = pages
        self.ran = True
        assert set(self.node.active()) <= self.expected.may_serve()
        assert set(outcome.failed) <= self.expected.listed.keys()
        earlier = [number for number in generations.numbers(self.node.layout) if number <= newest]
        assert len(earlier) <= 2 * self.node.policy.generations + 1, "what runs left that were killed or went back goes too"
        assert list(self.node._active_faults(self.expected.approved)) == []
        if self.expected.clean:
            self.settled()

    def settled(self) -> None:
        """
        A second run may have to finish: what rotted in cold storage was noticed when it was restored. What the node was not healthy with is
        tried within a day, one model a run. A run after that does nothing.
        """
        self.node.run(self.lock)
        for _ in IDS:
            if lifecycle.paused(self.lock, self.node.state(), self.node.clock()):
                self.node.clock.forward(hours=25)
            elif not self.node.plan(self.lock).changes:
                break
            self.node.run(self.lock)
        assert self.node.active() == self.expected.enabled()
        assert list(self.node._tree_faults()) == []
        made = self.node.plan(self.lock)
        assert not made.changes, made
        number = generations.current(self.node.layout).number
        assert not self.node.run(self.lock).changed
        assert generations.current(self.node.layout).number == number

    # -- what always holds

    @precondition(lambda self: self.ran)
    @rule()
    def looks(self) -> None:
        """A plan and a status leave no trace, at any time."""
        self.node.plan(self.lock)

    @invariant()
    def the_index_and_its_links_agree(self) -> None:
        if self.ran and self.node.layout.active.exists():
            for model, entry in generations.current_or_empty(self.node.layout).entries.items():
                link = self.node.layout.active / entry.path
                assert link.is_dir(), f"{model} leads nowhere"

    @invariant()
    def nothing_half_made_lies_about(self) -> None:
        assert self.node.leftovers() == []


Life.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining takes minutes here
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLife = pytest.mark.slow(Life.TestCase)


def test_what_a_member_of_another_models_archive_is_made_of_stays_when_a_model_goes_to_cold_storage(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    node.run(node.lock(node.item("a:v1", CONTENTS[1])))
    lock = node.lock(node.item("a:v1", CONTENTS[1], state="archived"), node.item("a:v2", {}, boxed=BOXED))

    node.run(lock)

    assert node.active() == {"a:v2": BOXED}
    assert node.faults({"a:v2": [BOXED]}) == []
    assert not node.plan(lock).changes
    assert node.states(lock)["a:v1"] == "archived"


def test_a_failed_model_that_a_killed_run_let_serve_stops_when_the_network_disables_it(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    lock = node.lock(node.item("a:v1", CONTENTS[0]))
    node.hooks.verdict = lambda _: "sick"
    node.run(lock)
    node.clock.forward(minutes=11)
    node.hooks.verdict = _kill
    with pytest.raises(Killed):
        node.run(lock)
    assert set(node.active()) == {"a:v1"}
    disabled = node.lock(node.item("a:v1", CONTENTS[0], state="disabled"))

    node.run(disabled)

    assert node.active() == {}
    assert node.states(disabled) == {"a:v1": "inactive"}
    node.hooks.verdict = lambda _: ""
    node.run(lock)
    assert set(node.active()) == {"a:v1"}


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("trouble", ["not healthy", "lies"])
def test_an_older_copy_that_a_lost_ledger_forgot_is_hashed_before_it_serves_on(tmp_path: Path, trouble: str, *, boxed: bool) -> None:
    node = StoreNode(tmp_path)
    first = BOXED if boxed else CONTENTS[1]
    node.run(node.lock(node.item("a:v1", {}, boxed=BOXED) if boxed else node.item("a:v1", CONTENTS[1])))
    other = node.lock(node.item("a:v1", CONTENTS[0]))
    node.layout.ledger.unlink()
    if trouble == "not healthy":
        node.hooks.verdict = lambda _: "sick"
    else:
        node.internet.pages = dict.fromkeys(node.internet.pages, b"lie")

    node.run(other)

    assert node.active() == {"a:v1": first}, "what is whole serves on"
    node.layout.ledger.unlink()
    blob = node.layout.blob(name_of(first["m"]))
    blob.chmod(0o644)
    blob.write_bytes(b"ROT" + first["m"][3:])
    blob.chmod(0o444)
    node.run(other)
    assert node.active() == {}


@pytest.mark.parametrize("what", ["a file is gone", "one too many", "a link to the very bytes", "other bytes"])
def test_an_older_copy_that_a_lost_ledger_forgot_is_not_believed_when_its_links_are_other(tmp_path: Path, what: str) -> None:
    node = StoreNode(tmp_path)
    node.run(node.lock(node.item("a:v1", CONTENTS[1])))
    other = node.lock(node.item("a:v1", CONTENTS[0]))
    node.layout.ledger.unlink()
    folder = node.layout.active / "models/a/v1"
    match what:
        case "a file is gone":
            (folder / "n").unlink()
        case "one too many":
            (folder / "more").write_bytes(b"more")
        case "a link to the very bytes":
            (folder / "n").unlink()
            (folder / "n").symlink_to(node.layout.blob(name_of(CONTENTS[1]["n"])))
        case _:
            (folder / "n").unlink()
            (folder / "n").write_bytes(CONTENTS[1]["n"])
    node.internet.pages = dict.fromkeys(node.internet.pages, b"lie")

    node.run(other)

    assert node.active() == {}


def test_a_lost_generation_is_made_anew_though_nothing_can_serve(tmp_path: Path) -> None:
    node = StoreNode(tmp_path)
    lock = node.lock(node.item("a:v1", CONTENTS[0]))
    node.run(lock)
    blob = node.layout.blob(name_of(CONTENTS[0]["m"]))
    blob.chmod(0o644)
    blob.write_bytes(b"ROT" * 9)
    blob.chmod(0o444)
    shutil.rmtree(node.layout.generations)
    node.internet.pages = dict.fromkeys(node.internet.pages, b"lie")

    node.run(lock)

    assert node.active() == {}


# -- what serves on without any work


def _rot(node: StoreNode, data: bytes) -> None:
    path = node.layout.blob(name_of(data))
    path.chmod(0o644)
    path.write_bytes(b"rot" + data[3:])
    path.chmod(0o444)


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[StoreNode, Lock]:
    """A node that serves an older content, since it was not healthy with the listed one, which it tries again later."""
    node = StoreNode(tmp_path)
    node.run(node.lock(node.item("a:v1", CONTENTS[1])))
    lock = node.lock(node.item("a:v1", CONTENTS[2]))
    node.hooks.verdict = lambda _: "sick"
    node.run(lock)
    node.hooks.verdict = lambda _: ""
    assert node.active() == {"a:v1": CONTENTS[1]}
    return node, lock


def test_an_older_content_serves_until_the_pause_of_the_listed_one_is_over(waiting: tuple[StoreNode, Lock]) -> None:
    node, lock = waiting
    for _ in range(3):
        node.run(lock)
        assert node.active() == {"a:v1": CONTENTS[1]}
    assert node.state().records["a:v1"].attempts == 1

    node.clock.forward(minutes=11)
    node.run(lock)

    assert node.active() == {"a:v1": CONTENTS[2]}


def test_an_older_content_that_serves_meanwhile_is_hashed_when_its_file_changes(waiting: tuple[StoreNode, Lock]) -> None:
    node, lock = waiting
    _rot(node, CONTENTS[1]["m"])

    assert node.plan(lock).changes
    node.run(lock)

    assert node.active() == {}
    assert not node.plan(lock).changes


@pytest.mark.parametrize("name", ["m", "more"])
def test_an_older_content_that_serves_meanwhile_stops_when_its_folder_has_another_file(waiting: tuple[StoreNode, Lock], name: str) -> None:
    node, lock = waiting
    folder = (node.layout.active / "models/a/v1").resolve()
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(b"other")

    node.run(lock)

    assert node.active() == {}


@pytest.mark.parametrize("damaged", [True, False])
def test_a_model_that_the_node_cannot_run_any_more_is_hashed_when_its_file_changes(tmp_path: Path, damaged: bool) -> None:
    node = StoreNode(tmp_path)
    lock = node.lock(node.item("a:v1", CONTENTS[1]), node.item("b:v1", CONTENTS[0]))
    node.run(lock)
    node.facts = msgspec.structs.replace(node.facts, engines={})
    path = node.layout.blob(name_of(CONTENTS[1]["m"]))
    if damaged:
        _rot(node, CONTENTS[1]["m"])
    else:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    node.run(lock)

    assert node.active() == {"b:v1": CONTENTS[0]} | ({} if damaged else {"a:v1": CONTENTS[1]})
    node.run(lock)
    assert not node.plan(lock).changes


@pytest.mark.parametrize("how", ["other bytes", "fewer bytes", "a file is gone"])
def test_what_serves_and_is_damaged_stops_though_the_disk_has_no_room(tmp_path: Path, how: str) -> None:
    node = StoreNode(tmp_path)
    a, b = node.item("a:v1", CONTENTS[1]), node.item("b:v1", CONTENTS[0])
    node.run(node.lock(a, b))
    lock = node.lock(a, b, node.item("c:v1", CONTENTS[2]))
    if how == "other bytes":
        _rot(node, CONTENTS[1]["m"])
    elif how == "fewer bytes":
        path = node.layout.blob(name_of(CONTENTS[1]["m"]))
        path.chmod(0o644)
        path.write_bytes(CONTENTS[1]["m"][1:])
    else:
        (node.layout.active / "models/a/v1/m").unlink()
    facts = node.facts
    node.facts = msgspec.structs.replace(facts, disk_free_bytes=0)

    with pytest.raises(DiskFull):
        node.run(lock)

    assert node.active() == {"b:v1": CONTENTS[0]}
    node.facts = facts
    node.run(lock)
    assert node.active() == {"a:v1": CONTENTS[1], "b:v1": CONTENTS[0], "c:v1": CONTENTS[2]}
