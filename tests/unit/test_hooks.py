"""The operator's commands around a swap: told and asked, never trusted with the engine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from reconciler.core.events import Incident, Notice
from reconciler.core.state import Generation
from reconciler.hooks import CommandHooks
from tests.processes import outliving
from tests.twins.node import EventLog

MADE = Generation(number=3)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "index.json"
    path.write_bytes(b'{"generation":3}')
    return path


class Facts:
    """What is remembered between runs."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def fact(self, key: str, kind: Any) -> Any:
        found = self.facts.get(key)
        assert found is None or isinstance(found, kind)
        return found

    def set_fact(self, key: str, value: object) -> None:
        self.facts[key] = value


def hooks(index: Path, heard: EventLog, *, activated: str = "", healthy: str = "", seconds: float = 30.0) -> CommandHooks:
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code) if code else ()

    return commands_of(index, heard, activated=python(activated), healthy=python(healthy), seconds=seconds)


def commands_of(
    index: Path, heard: EventLog, *, activated: tuple[str, ...] = (), healthy: tuple[str, ...] = (), seconds: float = 30.0
) -> CommandHooks:
    return CommandHooks(
        activated=activated,
        healthy=healthy,
        healthy_seconds=seconds,
        folder=index.parent,
        index=lambda _: index,
        memory=Facts(),
        now=lambda: datetime(2026, 11, 20, tzinfo=UTC),
        report=heard,
    )


def test_without_commands_every_node_is_healthy(index: Path) -> None:
    heard = EventLog()
    commands = hooks(index, heard)

    commands.activated(MADE)

    assert commands.healthy(MADE) == ""
    assert heard.events == []


@pytest.mark.parametrize("hook", ["activated", "healthy"])
def test_a_command_reads_the_index(index: Path, tmp_path: Path, hook: str) -> None:
    code = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())"
    commands = hooks(index, EventLog(), **{hook: code})  # type: ignore[arg-type]  # one of the two

    getattr(commands, hook)(MADE)

    assert (tmp_path / "told").read_text() == '{"generation":3}'


def test_a_failing_activated_is_a_warning(index: Path) -> None:
    heard = EventLog()

    hooks(index, heard, activated="import sys; sys.exit('no route')").activated(MADE)

    assert heard.events == [
        Notice(level="warning", text="the activated hook exited with 1: no route; it is run again in the next run"),
        Incident(kind="hook-failed", detail="the activated hook exited with 1: no route"),
    ]


def test_activated_runs_once_for_each_generation_and_again_until_it_succeeds(index: Path) -> None:
    heard, count, bad = EventLog(), index.with_name("count"), index.with_name("bad")
    commands = commands_of(index, heard, activated=("sh", "-c", f"echo x >> {count}; test ! -e {bad}"))

    def told(generation: int) -> int:
        commands.activated(Generation(number=generation))
        return len(count.read_text().split())

    assert [told(3), told(3)] == [1, 1]
    bad.touch()
    assert [told(4), told(4), told(4)] == [2, 3, 4]
    assert heard.kinds() == ["hook-failed"], "an incident once, however often it fails"
    bad.unlink()
    assert [told(4), told(4)] == [5, 5]
    assert told(3) == 6, "an earlier generation that serves again is another set than the last one"


def test_an_unhealthy_node_says_why(index: Path) -> None:
    why = hooks(index, EventLog(), healthy="import sys; print('x' * 999, 'GPU lost', file=sys.stderr); sys.exit(7)").healthy(MADE)

    assert why.startswith("exited with 7: ")
    assert why.endswith("GPU lost")
    assert len(why) < 350


def test_a_command_that_is_not_there_is_not_healthy(index: Path) -> None:
    commands = commands_of(index, EventLog(), healthy=("/nowhere/at-all",))

    assert commands.healthy(MADE).startswith("could not be started: ")


def test_an_index_that_is_gone_is_not_healthy(tmp_path: Path) -> None:
    assert hooks(tmp_path / "gone", EventLog(), healthy="pass").healthy(MADE).startswith("could not be started: ")


@pytest.mark.slow
def test_a_slow_command_ends_with_all_that_it_started(index: Path, tmp_path: Path) -> None:
    script = f"sleep 600 & echo $$ $! > {tmp_path}/pids; wait"
    commands = commands_of(index, EventLog(), healthy=("/bin/sh", "-c", script), seconds=3.0)

    why = commands.healthy(MADE)

    assert why == "did not answer within 3 seconds"
    assert outliving(map(int, (tmp_path / "pids").read_text().split())) == []


@pytest.mark.parametrize("seconds", [30.0, 0.5], ids=["answers", "hangs"])
def test_what_a_command_leaves_running_is_not_waited_for(index: Path, tmp_path: Path, seconds: float) -> None:
    """A daemon in a session of its own holds the command's standard error open."""
    code = (
        "import signal, subprocess, sys\n"
        f"left = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(20)'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(left.pid))\n"
    ) + ("signal.pause()" if seconds < 1 else "sys.exit('GPU lost')")
    began = time.monotonic()

    why = hooks(index, EventLog(), healthy=code, seconds=seconds).healthy(MADE)

    assert why in {"exited with 1: GPU lost", "did not answer within 0.5 seconds"}
    assert time.monotonic() - began < 15
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_command_that_floods_its_output_is_read_to_the_end(index: Path) -> None:
    code = "import sys; sys.stdout.write('x' * 1_000_000); sys.stderr.write('y' * 1_000_000)"

    assert hooks(index, EventLog(), healthy=code).healthy(MADE) == ""


def test_a_command_inherits_no_descriptor(index: Path, tmp_path: Path) -> None:
    secret = os.open(index, os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        code = f"import os, sys; sys.exit({secret} in map(int, os.listdir('/proc/self/fd')))"
        assert hooks(index, EventLog(), healthy=code).healthy(MADE) == ""
    finally:
        os.close(secret)


def test_a_command_runs_in_the_settings_folder_and_not_where_the_caller_is(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a script that the settings name by a relative path would be another user's, in a folder of that user."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for folder, code in ((elsewhere, 1), (index.parent, 0)):
        (folder / "script").write_text(f"#!/bin/sh\nexit {code}\n")
        (folder / "script").chmod(0o755)

    assert commands_of(index, EventLog(), healthy=("sh", "script")).healthy(MADE) == ""
