"""An exception that nobody raised on purpose, anywhere: exit code 1, one sentence, a report, and never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.node import Node, Ran, run, tiny

Patch = pytest.MonkeyPatch


def broken(*_: object, **__: object) -> NoReturn:
    raise KeyError("https://user:hunter22@example.org/x?token=hunter22")


@pytest.fixture
def node(node: Node) -> Node:
    node.publish(node.item("a:v1", tiny("a")))
    return node


def check(ran: Ran) -> Path:
    """Check that *ran* ended as a bug must, and return its report."""
    assert ran.code == 1, ran
    assert "Traceback" not in ran.out + ran.err
    assert "hunter22" not in ran.out + ran.err
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error[")]
    found = re.fullmatch(r"error\[internal-error\]: KeyError in \S+; the report is (\S+)", line)
    assert found, line
    report = Path(found[1])
    assert "KeyError" in report.read_text()
    assert "hunter22" not in report.read_text()
    assert report.stat().st_mode & 0o077 == 0
    return report


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("reconciler.core.plan.diff", ["plan"]),
        ("reconciler.core.plan.diff", ["status"]),
        ("reconciler.commands.status.history", ["history"]),
        ("reconciler.commands.status.incidents", ["incidents", "--lines"]),
        ("reconciler.commands.maintenance.garbage", ["gc", "--dry-run"]),
        ("reconciler.commands.lock.preview_lock", ["lock", "--check"]),
        ("reconciler.report.terminal.plan", ["plan"]),
    ],
)
def test_a_bug_in_a_command_that_reads_is_reported_in_the_store(node: Node, monkeypatch: Patch, place: str, command: list[str]) -> None:
    monkeypatch.setattr(place, broken)
    assert check(node.run(*command)).parent == node.store / "reports"


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("reconciler.core.lock.compile", ["lock"]),
        ("reconciler.store.observe.node_state", ["apply", "--yes"]),
        ("reconciler.store.observe.node_state", ["sync"]),
        ("reconciler.store.observe.node_state", ["verify"]),
        ("reconciler.store.generations.current_or_empty", ["rollback"]),
        ("reconciler.core.plan.diff", ["agent", "--once"]),
    ],
)
def test_a_bug_while_the_store_is_held_is_an_incident_too(node: Node, monkeypatch: Patch, place: str, command: list[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, broken)
        report = check(node.run(*command))
    assert report.parent == node.store / "reports"
    assert "internal-error" in node.kinds()
    assert node.run("apply", "--yes").code == 0


def test_programs_get_the_bug_as_json(node: Node, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr("reconciler.core.plan.diff", broken)
    into = tmp_path / "out.json"

    ran = node.run("plan", "--json")
    assert node.run("plan", "--json-into", str(into)).code == 1

    assert ran.code == 1
    for document in (ran.json, json.loads(into.read_bytes())):
        assert document["error"]["name"] == "internal-error"
        assert "the report is " in document["error"]["message"]


def test_a_bug_before_there_is_a_store_makes_none(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reconciler.commands.init.init", broken)
    report = check(run("init"))
    assert list(tmp_path.iterdir()) == []
    assert not report.is_relative_to(tmp_path / "store")


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("reconciler.settings_file.decode", ["plan"]),
        ("reconciler.commands.context.from_settings", ["status"]),
        ("reconciler.commands.doctor.examine", ["doctor", "--offline"]),
    ],
)
def test_a_bug_while_the_settings_are_read_is_reported(node: Node, monkeypatch: Patch, place: str, command: list[str]) -> None:
    monkeypatch.setattr(place, broken)
    check(node.run(*command))


def test_a_bug_in_a_command_of_the_operator_is_reported(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reconciler.publish.keys.generate", broken)
    check(run("key", "generate", "--no-passphrase", "a"))
    assert list(tmp_path.iterdir()) == []


class Unspeakable(Exception):
    """An exception that cannot even be shown."""

    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize("place", ["reconciler.core.plan.diff", "reconciler.store.observe.node_state"])
@pytest.mark.parametrize("make", [Unspeakable, RecursionError, MemoryError, AssertionError, lambda: ExceptionGroup("x", [KeyError("y")])])
def test_whatever_the_exception_is_one_sentence_tells_of_it(
    node: Node, monkeypatch: Patch, place: str, make: Callable[[], Exception]
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise make()

    monkeypatch.setattr(place, fail)
    for command in ("plan", "apply"):
        ran = node.run(command)
        assert ran.code == 1, ran
        assert ran.err.startswith("error[internal-error]: "), ran
        assert "Traceback" not in ran.err


def test_a_report_that_cannot_be_written_hides_nothing(node: Node, monkeypatch: Patch) -> None:
    def no_report(*_: object) -> NoReturn:
        raise TypeError("a bug in what reports bugs")

    monkeypatch.setattr("reconciler.core.plan.diff", broken)
    monkeypatch.setattr("reconciler.store.crash_report.write", no_report)
    ran = node.run("plan")
    assert ran.code == 1
    assert ran.err.startswith("error[internal-error]: KeyError; no report could be written: TypeError")


def test_the_agent_goes_on_after_a_bug_and_says_where_its_report_is(node: Node, monkeypatch: Patch) -> None:
    monkeypatch.setattr("reconciler.commands.apply.sync", broken)
    assert node.run("agent", "--once").code == 1
    health = json.loads((node.store / "health.json").read_bytes())
    assert health["outcome"] == "error"
    assert health["message"].startswith("internal-error: KeyError in ")
    assert str(node.store / "reports") in health["message"]
    assert "hunter22" not in health["message"]


@pytest.mark.parametrize("place", ["reconciler.commands.status.node_metrics", "reconciler.report.metrics.render"])
def test_a_bug_in_what_is_told_of_a_cycle_fails_no_cycle(node: Node, monkeypatch: Patch, place: str) -> None:
    monkeypatch.setattr(place, broken)
    ran = node.run("agent", "--once", "--metrics-file", str(node.folder / "m.prom"))
    assert ran.code == 0
    assert "the metrics could not be written: KeyError in " in ran.out
    assert str(node.store / "reports") in ran.out


def test_a_bug_in_one_check_of_the_doctor_hides_no_other(node: Node, monkeypatch: Patch) -> None:
    monkeypatch.setattr("reconciler.store.observe.node_state", broken)
    found = {one["name"]: one for one in node.run("doctor", "--offline", "--json").json["findings"]}
    assert found["store"]["text"].startswith("internal-error: KeyError in ")
    assert {"python", "lock", "ledger", "agent"} <= found.keys()
