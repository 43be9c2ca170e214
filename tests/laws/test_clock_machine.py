"""
A clock that is moved at will, between runs and within one: no byte goes before its grace, none stays past it, and nobody is locked out.

``Bytes`` walks a node with a real store through settings of its clock and restarts of its machine; ``Acceptance`` a node that is served
old and new snapshots, by a clock that is right or wrong.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from reconciler.core import units
from reconciler.core.errors import NotYetValid, Rollback, TrustError
from reconciler.core.events import Incident
from reconciler.core.state import Generation, Passed
from reconciler.ports import TestReport
from reconciler.store.clock import BootTime, ClockReading, counted_seconds, next_reading, run_clock
from reconciler.store.ledger import COLD_VERIFIED, Ledger, Verification
from tests.hostile_network import HostileNetwork, Node
from tests.network import payload_of
from tests.storenode import StoreNode, memory
from tests.twins.content import Files, name_of

GRACE = timedelta(hours=24)
#: A clock that was moved by less than a second was not set.
SLACK = timedelta(minutes=1)
IDS = ("a:v1", "b:v1", "c:v1")
#: How far a wrong clock is from the right one.
WRONG = (
    timedelta(days=-5),
    timedelta(days=200),
    timedelta(days=-56 * 365),
    timedelta(minutes=-90),
    timedelta(hours=30),
    timedelta(seconds=-1),
)
errors = st.sampled_from([*WRONG, timedelta()])


def files(model: str) -> Files:
    return {"m": model.encode() * 9}


class Bytes(RuleBasedStateMachine):
    """The model counts true time, which the node cannot see across restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=memory()))
        self.node = StoreNode(self.folder)
        self.node.policy = replace(self.node.policy, grace_seconds=GRACE.total_seconds())
        self.true = timedelta()
        self.error = timedelta()
        #: When the machine started, or the last run since then was.
        self.counted_from = timedelta()
        self.listed: set[str] = set()
        #: For each model that a run found unlisted: when, and the time since then in which the machine certainly ran.
        self.unlisted: dict[str, tuple[timedelta, timedelta]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        self.listed = set(IDS)
        self.runs()

    @rule(listed=st.sets(st.sampled_from(IDS)))
    def the_network_lists(self, listed: set[str]) -> None:
        self.listed = listed

    @rule(hours=st.sampled_from([1, 11, 13, 25]))
    def time_passes(self, hours: int) -> None:
        self.node.clock.forward(hours=hours)
        self.true += timedelta(hours=hours)

    @rule(error=errors)
    def the_clock_is_set(self, error: timedelta) -> None:
        self.node.clock.move(error - self.error)
        self.error = error

    @rule(error=errors, hours=st.sampled_from([0, 1, 100]))
    def the_machine_restarts(self, error: timedelta, hours: int) -> None:
        self.time_passes(hours)
        self.node.clock.restart()
        self.counted_from = self.true
        self.the_clock_is_set(error)

    @rule(error=errors)
    def the_clock_is_set_in_the_middle_of_a_run(self, error: timedelta) -> None:
        def healthy(_: Generation) -> str:
            self.the_clock_is_set(error)
            return ""

        self.node.hooks.verdict = healthy
        try:
            self.runs()
        finally:
            self.node.hooks.verdict = lambda _: ""

    @rule()
    def runs(self) -> None:
        self._account()
        error = self.error
        known = set(self.folder.glob("store/generations/[0-9]*"))
        self.node.run(self.node.lock(*(self.node.item(model, files(model)) for model in sorted(self.listed))))
        for path in set(self.folder.glob("store/generations/[0-9]*")) - known:  # a file system writes the time of the same clock
            at = (self.node.clock() + error - self.error).timestamp()
            os.utime(path, (at, at))
        self._check()

    def _account(self) -> None:
        passed, self.counted_from = self.true - self.counted_from, self.true
        self.unlisted = {model: (at, counted + passed) for model, (at, counted) in self.unlisted.items()}
        for model in IDS:
            if model in self.listed:
                self.unlisted.pop(model, None)
            else:
                self.unlisted.setdefault(model, (self.true, timedelta()))

    def _check(self) -> None:
        assert set(self.node.active()) == self.listed
        for model, (at, counted) in self.unlisted.items():
            here = self.node.layout.blob(name_of(files(model)["m"])).exists()
            if self.true - at < GRACE:
                assert here, f"{model} went after {self.true - at}"
            if counted >= GRACE + SLACK:
                assert not here, f"{model} is here after {counted} in which the machine ran"

    @invariant()
    def an_age_is_never_below_zero(self) -> None:
        for record in self.node.state().records.values():
            if record.unlisted_since is not None:
                assert units.age_seconds(record.unlisted_since, self.node.clock()) >= 0


Bytes.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=16,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestBytes = Bytes.TestCase


class Acceptance(RuleBasedStateMachine):
    """A node that hears of snapshots by whatever clock it has."""

    def __init__(self) -> None:
        super().__init__()
        self.network = HostileNetwork(snapshot_keys=2, snapshot_threshold=2)
        self.node = Node(self.network)
        self.publish()

    @rule()
    def publish(self) -> None:
        self.network.publish(self.network.model("a:v1"), expires_at="2036-01-01T00:00:00Z")

    @rule(hours=st.integers(1, 48))
    def time_passes(self, hours: int) -> None:
        self.network.pass_time(hours=hours)

    @rule(error=errors)
    def the_clock_is_set(self, error: timedelta) -> None:
        self.node.clock_error = error

    @rule(back=st.integers(1, 3))
    def an_old_snapshot_is_served(self, back: int) -> None:
        self.network.served = self.network.snapshots[-back:][0]

    @rule()
    def the_current_snapshot_is_served(self) -> None:
        self.network.served = self.network.snapshots[-1]

    @rule()
    def syncs(self) -> None:
        served, accepted = payload_of(self.network.served)["version"], self.node.trust_state.version
        try:
            self.node.sync()
        except TrustError as error:
            assert self.node.trust_state.version == accepted
            if served >= accepted:
                assert isinstance(error, NotYetValid), error  # noqa: PT017  a refusal is one of the lawful answers
                assert self.node.clock_error < timedelta(), "locked out by a clock that is not behind"
            else:
                assert isinstance(error, Rollback | NotYetValid)  # noqa: PT017  as above
        else:
            assert self.node.trust_state.version == served >= accepted

    @precondition(lambda self: not self.node.clock_error)
    @rule()
    def a_right_clock_accepts_the_current_snapshot(self) -> None:
        self.network.served = self.network.snapshots[-1]
        self.node.sync()


Acceptance.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestAcceptance = Acceptance.TestCase


# -- one by one ------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def node(tmp_path: Path) -> StoreNode:
    made = StoreNode(tmp_path)
    made.policy = replace(made.policy, grace_seconds=GRACE.total_seconds())
    made.run(made.lock(made.item("a:v1", files("a:v1"))))
    made.run(made.lock())
    return made


def is_here(node: StoreNode) -> bool:
    node.run(node.lock())
    return node.layout.blob(name_of(files("a:v1")["m"])).exists()


@pytest.mark.parametrize("error", WRONG)
def test_bytes_stay_for_their_grace_and_go_after_it_by_a_clock_that_was_wrong_for_one_run(node: StoreNode, error: timedelta) -> None:
    node.clock.move(error)
    assert is_here(node)
    node.clock.move(-error)
    node.clock.forward(hours=23)
    assert is_here(node)
    node.clock.forward(hours=2)
    assert not is_here(node)


def test_a_machine_that_starts_with_a_clock_that_is_ahead_loses_nothing_by_it(node: StoreNode) -> None:
    node.clock.restart()
    node.clock.move(timedelta(days=200))
    assert is_here(node)
    node.clock.restart()
    node.clock.move(timedelta(days=-200))
    assert is_here(node)


@pytest.mark.parametrize("days", [-56 * 365, -1, 0, 30, 200])
def test_restarts_in_a_row_with_any_clock_end_no_grace_early(node: StoreNode, days: int) -> None:
    for _ in range(5):
        node.clock.restart()
        node.clock.move(timedelta(days=days))
        assert is_here(node)


def test_a_machine_that_was_off_for_long_lets_the_bytes_go_once_it_ran_for_the_grace(node: StoreNode) -> None:
    node.clock.restart()
    node.clock.move(timedelta(days=30))
    assert is_here(node)
    node.clock.forward(hours=23)
    assert is_here(node)
    node.clock.forward(hours=2)
    assert not is_here(node)


def test_a_machine_that_restarts_each_day_lets_the_bytes_go(node: StoreNode) -> None:
    """A run an hour after each start: an hour of each day counts."""
    for _ in range(23):
        node.clock.restart()
        node.clock.forward(hours=1)
        assert is_here(node)
    for _ in range(2):
        node.clock.restart()
        node.clock.forward(hours=1)
    assert not is_here(node)


def test_a_record_of_a_time_in_the_future_that_nothing_explains_counts_as_now(node: StoreNode) -> None:
    with Ledger.writing(node.layout.ledger) as ledger:
        ledger.set_fact("clock", None)
        for record in ledger.records().values():
            ledger.put(replace(record, unlisted_since=node.clock() + timedelta(days=200)))
    assert is_here(node)
    node.clock.forward(hours=23)
    assert is_here(node)
    node.clock.forward(hours=2)
    assert not is_here(node)


def test_a_suspended_machine_ages_what_it_holds(node: StoreNode) -> None:
    """CLOCK_BOOTTIME goes on while a machine sleeps, and so does the clock."""
    node.clock.forward(hours=25)
    assert not is_here(node)


@pytest.mark.parametrize(
    ("before", "boot", "expected"),
    [
        (BootTime("one", 100.0), BootTime("one", 700.0), 600.0),
        (BootTime("one", 100.0), BootTime("two", 5.0), 5.0),  # since the machine started
        (BootTime("one", 100.0), BootTime("two", 900.0), 900.0),
        (BootTime("one", 100.0), BootTime("one", 99.0), 0.0),  # no clock of this kind goes back
        (BootTime("", 100.0), BootTime("", 700.0), 0.0),  # which boot it is is not known
        (BootTime("one", 100.0), BootTime("", 700.0), 0.0),
        (BootTime("", 100.0), BootTime("one", 700.0), 0.0),
    ],
)
def test_seconds_between_two_runs(before: BootTime, boot: BootTime, expected: float) -> None:
    assert counted_seconds(ClockReading(boot=before.boot, boot_seconds=before.seconds, wall=0.0), boot) == expected


@pytest.mark.parametrize("wall", [0.0, 1000.0, 1599.0, 1600.0, 9e9])
def test_what_the_clock_was_set_by_is_what_it_moved_by_beside_the_time_that_is_counted(wall: float) -> None:
    before = ClockReading(boot="one", boot_seconds=0.0, wall=1000.0)
    reading, moved = next_reading(before, datetime.fromtimestamp(wall, UTC), BootTime("one", 600.0))
    assert reading.wall == wall
    assert moved == (wall - 1600.0 if wall != 1600.0 else 0.0)


def test_a_run_goes_by_one_reading_of_the_clock() -> None:
    walls, timer = iter([NOW, NOW + timedelta(days=200)]), iter([10.0, 70.0])
    now = run_clock(lambda: next(walls), lambda: next(timer))
    assert now() == NOW + timedelta(seconds=60)


def test_a_test_and_a_hash_from_the_future_are_as_old_as_the_first_run_with_the_right_clock(tmp_path: Path) -> None:
    late = NOW + timedelta(days=200)
    passed = Passed(tree="sha256:1", smoke="s", engine="e", engine_version="1", device="cpu", at=late)
    with Ledger.writing(tmp_path / "ledger.db") as ledger:
        ledger.tested("a:v1", TestReport(verdict="passed"), passed, late)
        ledger.record_verified({name_of(b"x"): Verification(size=1, inode=1, mtime_ns=1, verified_at=late)})
        ledger.set_fact(COLD_VERIFIED, {name_of(b"y"): late, name_of(b"z"): NOW - GRACE})
        ledger.limit_times(NOW)
        assert ledger.fact(COLD_VERIFIED, dict[str, datetime]) == {name_of(b"y"): NOW, name_of(b"z"): NOW - GRACE}
        assert ledger.passed()["a:v1"].at == NOW
        assert ledger.verifications()[name_of(b"x")].verified_at == NOW


def test_an_incident_from_the_future_hides_no_later_one(tmp_path: Path) -> None:
    incident = Incident(kind="hash-mismatch", blob=name_of(b"x"), detail="other bytes")
    with Ledger.writing(tmp_path / "ledger.db") as ledger:
        ledger.log_incident(incident, NOW + timedelta(days=200))
        ledger.log_incident(incident, NOW)
        ledger.log_incident(incident, NOW + timedelta(hours=1))
        assert [(one.at, one.times) for one in ledger.incidents()] == [(NOW + timedelta(days=200), 1), (NOW, 2)]


def test_an_age_is_never_below_zero() -> None:
    assert units.age_seconds(NOW + timedelta(days=200), NOW) == 0.0
    assert units.age_seconds(NOW, NOW + timedelta(seconds=5)) == 5.0
