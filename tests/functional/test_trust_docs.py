"""docs/trust.md is run: every command in it, in order, in one folder; what it shows is what comes out; each test that it names is there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "trust.md"


def steps(text: str) -> list[tuple[str, list[str]]]:
    """Return each command of the document's console blocks, with the lines of output that it shows."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def shows(expected: list[str], output: str) -> bool:
    """Say whether *output* holds the lines of *expected*, in their order; ``…`` stands for anything."""
    pattern = ".*".join("^" + ".*".join(re.escape(part) for part in line.split("…")) for line in expected if line.strip(" …"))
    return re.search(pattern, output, re.DOTALL | re.MULTILINE) is not None


@pytest.fixture
def shell(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Return a folder and an environment in which ``reconcile`` is this checkout."""
    programs, work = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    work.mkdir()
    program = programs / "reconcile"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(REPOSITORY / "cli.py"))} "$@"\n')
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RECONCILE_")}
    return work, kept | {"PATH": f"{programs}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "200"}


def test_every_command_of_the_document_does_what_it_shows(shell: tuple[Path, dict[str, str]]) -> None:
    work, environment = shell
    run = 0
    for command, expected in steps(DOCUMENT.read_text()):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        output = done.stderr + done.stdout
        refused = any(line.startswith("error[") for line in expected)
        assert (done.returncode != 0) is refused, f"$ {command}\n{output}"
        assert shows(expected, output), f"$ {command}\nshown:\n{expected}\nfound:\n{output}"
        run += 1
    assert run > 30


def test_every_test_that_the_document_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT.read_text())
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((REPOSITORY / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"


def test_the_reader_of_this_document_sees_a_difference() -> None:
    assert shows(["a … c", "…", "d"], "a b c\nx\nd\n")
    assert not shows(["a … c"], "a b\n")
    assert not shows(["d", "a"], "a\nd\n")
    assert steps("```console\n$ one \\\n  two\nout\n$ three\n```\n") == [("one    two", ["out"]), ("three", [])]
