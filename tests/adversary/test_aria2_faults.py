"""aria2c dies, hangs, is replaced or sends malformed answers: the blobs arrive, or the run says why, and no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from reconciler import loopback
from reconciler.core.errors import FetchError, StoreBusy
from reconciler.core.events import FetchProgress, Notice
from reconciler.fetch import aria2_daemon, credentials
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.ports import FetchFailed
from tests import hostile_server as bad
from tests.fetching import FAST, HUNG_SECONDS, LARGE, SMALL, EventRecorder, children_of, collect, good, my_aria2, name_of, named, some, want
from tests.hostile_server import HostileServer, honest
from tests.processes import outliving

DATA = some(LARGE, 1)


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


class Saboteur(EventRecorder):
    """Does something to aria2c as soon as some bytes are there, *times* times."""

    def __init__(self, act: Callable[[int], None], times: int = 1, after: int = 200_000) -> None:
        super().__init__()
        self._act, self.times, self._after = act, times, after

    def __call__(self, event: object, /) -> None:
        super().__call__(event)  # type: ignore[arg-type]
        if isinstance(event, FetchProgress) and event.done > self._after and self.times:
            for pid in my_aria2():
                self.times -= 1
                self._act(pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def suspend(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("act", [kill, suspend])
def test_a_downloader_that_dies_or_hangs_is_started_again_and_continues(
    tmp_path: Path, server: HostileServer, act: Callable[[int], None]
) -> None:
    urls = [server.on(f"/{seed}", honest(some(LARGE, seed), rate=1 << 20)) for seed in range(2)]
    saboteur = Saboteur(act)
    fetcher = Aria2Fetcher(tmp_path, FAST)
    try:
        outcomes = collect(fetcher, [want(some(LARGE, seed), urls[seed]) for seed in range(2)], saboteur)
        for seed in range(2):
            good(outcomes[name_of(some(LARGE, seed))], some(LARGE, seed))
    finally:
        fetcher.close()
    assert saboteur.times == 0
    assert any(isinstance(event, Notice) and "started again" in event.text for event in saboteur.events)
    assert my_aria2() == []
    if act is kill:  # into the buffers of one that is only stopped, a server sends on
        assert server.sent("/0") < 1.5 * LARGE


def test_a_downloader_that_keeps_dying_fails_its_blobs_and_no_others(tmp_path: Path, server: HostileServer) -> None:
    small = some(SMALL, 3)
    settings = msgspec.structs.replace(FAST, direct_bytes=SMALL, restarts=3)
    saboteur = Saboteur(kill, times=100, after=-1)
    url = server.on("/x", bad.on_probe(honest(DATA), bad.silent))
    fetcher = Aria2Fetcher(tmp_path, settings)
    try:
        outcomes = collect(fetcher, [want(DATA, url), want(small, server.on("/small", honest(small)))], saboteur)
    finally:
        fetcher.close()
    good(outcomes[name_of(small)], small)
    failed = outcomes[name_of(DATA)]
    assert isinstance(failed, FetchFailed)
    assert "does not stay up" in failed.error.message


def _fake(tmp_path: Path, body: str) -> Path:
    """Write a program that stands in for aria2c."""
    path = tmp_path / "aria2c"
    path.write_text(f"#!{sys.executable} -I\n{body}")
    path.chmod(0o755)
    return path


_FAKE_SERVER = """
import http.server, sys, re, threading
conf = open(sys.argv[1].partition("=")[2]).read()
port = int(re.search(r"rpc-listen-port=(\\d+)", conf)[1])
class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        ANSWER
        self.send_response(200); self.send_header("Content-Length", str(len(said))); self.end_headers(); self.wfile.write(said)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("raise SystemExit(1)", "does not start"),
        (_FAKE_SERVER.replace("ANSWER", "said = b'<html>'"), "stay up"),
        (_FAKE_SERVER.replace("ANSWER", "said = b'[]'"), "stay up"),
        (_FAKE_SERVER.replace("ANSWER", "said = b'{\"result\": [1, 2, 3]}'"), "stay up"),
        (_FAKE_SERVER.replace("ANSWER", "said = b'{\"error\": {}}'"), "stay up"),
        (_FAKE_SERVER.replace("ANSWER", "threading.Event().wait()"), "stay up"),
        (_FAKE_SERVER.replace("ANSWER", 'said = b\'{"id":1,"result":[["ok"]]}\''), "stay up"),
    ],
    ids=["exits", "html", "a list", "another number", "an empty error", "silence", "yes to everything"],
)
def test_a_downloader_that_talks_nonsense_is_given_up(tmp_path: Path, server: HostileServer, body: str, word: str) -> None:
    settings = msgspec.structs.replace(FAST, aria2c=_fake(tmp_path, body), rpc_seconds=0.3, restarts=2)
    fetcher = Aria2Fetcher(tmp_path / "staging", settings)
    try:
        outcome = collect(fetcher, [want(DATA, server.on("/x", honest(DATA)))])[name_of(DATA)]
    finally:
        fetcher.close()
    assert isinstance(outcome, FetchFailed)
    assert word in outcome.error.message
    assert not named(children_of(os.getpid()), "aria2c")


