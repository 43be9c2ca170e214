"""
The agent in a world that the test controls: its clock, its timer, its waiting and its work.

Longer than 400 lines because all of it needs that world, which stands at the top.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.agent import loop, service
from reconciler.agent.loop import Agent, AgentOptions
from reconciler.commands import status
from reconciler.commands.context import NodeContext, RunOptions, from_settings
from reconciler.core import rollout
from reconciler.core.errors import Expired, NetworkSilent, SettingsError, StoreBusy, StoreError
from reconciler.core.events import Event, Notice
from reconciler.ports import Reporter
from reconciler.report.metrics import NodeMetrics
from reconciler.settings import Settings
from reconciler.settings_file import decode

START = datetime(2026, 11, 20, tzinfo=UTC)
Did = int | BaseException | Callable[[], int]


def descriptors_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class World:
    """Time that passes only while the agent waits, steps that do what the test says, and signals when it says."""

    def __init__(self, folder: Path, did: list[Did], text: str = "") -> None:
        self.folder = folder
        self.text = text
        self.did = did
        self.now = 0.0
        self.waits: list[float] = []
        self.events: list[Event] = []
        self.scrubbed: list[int] = []
        self.told: list[bool] = []
        self.damage = 0
        self.synced: list[NodeContext] = []
        self.followed: list[float] = []
        #: So many times the servers still lag when they are told.
        self.lagging = 0
        self._stop = self._reload = False
        self.during_wait: Callable[[int], None] = lambda _: None

    # what the agent is given

    def load(self) -> NodeContext:
        made = from_settings(decode(self.text.encode(), self.folder), clock=self.clock)
        return msgspec.structs.replace(made, metrics_address=None)  # tests run side by side

    def clock(self) -> datetime:
        return START + timedelta(seconds=self.now)

    def timer(self) -> float:
        return self.now

    def stops(self) -> bool:
        return self._stop

    def reloads(self) -> bool:
        return self._reload

    def reloaded(self) -> None:
        self._reload = False

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.during_wait(len(self.waits))

    def sync(self, context: NodeContext, report: Reporter, options: RunOptions) -> int:
        self.synced.append(context)
        self.now += 2
        if not self.did:  # the agent should have waited, and stopped
            self._stop = True
            return 0
        did = self.did.pop(0)
        if not self.did:
            self._stop_after()
        if isinstance(did, BaseException):
            raise did.with_traceback(None)  # one exception raised again keeps every frame that it passed
        return did() if callable(did) else did

    def scrub(self, context: NodeContext, report: Reporter, options: RunOptions, delay_seconds: float) -> int:
        self.scrubbed.append(len(self.synced))
        return self.damage

    def write_page(self, context: NodeContext, path: Path) -> None:
        assert context.page_path == path
        path.write_text(f"after cycle {len(self.synced)}")

    def follow(self, context: NodeContext, report: Reporter) -> bool:
        self.followed.append(self.now)
        return len(self.followed) <= self.lagging

    def tell(self, context: NodeContext, report: Reporter, options: RunOptions, *, wait: bool) -> None:
        self.told.append(wait)

    def measure(self, context: NodeContext) -> NodeMetrics:
        return NodeMetrics(incidents={"hash-mismatch": 3})

    # what the test does

    def _stop_after(self) -> None:
        before = self.during_wait

        def stop(number: int) -> None:
            before(number)
            self._stop = True

        self.during_wait = stop

    def hup(self) -> None:
        self._reload = True

    def agent(self, jitter: float = 0.0, **options: object) -> Agent:
        return Agent(
            self.load, self.events.append, self, msgspec.convert(options, AgentOptions), steps=self, timer=self.timer,
            jitter=lambda most: most * jitter,
        )  # fmt: skip

    @property
    def health(self) -> status.Health:
        found = status.read_health(self.load().layout)
        assert found is not None
        return found

    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice) and event.level == "warning"]


# -- the loop


def test_cycles_follow_the_interval_and_the_jitter(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 0, 0], '[agent]\ninterval = "10m"\njitter = "1m"\n')
    world.agent(jitter=0.5).run()

    assert world.waits == [630.0, 630.0, 630.0]
    assert world.scrubbed == [1, 2, 3]


def test_the_command_lines_interval_stands_above_the_settings(tmp_path: Path) -> None:
    world = World(tmp_path, [0])
    world.agent(jitter=1.0, interval_seconds=7.0).run()

    assert world.waits == [14.0], "the jitter is never longer than the interval"


def test_waits_double_after_failures_up_to_an_hour_and_fall_back_after_success(tmp_path: Path) -> None:
    error = StoreError("no disk")
    world = World(tmp_path, [*[error] * 6, 0])
    world.agent().run()

    assert world.waits == [600.0, 1200.0, 2400.0, 3600.0, 3600.0, 3600.0, 300.0]
    assert world.health.failures == 0


SERVED = '[[serve]]\nkind = "http"\nreload = "http://127.0.0.1:9/"\n'


def test_between_cycles_servers_that_lag_are_told_again_after_pauses_that_double(tmp_path: Path) -> None:
    world = World(tmp_path, [0], SERVED)
    world.lagging = 3
    world.agent()._wait_and_follow(300.0)

    assert world.followed == [5.0, 15.0, 35.0, 75.0]
    assert world.waits == [5.0, 10.0, 20.0, 40.0, 225.0]


def test_no_server_is_told_past_the_next_cycle_nor_on_a_node_that_has_none(tmp_path: Path) -> None:
    world = World(tmp_path, [0], SERVED)
    world.lagging = 99
    world.agent()._wait_and_follow(60.0)
    assert (sum(world.waits), world.followed) == (60.0, [5.0, 15.0, 35.0])

    alone = World(tmp_path, [0])
    alone.agent()._wait_and_follow(60.0)
    assert (alone.waits, alone.followed) == ([60.0], [])


def test_a_server_that_cannot_be_told_ends_no_agent(tmp_path: Path) -> None:
    def refuse(context: NodeContext, report: Reporter) -> bool:
        raise StoreError("no disk")

    world = World(tmp_path, [0], SERVED)
    world.follow = refuse  # type: ignore[method-assign]  # as a test says
    world.agent()._wait_and_follow(20.0)

    assert sum(world.waits) == 20.0
    assert "no disk" in world.warnings()[0]


@given(interval=st.floats(0, 1e6), failures=st.integers(0, 10_000))
def test_no_wait_spins_or_is_forgotten(interval: float, failures: int) -> None:
    found = loop.delay(interval, failures)

    assert max(1.0, interval) <= found <= max(interval, 3600.0)
    assert loop.delay(interval, failures + 1) >= found


def test_a_store_that_another_run_holds_is_no_failure(tmp_path: Path) -> None:
    world = World(tmp_path, [StoreBusy("cron is at it"), StoreBusy("cron is at it"), 0])
    world.agent().run()

    assert world.waits == [300.0] * 3
    assert world.warnings() == []
    assert world.health.totals == {"busy": 2, "done": 1}


def test_a_fault_of_ours_does_not_end_the_agent(tmp_path: Path) -> None:
    world = World(tmp_path, [ZeroDivisionError("division by zero"), OSError(24, "too many open files"), 0])
    world.agent().run()

    assert world.health.totals == {"error": 2, "done": 1}
    assert "internal-error: ZeroDivisionError" in world.warnings()[0]


def test_failed_models_are_reported_and_do_not_slow_the_agent_down(tmp_path: Path) -> None:
    world = World(tmp_path, [2])
    world.damage = 1
    world.agent().run()

    assert world.waits == [300.0]
    assert (world.health.outcome, world.health.message) == ("models-failed", "2 models failed or not fetched, 1 damaged, repair tried")


def test_once_is_one_cycle_and_keeps_its_error(tmp_path: Path) -> None:
    refusal = Expired("its time is over")
    world = World(tmp_path, [refusal])
    ended = world.agent().once()

    assert (ended.outcome, ended.error, world.waits) == ("refused", refusal, [])
    assert world.health.phase == "stopped"


# -- the result of a cycle


def test_the_health_file_says_what_was_and_what_comes(tmp_path: Path) -> None:
    world = World(tmp_path, [0, StoreError("no disk"), 0])
    seen: list[status.Health] = []
    world.during_wait = lambda _: seen.append(world.health)
    world.agent().run()

    first, second, _ = seen
    assert (first.phase, first.outcome, first.ended_at) == ("waiting", "done", START + timedelta(seconds=2))
    assert first.next_at == START + timedelta(seconds=302)
    assert (second.outcome, second.failures, second.succeeded_at) == ("error", 1, first.ended_at)
    assert "no disk" in second.message
    assert world.health.phase == "stopped"
    assert world.health.next_at is None


def test_a_cycle_that_goes_on_is_seen(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    seen: list[str] = []

    def observe() -> int:
        seen.append(world.health.phase)
        return 0

    world.did = [observe]
    world.agent().run()

    assert seen == ["working"]


def test_a_silent_network_keeps_no_file_from_being_hashed_and_is_no_success(tmp_path: Path) -> None:
    world = World(tmp_path, [0, NetworkSilent("nobody answers"), NetworkSilent("nobody answers")])
    world.agent().run()

    assert world.scrubbed == [1, 2, 3]
    assert (world.health.outcome, world.health.failures) == ("silent", 2)
    assert world.health.message == "network-silent: nobody answers"
    assert world.health.succeeded_at == START + timedelta(seconds=2)
    assert world.health.totals == {"done": 1, "silent": 2}


def test_counts_go_on_over_a_restart(tmp_path: Path) -> None:
    for _ in range(3):
        World(tmp_path, [0]).agent().once()

    assert World(tmp_path, []).health.totals == {"done": 3}


@pytest.mark.parametrize("data", [b"", b"{", b'{"schema": 1}', b"\xff" * 10])
def test_a_damaged_health_file_is_begun_anew(tmp_path: Path, data: bytes) -> None:
    path = status.health_path(from_settings(Settings(base=str(tmp_path))).layout)
    path.parent.mkdir()
    path.write_bytes(data)
    world = World(tmp_path, [0])
    world.agent().once()

    assert world.health.totals == {"done": 1}


def test_what_cannot_be_written_fails_no_cycle(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    world = World(tmp_path, [0, 0])
    world.agent(metrics_file=tmp_path / "missing" / "m.prom").run()

    assert world.waits == [300.0, 300.0]
    assert any("health file could not be written" in text for text in world.warnings())
    assert any("metrics could not be written" in text for text in world.warnings())


def test_the_metrics_file_is_replaced_in_each_cycle(tmp_path: Path) -> None:
    path = tmp_path / "reconcile.prom"
    world = World(tmp_path, [0, 0])
    seen: list[str] = []
    world.during_wait = lambda _: seen.append(path.read_text())
    world.agent(metrics_file=path).run()

    assert 'reconcile_runs_total{outcome="done"} 1.0' in seen[0]
    assert 'reconcile_runs_total{outcome="done"} 2.0' in seen[1]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


# -- signals


def test_sighup_reads_the_settings_again_and_begins_the_next_cycle(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 0])

    def change(number: int) -> None:
        if number == 1:
            world.now -= world.waits[0]  # the signal ends the wait at once
            world.text = '[agent]\ninterval = "1h"\n'
            world.hup()

    world.during_wait = change
    world.agent().run()

    assert world.waits == [300.0, 3600.0]


def test_settings_that_do_not_hold_are_not_taken(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 0])

    def spoil(number: int) -> None:
        if number == 1:
            world.text = "[agent]\nintervall = 3\n"
            world.hup()

    world.during_wait = spoil
    made = world.agent()
    world_text = world.text
    made.run()
    world.text = world_text

    assert world.waits == [300.0, 300.0]
    assert any("the settings stay as they were" in text for text in world.warnings())


def test_a_bug_while_settings_are_read_again_leaves_those_in_use(tmp_path: Path) -> None:
    world = World(tmp_path, [0, 0])
    agent = world.agent()

    def broken() -> NodeContext:
        raise KeyError("a bug")

    def hup(number: int) -> None:
        if number == 1:
            agent._load = broken
            world.hup()

    world.during_wait = hup
    agent.run()

    assert len(world.synced) >= 2
    assert any("the settings stay as they were: KeyError in " in text for text in world.warnings())


def test_settings_that_do_not_hold_at_the_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        World(tmp_path, [0], "[agent]\nintervall = 3\n").agent()


def test_a_stop_while_a_cycle_goes_on_runs_every_finally(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    let_go: list[str] = []

    def stopped() -> int:
        try:
            raise service.Stopped(0)
        finally:
            let_go.append("the store")

    world.did = [0, stopped, 0]
    with pytest.raises(SystemExit) as ended:
        world.agent().run()

    assert (ended.value.code, let_go) == (0, ["the store"])
    assert (world.health.phase, world.health.totals) == ("stopped", {"done": 1})


def test_a_stop_that_was_swallowed_ends_the_agent_after_the_cycle(tmp_path: Path) -> None:
    world = World(tmp_path, [])

    def swallowed() -> int:
        world._stop = True
        return 0

    world.did = [swallowed, 0]
    world.agent().run()

    assert (world.waits, world.health.phase) == ([], "stopped")


def test_a_long_interval_is_no_silence(tmp_path: Path) -> None:
    world = World(tmp_path, [0], '[agent]\ninterval = "6h"\n')
    alive: list[bool] = []
    world.during_wait = lambda _: alive.append(made._watchdog.alive)
    made = world.agent()
    made.run()

    assert alive == [True]


@pytest.fixture
def wakeup() -> Iterator[service.Wakeup]:
    with service.Wakeup() as made:
        yield made


def test_a_signal_before_the_wait_is_not_lost(wakeup: service.Wakeup) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    wakeup.wait(600)

    assert wakeup.reloads()
    wakeup.reloaded()
    assert not wakeup.reloads()


def test_a_signal_ends_a_wait_at_once(wakeup: service.Wakeup) -> None:
    ringer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP))
    ringer.start()
    wakeup.wait(600)
    ringer.join()

    assert wakeup.reloads()
    assert not wakeup.stops()


def killed_while_waiting(wakeup: service.Wakeup, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    wakeup.wait(600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_raised_wherever_the_main_thread_is(wakeup: service.Wakeup, number: signal.Signals) -> None:
    with pytest.raises(service.Stopped) as ended:
        killed_while_waiting(wakeup, number)

    assert ended.value.code == 0
    assert wakeup.stops()


def test_a_second_sigterm_does_not_break_what_the_first_lets_go(wakeup: service.Wakeup) -> None:
    with pytest.raises(service.Stopped):
        killed_while_waiting(wakeup, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    wakeup.wait(600)

    with pytest.raises(service.Stopped):
        killed_while_waiting(wakeup, signal.SIGINT)


def test_wakeup_restores_every_signal_handler() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    descriptors = descriptors_open()
    with service.Wakeup():
        assert [signal.getsignal(number) for number in numbers] != before

    assert [signal.getsignal(number) for number in numbers] == before
    assert descriptors_open() == descriptors
    assert signal.set_wakeup_fd(-1) == -1


# -- systemd


@contextlib.contextmanager
def manager(monkeypatch: pytest.MonkeyPatch, address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield receiver


def received(receiver: socket.socket) -> list[str]:
    receiver.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(receiver.recv(4096).decode())
    return found


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified_of_ready_reloading_and_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@reconcile-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    world = World(tmp_path, [0, StoreError("no\ndisk"), 0])
    world.during_wait = lambda number: world.hup() if number == 1 else None
    with manager(monkeypatch, address) as receiver:
        world.agent().run()
        messages = received(receiver)

    assert messages[0] == "READY=1\nSTATUS=at work"
    assert messages[-1] == "STOPPING=1"
    index = next(index for index, text in enumerate(messages) if text.startswith("RELOADING=1\nMONOTONIC_USEC="))
    assert messages[index + 1] == "READY=1"
    assert "STATUS=error: store: no disk" in messages


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "vsock:2:1234", "@" + "x" * 200])
def test_a_manager_that_does_not_listen_is_nothing(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)

    assert service.notify("READY=1") is False


def test_the_watchdog_is_fed_while_the_agent_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    watchdog = service.Watchdog(60.0)
    with manager(monkeypatch, str(tmp_path / "notify")) as receiver, watchdog.running():
        assert [receiver.recv(100), receiver.recv(100)] == [b"WATCHDOG=1"] * 2

    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_main_thread_that_hangs_is_not_covered_for() -> None:
    now = [0.0]
    watchdog = service.Watchdog(60.0, lambda: now[0])

    def alive_at(instant: float) -> bool:
        now[0] = instant
        return watchdog.alive

    assert [alive_at(59.0), alive_at(61.0)] == [True, False]
    watchdog.beat(ahead_seconds=300.0)
    assert [alive_at(61.0 + 359.0), alive_at(61.0 + 361.0)] == [True, False], "a wait that was meant is no hanging"


@pytest.mark.parametrize(("usec", "pid", "expected"), [("", "", 0.0), ("30000000", "", 30.0), ("30000000", "1", 0.0), ("x", "", 0.0)])
def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, expected: float) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid)

    assert service.watchdog_seconds() == expected


def test_the_jitter_is_the_same_on_every_start_of_a_host() -> None:
    first, second = loop.jitter_of_host(), loop.jitter_of_host()
    drawn = [first(30.0) for _ in range(20)]

    assert drawn == [second(30.0) for _ in range(20)]
    assert len(set(drawn)) == 20
    assert all(0.0 <= one <= 30.0 for one in drawn)


# -- staying


@pytest.mark.slow
def test_two_hundred_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    outcomes: list[Did] = [0, 2, StoreBusy("busy"), StoreError("no disk"), Expired("over"), OSError(5, "broken"), 0, 0]
    world = World(tmp_path, outcomes * 25)
    marks: list[tuple[int, int, int]] = []

    def observe(number: int) -> None:
        world.events.clear()
        if number in {40, 199}:
            gc.collect()
            marks.append((tracemalloc.get_traced_memory()[0], descriptors_open(), len(list(tmp_path.rglob("*")))))

    world.during_wait = observe
    tracemalloc.start()
    try:
        world.agent(metrics_file=tmp_path / "m.prom", metrics_address=("127.0.0.1", 0)).run()
    finally:
        tracemalloc.stop()

    (memory, descriptors, files), (memory_later, descriptors_later, files_later) = marks
    assert len(world.waits) == 200
    assert (descriptors_later, files_later) == (descriptors, files)
    assert memory_later - memory < 64 * 1024
    assert sum(world.health.totals.values()) == 200
    assert json.loads(status.health_path(world.load().layout).read_bytes())["schema"] == 1


def test_a_success_of_a_clock_that_was_ahead_hides_no_silence(tmp_path: Path) -> None:
    class Corrected(World):
        ahead = timedelta(days=200)

        def clock(self) -> datetime:
            return super().clock() + self.ahead

    world = Corrected(tmp_path, [0, StoreError("no disk"), StoreError("no disk")])
    seen: list[status.Health] = []

    def correct(_: int) -> None:
        seen.append(world.health)
        world.ahead = timedelta()

    world.during_wait = correct
    world.agent().run()

    assert seen[0].succeeded_at == START + timedelta(days=200, seconds=2)
    assert seen[1].ended_at is not None
    assert seen[1].succeeded_at == seen[1].ended_at


def test_a_fleet_that_starts_at_once_does_not_ask_at_once(tmp_path: Path) -> None:

    begun = {}
    for name in ("n1", "n2", ""):
        world = World(tmp_path, [0], f'[node]\nid = "{name}"\n[agent]\ninterval = "1h"\n')
        world.during_wait = lambda _: None
        Agent(world.load, world.events.append, world, AgentOptions(), steps=world, timer=world.timer, jitter=lambda _: 0.0).run()
        begun[name] = world.waits[0] if name else 0.0
        assert (len(world.synced), name == "") == (1, begun[name] == 0.0)
        assert begun[name] == rollout.start_delay(name, loop.START_SECONDS)
    assert begun["n1"] != begun["n2"]
