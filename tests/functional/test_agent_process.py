"""The real agent: as a process of its own with real signals, and on a whole node."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from reconciler.agent.loop import Agent, AgentOptions
from reconciler.commands.context import NodeContext
from reconciler.store import writer_lock
from tests.hostile_server import HostileServer, honest
from tests.node import Node, tiny

PATIENCE = 30.0


class Process:
    """An agent in *folder*, a child of this test."""

    def __init__(self, folder: Path, *arguments: str, notify: Path | None = None) -> None:
        self.folder = folder
        environment = os.environ | {"RECONCILE_CONFIG": str(folder / "reconcile.toml"), "PYTHONUNBUFFERED": "1"}
        environment |= {"NOTIFY_SOCKET": str(notify)} if notify else {}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "reconciler", "agent", *arguments],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def health(self) -> dict[str, Any]:
        """What the agent says of itself; empty before it does."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "store/health.json").read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the health file says so; the agent's end is no answer."""
        end = time.monotonic() + PATIENCE
        while not holds(found := self.health):
            assert self.child.poll() is None, self.child.communicate()[0]
            assert time.monotonic() < end, found
            select.select([], [], [], 0.02)
        return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal and wait for the end; return exit code and output."""
        if self.child.poll() is None:
            self.child.send_signal(number)
        try:
            out, _ = self.child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.communicate()
            raise
        return self.child.returncode, out


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Begin an agent on a folder that has settings and nothing else: no root, so no lock can be confirmed."""
    begun: list[Process] = []
    (tmp_path / "reconcile.toml").write_text('[agent]\njitter = "0s"\n')

    def start(*arguments: str, **given: Any) -> Process:
        begun.append(Process(tmp_path, *arguments, **given))
        return begun[-1]

    yield start
    for process in begun:
        if process.child.poll() is None:
            process.child.kill()
        process.child.communicate()