def test_a_downloader_that_answers_without_the_secret_is_refused(tmp_path: Path) -> None:
    """Every user of the machine could call it."""
    answer = "import json; said = json.dumps({'id': 1, 'result': [{}] if b'multicall' in asked else {}}).encode()"
    body = _FAKE_SERVER.replace("ANSWER", answer)
    _refused(tmp_path, body)


def test_a_real_downloader_that_ignores_its_secret_is_refused(tmp_path: Path) -> None:
    """Asked over a WebSocket, as a real one is."""
    body = (
        "import os, pathlib, sys; conf = pathlib.Path(sys.argv[1].partition('=')[2]); "
        "conf.write_text(''.join(line for line in conf.open() if not line.startswith('rpc-secret'))); "
        f"os.execv({str(aria2_daemon.find())!r}, ['aria2c', sys.argv[1]])"
    )
    _refused(tmp_path, body)


def test_to_be_asked_without_its_secret_costs_the_downloader_no_processor(tmp_path: Path) -> None:
    """Over HTTP, it would use a whole one until it answers: the one with which the first bytes are hashed."""
    daemon = aria2_daemon.Daemon(FAST, tmp_path, -1, credentials.read(None))
    try:
        daemon.start()
        begun = psutil.Process(daemon.pid).cpu_times()
        for thread in threading.enumerate():
            if thread.name == "probe":
                thread.join(timeout=30)
        ended = psutil.Process(daemon.pid).cpu_times()
    finally:
        daemon.close()
    assert ended.user + ended.system - begun.user - begun.system < 0.3


def _refused(tmp_path: Path, body: str) -> None:
    daemon = aria2_daemon.Daemon(msgspec.structs.replace(FAST, aria2c=_fake(tmp_path, body)), tmp_path, -1, credentials.read(None))

    def use() -> None:
        daemon.start()  # where the one who knocks is answered first, it is refused here
        _until(lambda: daemon.poll(["0000000000000001"]) and None)

    try:
        with pytest.raises(aria2_daemon.DaemonLost, match="without its secret"):
            use()
    finally:
        daemon.close()


def _until(act: Callable[[], object], seconds: float = 20.0) -> None:
    """Do *act* again and again, until it raises or the time is over."""
    done = threading.Event()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        act()
        done.wait(0.05)


