"""A run that is asked to stop, whose terminal hangs up or whose reader goes: it ends soon, leaves nothing, and the next one finishes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reconciler.demo.server import serving
from tests.crash.syscalls import Point, Traced, missing
from tests.crash.whole import Life, adopting
from tests.hostile_server import HostileServer, honest
from tests.node import Node, tiny
from tests.processes import until
from tests.storenode import memory

PATIENCE = 30.0
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SLOW = tiny("slow", width=512)


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    """A shell's background job ignores SIGINT, under ``nohup`` all ignore SIGHUP, and so would what we start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def begun(node: Node, *arguments: str, **streams: object) -> Iterator[subprocess.Popen[str]]:
    """Begin an update of *node*, as a process of its own and with streams of its own; it does not outlive the test."""
    command = [sys.executable, "-m", "reconciler", "apply", "--yes", "--config", str(node.folder / "reconcile.toml"), *arguments]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | streams
    with subprocess.Popen(command, text=True, start_new_session=True, **given) as running:  # type: ignore[call-overload]
        try:
            yield running
        finally:
            running.kill()


def ended(running: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end, and see that nobody is shown a traceback; return exit code and output."""
    out, err = running.communicate(timeout=PATIENCE)
    assert "Traceback" not in f"{out}{err}", f"{out}{err}"
    return running.returncode, f"{out}{err}"


@pytest.fixture(scope="module")
def same() -> Iterator[Life]:
    """A node in memory, and the end of its update."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder, serving() as server:
        yield Life(Path(folder, "node"), server)


@pytest.fixture
def life(same: Life) -> Life:
    """A node that is about to be updated."""
    same.fresh()
    return same


@pytest.fixture
def source() -> Iterator[HostileServer]:
    """A source that would take a minute to send the slow model."""
    with HostileServer() as running:
        running.on("/slow", honest(SLOW, rate=len(SLOW) / 60))
        yield running


@pytest.fixture
def slow(node: Node, source: HostileServer) -> Node:
    """A node with one model, which is about to fetch another."""
    stay = node.item("stay:v1", tiny("stay"))
    node.publish(stay)
    assert node.run("apply").code == 0
    node.publish(stay, node.item("slow:v1", SLOW, serve=False, urls=[source.url("/slow")]))
    return node


def finishes(node: Node, source: HostileServer) -> bool:
    """Whether what served still does, and the next run brings the rest."""
    assert [model["id"] for model in node.index()["models"]] == ["stay:v1"]
    assert (node.store / "active/models/stay/v1/stay.gguf").read_bytes() == tiny("stay")
    source.on("/slow", honest(SLOW))
    return node.run("apply").code == 0 and node.states() == {"stay:v1": "active", "slow:v1": "active"}


# -- at an exact call


STOPPED_AT = [
    (signal.SIGTERM, Point("rename", 2)), (signal.SIGINT, Point("rename", 3)), (signal.SIGHUP, Point("symlink", 2)),
    (signal.SIGINT, Point("pwrite64", 90)), (signal.SIGPIPE, Point("rename", 3)),
]  # fmt: skip


@pytest.mark.parametrize(("number", "point"), STOPPED_AT)
def test_a_stop_at_a_system_call(life: Life, number: signal.Signals, point: Point) -> None:
    """At the very call, in a swap or a statement of the ledger; ``make crash`` stops at every third."""
    if why := missing():
        pytest.skip(why)

    assert Traced(life).signalled(number, point) == []


# -- while others work for it


@pytest.mark.parametrize(("number", "times"), [*((number, 1) for number in STOPS), (signal.SIGTERM, 2)])
def test_a_stop_while_a_model_is_fetched_and_hashed(slow: Node, source: HostileServer, number: signal.Signals, times: int) -> None:
    with adopting() as outliving, begun(slow) as running:
        until(lambda: source.sent("/slow") > len(SLOW) // 60, running)
        assert "aria2c" in {child.name() for child in psutil.Process(running.pid).children(recursive=True)}
        for _ in range(times):
            running.send_signal(number)
        code, _ = ended(running)
        assert outliving() == []

    assert code == 128 + number
    assert finishes(slow, source)


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_while_a_model_is_tested(life: Life, number: signal.Signals) -> None:
    """The run waits for the test job that has begun, which is at most the job's timeout."""
    with adopting() as outliving, begun(life.node, "--json") as running:
        assert running.stdout
        for line in running.stdout:
            if json.loads(line).get("phase") == "testing":
                break
        running.send_signal(number)
        code, _ = ended(running)
        assert outliving() == []

    assert code == 128 + number
    assert life.after() == []


def test_a_reader_that_goes_away_stops_no_run(life: Life) -> None:
    """As with ``| head -1``."""
    with begun(life.node) as running:
        assert running.stdout
        running.stdout.readline()
        running.stdout.close()
        code, _ = ended(running)

    assert code in {0, 141}
    assert life.after() == []


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_full_output_stops_no_run_and_is_no_success(life: Life, json_: list[str]) -> None:
    with Path("/dev/full").open("w") as full, begun(life.node, *json_, stdout=full.fileno()) as running:
        code, errors = ended(running)

    assert code == 1
    assert "No space left on device" in errors
    assert life.contents()["states"] == life.end["states"]
    assert life.after() == []


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_stop_no_run(life: Life, closed: str) -> None:
    ran = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *life.command], capture_output=True, text=True, timeout=PATIENCE)

    assert ran.returncode == 0, ran
    assert "Traceback" not in ran.stdout + ran.stderr
    assert life.contents() == life.end


# -- before it can answer, and after it has

BEFORE = {"click.py": "import os, signal; os.kill(os.getpid(), signal.SIGINT)"}
AFTER = {"sitecustomize.py": "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"}


@pytest.mark.parametrize("shadow", [BEFORE, AFTER], ids=["imports", "ends"])
def test_an_interrupt_while_python_imports_or_ends_shows_no_traceback(shadow: dict[str, str], tmp_path: Path) -> None:
    for name, text in shadow.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "reconciler", "--version"]

    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=PATIENCE)

    assert ran.returncode == -signal.SIGINT, ran
    assert ran.stderr == ""


# -- whoever started it is gone


def test_a_run_that_shall_outlive_its_terminal_does(life: Life) -> None:
    """As with nohup."""
    with begun(life.node, "--json", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as running:
        assert running.stdout
        running.stdout.readline()
        running.send_signal(signal.SIGHUP)
        code, _ = ended(running)

    assert code == 0
    assert life.contents() == life.end


def test_a_terminal_that_hangs_up_ends_the_run(slow: Node, source: HostileServer) -> None:
    terminal, its = pty.openpty()
    with adopting() as outliving, begun(slow, stdin=its, stdout=its, stderr=its, preexec_fn=lambda: os.login_tty(0)) as running:
        os.close(its)
        until(lambda: source.sent("/slow") > len(SLOW) // 60, running)
        os.close(terminal)  # the kernel sends SIGHUP, and refuses every write from then on
        code, _ = ended(running)
        assert outliving() == []

    assert code in {1, 128 + signal.SIGHUP}
    assert finishes(slow, source)


def test_a_parent_that_is_killed_takes_nothing_along(life: Life) -> None:
    """As cron's shell may be; the run goes on to its end."""
    script = '"$@" >"$0" & echo $!; wait'
    with adopting() as outliving:
        parent = subprocess.Popen(
            ["setsid", "sh", "-c", script, life.node.folder / "out", *life.command], stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout
        assert int(parent.stdout.readline())
        parent.kill()
        parent.stdout.close()
        parent.wait()
        assert outliving() == []

    assert life.contents() == life.end