def test_an_agent_that_can_confirm_nothing_backs_off_and_says_so(begin: Callable[..., Process]) -> None:
    process = begin("--interval", "1s")
    found = process.until(lambda health: health.get("failures", 0) >= 2 and health["phase"] == "waiting")
    code, out = process.end()

    assert code == 0
    assert found["outcome"] == "error"
    assert "trust root" in found["message"]
    assert found["totals"] == {"error": found["failures"]}
    assert out.count("tried again in 2.0s") == 1
    assert out.count("tried again in 4.0s") == 1
    assert "Traceback" not in out
    assert process.health["phase"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_a_long_wait_at_once(begin: Callable[..., Process], number: signal.Signals) -> None:
    process = begin("--interval", "1h")
    process.until(lambda health: health.get("phase") == "waiting")
    code, out = process.end(number)

    assert code == 0
    assert "Traceback" not in out
    assert process.health["phase"] == "stopped"


def test_sighup_ends_a_long_wait_and_takes_new_settings(begin: Callable[..., Process], tmp_path: Path) -> None:
    process = begin("--interval", "1h", "--verbose")
    process.until(lambda health: health.get("phase") == "waiting")
    (tmp_path / "reconcile.toml").write_text('[agent]\njitter = "0s"\n[network]\nroot = "other.json"\n')
    process.child.send_signal(signal.SIGHUP)
    found = process.until(lambda health: health["failures"] == 2 and health["phase"] == "waiting")

    assert "other.json" in found["message"]
    (tmp_path / "reconcile.toml").write_text("[agent]\nintervall = 1\n")
    process.child.send_signal(signal.SIGHUP)
    found = process.until(lambda health: health["failures"] == 3 and health["phase"] == "waiting")
    code, out = process.end()

    assert code == 0
    assert "other.json" in found["message"]
    assert "the settings stay as they were" in out


def test_systemd_is_notified_by_the_real_agent(begin: Callable[..., Process], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(PATIENCE)
        process = begin("--interval", "1h", notify=tmp_path / "notify")
        assert receiver.recv(4096).startswith(b"READY=1\n")
        assert receiver.recv(4096).startswith(b"STATUS=error: bad-settings")
        process.until(lambda health: health["phase"] == "waiting")
        process.child.send_signal(signal.SIGHUP)
        assert receiver.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert receiver.recv(4096) == b"READY=1"
        process.end()
        text = receiver.recv(4096)
        while text.startswith(b"STATUS="):
            text = receiver.recv(4096)

    assert text == b"STOPPING=1"


def test_metrics_are_served_while_the_agent_runs(begin: Callable[..., Process], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = begin("--interval", "1h", "--metrics-port", str(port), "--metrics-file", "m.prom")
    process.until(lambda health: health.get("phase") == "waiting")
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "m.prom").exists() or "runs_total" not in (tmp_path / "m.prom").read_text():
        assert time.monotonic() < end
        select.select([], [], [], 0.02)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    code, _ = process.end()

    assert code == 0
    assert 'reconcile_runs_total{outcome="error"} 1.0' in text
    assert "reconcile_disk_free_bytes" in text


def test_a_metrics_port_that_is_taken_is_a_sentence(begin: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = begin("--metrics-port", str(taken.getsockname()[1]))
        out, _ = process.child.communicate(timeout=PATIENCE)

    assert process.child.returncode == 64
    assert "metrics cannot be served" in out
    assert "Traceback" not in out


# -- in the middle of a download


@pytest.fixture
def slow(node: Node) -> Iterator[tuple[HostileServer, bytes]]:
    """A source that would take a minute to send the node's only model."""
    with HostileServer() as server:
        data = tiny("slow", width=512)
        source = server.on("/slow", honest(data, rate=len(data) / 60))
        node.publish(node.item("slow:v1", data, serve=False, urls=[source]))
        yield server, data


def transfers(server: HostileServer) -> int:
    return len([it for it in server.asked("/slow") if not it.is_probe])


@pytest.fixture
def downloading(node: Node, slow: tuple[HostileServer, bytes]) -> Iterator[Process]:
    """An agent that is in the middle of it."""
    process = Process(node.folder, "--interval", "1h")
    try:
        process.until(lambda _: transfers(slow[0]) > 0 and slow[0].sent("/slow") > len(slow[1]) // 60)
        yield process
    finally:
        process.child.kill()
        process.child.communicate()


def test_a_stop_in_the_middle_of_a_download_lets_everything_go(node: Node, slow: tuple[HostileServer, bytes], downloading: Process) -> None:
    children = psutil.Process(downloading.child.pid).children(recursive=True)
    assert any("aria2c" in child.name() for child in children)

    code, out = downloading.end()

    assert code == 0
    assert "Traceback" not in out
    assert downloading.health["phase"] == "stopped"
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    with writer_lock.hold(node.store / ".lock"):
        pass
    slow[0].on("/slow", honest(slow[1]))
    assert node.run("sync").code == 0
    assert node.states() == {"slow:v1": "active"}


def test_new_settings_do_not_interrupt_a_download(slow: tuple[HostileServer, bytes], downloading: Process) -> None:
    before = slow[0].sent("/slow")
    downloading.child.send_signal(signal.SIGHUP)
    downloading.until(lambda _: slow[0].sent("/slow") > before + len(slow[1]) // 60)

    assert downloading.health["phase"] == "working"
    assert downloading.health["totals"] == {}, "it is still the first cycle"


# -- on a whole node


def sample(text: str, name: str, **labels: str) -> float:
    found = [one for family in text_string_to_metric_families(text) for one in family.samples if (one.name, one.labels) == (name, labels)]
    assert len(found) == 1, (name, labels)
    return found[0].value


def test_one_cycle_installs_scrubs_and_measures(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"), state="disabled"))
    (node.folder / "store").mkdir(exist_ok=True)
    metrics = node.folder / "m.prom"

    ran = node.run("agent", "--once", "--metrics-file", str(metrics))

    assert ran.code == 0, ran
    assert node.states() == {"a:v1": "active", "b:v1": "absent"}
    text = metrics.read_text()
    assert sample(text, "reconcile_model_state", model="a:v1", state="active") == 1
    assert sample(text, "reconcile_model_bytes", model="a:v1") == len(tiny("a"))
    assert sample(text, "reconcile_model_test_tokens_per_second", model="a:v1") > 0
    assert sample(text, "reconcile_models", state="absent") == 1
    assert sample(text, "reconcile_runs_total", outcome="done") == 1
    assert sample(text, "reconcile_floor_version") == sample(text, "reconcile_snapshot_version") == node.network.version
    assert json.loads((node.store / "health.json").read_bytes())["outcome"] == "done"


def test_a_damaged_blob_is_found_and_mended_by_the_scrub(node: Node) -> None:
    node.configure('[agent]\nscrub_after = "0s"\n')  # everything is due in each cycle
    data = tiny("a")
    node.publish(node.item("a:v1", data))
    assert node.run("agent", "--once").code == 0
    blob = next(path for path in (node.store / "blobs").rglob("*") if path.is_file())
    seen = blob.stat()
    blob.chmod(0o644)
    blob.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    blob.chmod(0o444)
    os.utime(blob, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # only hashing can tell

    ran = node.run("agent", "--once", "--metrics-file", str(node.folder / "m.prom"))

    assert ran.code == 0, ran
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == data
    health = json.loads((node.store / "health.json").read_bytes())
    assert "damaged, repair tried" in health["message"]
    assert sample((node.folder / "m.prom").read_text(), "reconcile_incidents_total", kind="blob-damaged") >= 1


def test_an_idle_agent_hashes_nothing(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("agent", "--once").code == 0
    ran = node.run("agent", "--once", "--verbose")

    assert ran.code == 0
    assert "scrubbed" not in ran.out


def test_once_exits_as_sync_does(node: Node) -> None:
    node.publish(node.item("a:v1", b"no model at all"))
    assert node.run("agent", "--once").code == 3
    (node.folder / "published.json").write_bytes(b"{}")
    ran = node.run("agent", "--once", "--json")
    assert ran.code == 4
    assert ran.events[-1]["error"]["name"] == "bad-envelope"
    assert json.loads((node.store / "health.json").read_bytes())["outcome"] == "refused"


# -- for long


class CountedWaits:
    """Stops the agent after so many waits, and never interrupts one."""

    def __init__(self, waits: int, observe: Callable[[int], None]) -> None:
        self.left = waits
        self.observe = observe

    def stops(self) -> bool:
        return self.left == 0

    def reloads(self) -> bool:
        return False

    def reloaded(self) -> None:
        return None

    def wait(self, seconds: float) -> None:
        self.left -= 1
        self.observe(self.left)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Marks:
    """What an agent on *node* holds after so many cycles."""

    def __init__(self, node: Node, cycles: int, first: int) -> None:
        self.node = node
        self.now = 0.0
        self.cycles = cycles
        self.first = first
        self.seen: list[tuple[int, int, int]] = []

    def observe(self, left: int) -> None:
        self.now += 1e6
        if left in {self.cycles - self.first, 0}:
            gc.collect()
            files = sum(1 for _ in self.node.folder.rglob("*"))
            self.seen.append((resident(), len(list(Path("/proc/self/fd").iterdir())), files))

    def load(self) -> NodeContext:
        return self.node.context()

    def run(self) -> dict[str, int]:
        options = AgentOptions(metrics_file=self.node.folder / "m.prom")
        wakeup = CountedWaits(self.cycles, self.observe)
        made = Agent(self.load, lambda _: None, wakeup, options, timer=lambda: self.now, jitter=lambda _: 0.0)
        made.run()
        return made.health.totals

    def check(self) -> None:
        (memory, *held), (memory_later, *held_later) = self.seen
        assert all(later <= before for before, later in zip(held, held_later, strict=True)), (held, held_later)
        assert memory_later - memory < 24 << 20  # a leak of a lock or a plan a cycle would be several times that


def test_two_hundred_cycles_of_the_real_engine_leave_nothing_behind(node: Node) -> None:
    """Each cycle goes all the way to its refusal, writes health and metrics, and backs off."""
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("sync").code == 0
    (node.folder / "published.json").write_bytes(b"{}")
    marks = Marks(node, cycles=200, first=50)

    assert marks.run() == {"refused": 200}
    marks.check()


class Trouble:
    """Faults that come and go, by the number of the cycle."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.good = node.item("a:v1", tiny("a"))
        self.bad = node.item("b:v1", b"no model at all")
        self.held = contextlib.ExitStack()
        self.publish()

    def publish(self, *more: dict[str, Any]) -> None:
        (self.node.folder / "published.json").write_bytes(self.node.network.snapshot(self.good, *more))

    def cause(self, cycle: int) -> None:
        """Cause what is due before the next cycle, and take back what was caused before this one."""
        self.held.close()
        match cycle % 40:
            case 3:
                blob = next(path for path in (self.node.store / "blobs").rglob("*") if path.is_file())
                blob.chmod(0o644)
                blob.write_bytes(bytes(blob.stat().st_size))
            case 6:
                (self.node.folder / "published.json").write_bytes(b"garbage")
            case 9:
                self.publish(self.bad)
            case 11:
                (self.node.folder / "published.json").unlink()
            case 13:
                self.held.enter_context(writer_lock.hold(self.node.store / ".lock"))
            case 15:
                (self.node.store / "ledger.db").write_bytes(b"garbage" * 100)
            case 8 | 12 | 17:
                self.publish()
            case _:
                pass


def test_a_hundred_and_twenty_cycles_of_trouble_leave_nothing_behind(node: Node) -> None:
    """Damage, garbage, a bad model, no network, a busy store and a lost ledger, three times over: bounded, and well in the end."""
    node.configure('[agent]\nscrub_after = "0s"\n')
    trouble = Trouble(node)
    marks = Marks(node, cycles=120, first=40)
    observe = marks.observe

    def both(left: int) -> None:
        observe(left)
        trouble.cause(120 - left)

    marks.observe = both  # type: ignore[method-assign]
    totals = marks.run()

    assert sum(totals.values()) == 120
    assert {"done", "models-failed", "busy", "refused", "error"} == totals.keys(), totals
    assert node.states() == {"a:v1": "active"}
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert len(list((node.store / "generations").iterdir())) <= 10
    assert [path.name for path in (node.store / "staging").iterdir() if path.is_dir()] == []
    (memory, descriptors, _), (memory_later, descriptors_later, _) = marks.seen
    assert descriptors_later == descriptors
    assert memory_later - memory < 8 << 20