def test_a_port_that_is_taken_is_not_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process listens on the port: it never receives the secret, and another port is tried."""
    recorder: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        free = loopback.free_port
        ports = iter([taken])
        monkeypatch.setattr(loopback, "free_port", lambda: next(ports, None) or free())
        daemon = aria2_daemon.Daemon(FAST, tmp_path, -1, credentials.read(None))
        try:
            daemon.start()
            assert daemon.poll(["0000000000000001"]) == {}
        finally:
            daemon.close()
        other.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            connection, _ = other.accept()
            recorder.append(connection.recv(65536))
            connection.close()
    assert recorder == []


def test_a_port_that_is_taken_over_before_the_first_call_is_not_spoken_to(tmp_path: Path) -> None:
    """The child is started before it is needed: whoever kills it meanwhile and listens in its place never receives the secret."""
    daemon = aria2_daemon.Daemon(FAST, tmp_path, -1, credentials.read(None))
    try:
        daemon.launch()
        assert daemon._is_listening()
        taken = daemon._port
        os.kill(daemon.pid, signal.SIGKILL)
        assert daemon._parent_thread
        daemon._parent_thread.join()
        with socket.create_server(("127.0.0.1", taken)) as other:
            daemon.start()
            assert daemon._port != taken
            assert daemon.poll(["0000000000000001"]) == {}
            other.settimeout(0)
            with pytest.raises(BlockingIOError):
                other.accept()
    finally:
        daemon.close()


def test_a_child_that_was_started_and_never_needed_leaves_nothing(tmp_path: Path) -> None:
    daemon = aria2_daemon.Daemon(FAST, tmp_path, -1, credentials.read(None))
    daemon.launch()
    pid = daemon.pid
    daemon.close()

    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{pid}").exists()


def test_no_aria2c_is_a_clear_error(tmp_path: Path, server: HostileServer) -> None:
    fetcher = Aria2Fetcher(tmp_path, msgspec.structs.replace(FAST, aria2c=tmp_path / "missing"))
    try:
        outcome = collect(fetcher, [want(DATA, server.on("/x", honest(DATA)))])[name_of(DATA)]
    finally:
        fetcher.close()
    assert isinstance(outcome, FetchFailed)
    assert isinstance(outcome.error, FetchError)
    assert "there is no aria2c at" in outcome.error.message


def test_the_secret_is_in_no_argument_no_environment_and_no_file(tmp_path: Path) -> None:
    daemon = aria2_daemon.Daemon(FAST, tmp_path, -1, credentials.read(None))
    try:
        daemon.start()
        secret = daemon._client.secret.encode()
        assert len(secret) == 64
        proc = Path(f"/proc/{daemon.pid}")
        assert secret not in (proc / "cmdline").read_bytes()
        assert secret not in (proc / "environ").read_bytes()
        assert b"proxy" not in (proc / "environ").read_bytes().lower()
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or secret not in path.read_bytes()
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077
    finally:
        daemon.close()
    assert list(tmp_path.iterdir()) == []


def test_proxies_of_the_environment_are_ignored(tmp_path: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    fetcher = Aria2Fetcher(tmp_path, FAST)
    try:
        good(collect(fetcher, [want(DATA, server.on("/x", honest(DATA)))])[name_of(DATA)], DATA)
    finally:
        fetcher.close()


_CHILD = """
import sys
from pathlib import Path
from reconciler.fetch.downloader import Aria2Fetcher
from reconciler.fetch.settings import FetchSettings
from reconciler.core.events import FetchProgress
from reconciler.ports import Want
def report(event):
    if isinstance(event, FetchProgress):
        print(event.done, flush=True)
staging, digest, size, url, connections = sys.argv[1:]
fetcher = Aria2Fetcher(Path(staging), FetchSettings(connections=int(connections), direct_bytes=0))
for outcome in fetcher.fetch([Want(digest=digest, size=int(size), sources=(url,))], report):
    print(type(outcome).__name__, flush=True)
fetcher.close()
"""


def start_child(staging: Path, data: bytes, url: str, connections: int = 4) -> subprocess.Popen[str]:
    arguments = [str(staging), name_of(data), str(len(data)), url, str(connections)]
    return subprocess.Popen([sys.executable, "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def kill_after(child: subprocess.Popen[str], count: int) -> bool:
    """Kill *child* as soon as it has *count* bytes; return whether it had not ended before."""
    assert child.stdout
    for line in child.stdout:
        if line.strip().isdigit() and int(line) >= count:
            child.kill()
            child.wait()
            return True
        if line.strip() == "Fetched":
            break
    child.wait()
    return False


def test_the_downloader_dies_with_the_program(tmp_path: Path, server: HostileServer) -> None:
    child = start_child(tmp_path, DATA, server.on("/x", honest(DATA, rate=1 << 20)))
    assert child.stdout
    for line in child.stdout:
        if line.strip().isdigit() and int(line) > 0:
            break
    below = children_of(child.pid)
    downloader = named(below, "aria2c")
    assert len(downloader) == 1
    child.kill()
    child.wait()
    child.stdout.close()
    assert outliving(below) == []


def test_killed_at_ten_points_the_next_run_goes_on_and_little_is_downloaded_twice(tmp_path: Path, server: HostileServer) -> None:
    big = some(96 << 20, 8)
    url = server.on("/x", honest(big, rate=6 << 20))
    killed = 0
    for tenth in range(1, 11):
        child = start_child(tmp_path, big, url)
        killed += kill_after(child, len(big) * tenth // 11)
        assert child.stdout
        child.stdout.close()
    fetcher = Aria2Fetcher(tmp_path, FAST)
    try:
        good(collect(fetcher, [want(big, url)])[name_of(big)], big)
    finally:
        fetcher.close()
    assert killed == 10
    assert server.sent("/x") <= 1.2 * len(big)


@pytest.mark.parametrize(("at_a_time", "expected"), [(2, [4, 6]), (1, [1, 1])], ids=["alone", "among others"])
def test_a_small_file_is_not_spread_over_more_connections_than_a_kill_may_lose(
    tmp_path: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch, at_a_time: int, expected: list[int]
) -> None:
    begun: list[int] = []
    add = aria2_daemon.Daemon.add

    def adding(daemon: aria2_daemon.Daemon, transfers: Sequence[aria2_daemon.Download]) -> dict[str, str]:
        begun.extend(it.connections for it in transfers)
        return add(daemon, transfers)

    monkeypatch.setattr(aria2_daemon.Daemon, "add", adding)
    larger = some(37 << 20, 2)
    wants = [want(DATA, server.on("/x", honest(DATA))), want(larger, server.on("/y", honest(larger)))]
    fetcher = Aria2Fetcher(tmp_path, msgspec.structs.replace(FAST, connections=8, concurrent=at_a_time))
    try:
        collect(fetcher, wants)
    finally:
        fetcher.close()
    assert sorted(begun) == expected


def test_no_thread_outlives_a_run_in_which_no_source_answers(
    tmp_path: Path, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that still imports when the program ends fails, and its traceback is what a person sees last."""
    monkeypatch.setattr(aria2_daemon, "preload", lambda: threading.Event().wait(0.5))
    wanted = want(DATA, server.on("/x", bad.status(404)))
    with contextlib.closing(Aria2Fetcher(tmp_path, FAST)) as fetcher:
        (outcome,) = fetcher.fetch([wanted], EventRecorder())
        assert isinstance(outcome, FetchFailed)
        assert "preload" not in {thread.name for thread in threading.enumerate()}


