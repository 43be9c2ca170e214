"""What a person reads who did something wrong: what it is, and the way out; and what a program reads, that it failed."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import IO

import pytest

from reconciler import cli
from tests.node import Node, run, tiny


@pytest.fixture
def used(node: Node) -> Node:
    """A node that serves one model."""
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    return node


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with no settings above it, to work in."""
    monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- an output that takes nothing ------------------------------------------------------------------


def full() -> IO[str]:
    """Return a stream to a full disk."""
    return Path("/dev/full").open("w")


def unread() -> IO[str]:
    """Return a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def said_to(stream: IO[str], *arguments: str) -> tuple[int, str]:
    """Run one command line with *stream* as its standard output; return its exit code and what it said on standard error."""
    err = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(err):
        code = cli.run(list(arguments))
        said = "" if err.closed else err.getvalue()
    with contextlib.suppress(OSError):
        stream.close()
    return code, said


SHOWN = [
    ["plan"], ["status"], ["lock"], ["lock", "--check"], ["apply", "--yes"], ["sync"], ["verify"], ["gc", "--dry-run"], ["history"],
    ["incidents"], ["doctor", "--offline"], ["trust", "show"],
]  # fmt: skip


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_full_output_is_no_success(used: Node, json_: list[str]) -> None:
    for command in SHOWN:
        code, said = said_to(full(), *command, *json_, "--config", str(used.folder / "reconcile.toml"))
        assert code == 1, command
        assert "error[store]: standard output: No space left on device" in said


def test_a_full_output_of_the_operators_commands_is_no_success(alone: Path) -> None:
    assert run("snapshot", "new", "s.json", "--network", "testnet").code == 0
    for command in (["snapshot", "inspect", "s.json"], ["snapshot", "inspect", "s.json", "--json"], ["--help"], ["--version"]):
        code, said = said_to(full(), *command)
        assert code == 1, command
        assert "error[store]: standard output: No space left on device" in said
    del alone


def test_an_error_that_standard_output_does_not_take_is_said_on_standard_error(used: Node) -> None:
    (used.folder / "models.lock").write_text("edited")
    code, said = said_to(full(), "plan", "--json", "--config", str(used.folder / "reconcile.toml"))

    assert code == 4
    assert said.startswith("error[lock-mismatch]: ")


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_went_away_ends_no_run_and_is_told_as_a_pipe_is(node: Node, json_: list[str]) -> None:
    node.publish(node.item("a:v1", tiny("a")))

    code, _ = said_to(unread(), "apply", "--yes", *json_, "--config", str(node.folder / "reconcile.toml"))

    assert code == 141
    assert node.states() == {"a:v1": "active"}


def test_json_into_a_full_file_is_no_success(used: Node) -> None:
    for command in ("plan", "apply"):
        ran = used.run(command, "--json-into", "/dev/full")
        assert ran.code == 1, ran
        assert "/dev/full: No space left on device" in ran.err


# -- a failure that a program reads from a file ----------------------------------------------------


def test_json_into_a_file_tells_of_the_error_too(used: Node, tmp_path: Path) -> None:
    (used.folder / "published.json").write_text("{}")
    (used.folder / "models.lock").write_text("edited")
    into = tmp_path / "said.json"
    for command in (["plan"], ["apply", "--yes"], ["sync"], ["status"], ["verify"]):
        into.write_text("of an earlier run\n")

        ran = used.run(*command, "--json-into", str(into))

        assert ran.code == 4
        last = json.loads(into.read_text().splitlines()[-1])
        assert last["error"]["name"] == ran.err.partition("[")[2].partition("]")[0]
        assert set(last["error"]) == {"name", "message", "hint"}
        assert "of an earlier run" not in into.read_text()


def test_json_into_a_folder_that_is_not_there_says_so(used: Node, tmp_path: Path) -> None:
    ran = used.run("plan", "--json-into", str(tmp_path / "gone/said.json"))
    assert ran.code == 1
    assert "gone/said.json: No such file or directory" in ran.err


# -- no command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["trust"], ["key"], ["root"], ["snapshot"]], ids=" ".join)
def test_a_command_that_is_missing_is_answered_with_help(command: list[str]) -> None:
    ran = run(*command)

    assert ran.code == 64
    assert ran.err == run(*command, "--help").out
    assert ran.out == ""