def test_a_downloader_that_outlived_its_run_keeps_the_next_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reconciler.fetch import staging as stagings

    monkeypatch.setattr(stagings, "_LOCK_SECONDS", 0.2)
    first, second = Aria2Fetcher(tmp_path, FAST), Aria2Fetcher(tmp_path, FAST)
    try:
        first._staging.open()
        outcome = next(second.fetch([want(DATA, "http://127.0.0.1:1/x")], EventRecorder()))
        assert isinstance(outcome, FetchFailed)
        assert isinstance(outcome.error, StoreBusy)
    finally:
        first.close()
        second.close()


def test_closing_the_iterator_stops_the_transfer(tmp_path: Path, server: HostileServer) -> None:
    url = server.on("/slow", honest(DATA, rate=1 << 20))
    small = some(3 << 20, 5)
    fetcher = Aria2Fetcher(tmp_path, FAST)
    try:
        outcomes = fetcher.fetch([want(DATA, url), want(small, server.on("/small", honest(small)))], EventRecorder())
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        assert my_aria2() == []
    finally:
        fetcher.close()


@pytest.mark.parametrize("when", ["asking", "moving", "hanging", "waiting"])
def test_closing_from_another_thread_ends_the_run_at_once_and_for_good(tmp_path: Path, server: HostileServer, when: str) -> None:
    """As an interrupted apply does: the iterating thread is inside a call, waits, or is between two outcomes."""
    small = some(SMALL, 5)
    behaviour = bad.silent if when == "asking" else honest(DATA, rate=1 << 18)
    wants = [want(DATA, server.on("/slow", behaviour)), want(small, server.on("/small", honest(small)))]
    fetcher = Aria2Fetcher(tmp_path, msgspec.structs.replace(FAST, direct_bytes=SMALL, timeout_seconds=60.0, rpc_seconds=60.0))
    reached, proceed = threading.Event(), threading.Event()
    outcomes: dict[str, object] = {}
    raised: list[BaseException] = []

    def recorder(event: object, /) -> None:
        if when in {"moving", "hanging"} and isinstance(event, FetchProgress) and event.done:
            for pid in my_aria2() if when == "hanging" else []:
                suspend(pid)
            reached.set()

    def run() -> None:
        try:
            for outcome in fetcher.fetch(wants, recorder):
                outcomes[outcome.digest] = outcome
                if when in {"asking", "waiting"}:
                    reached.set()
                if when == "waiting":
                    proceed.wait()
        except BaseException as error:
            raised.append(error)
        finally:
            reached.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert reached.wait(HUNG_SECONDS)
    finally:
        fetcher.close()
        proceed.set()
    thread.join(30)
    assert not thread.is_alive()
    assert raised == []
    assert isinstance(outcomes[name_of(DATA)], FetchFailed)
    assert my_aria2() == []
    again = collect(fetcher, wants)
    assert all(isinstance(outcome, FetchFailed) for outcome in again.values())
