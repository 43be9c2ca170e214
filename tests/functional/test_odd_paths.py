"""Where a node lies is its operator's choice: any name works, or is refused before anything is done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from tests.node import Node, Ran, run, tiny

NOT_UTF8 = os.fsdecode(b"caf\xe9")


def published(folder: Path, server: Server) -> Node:
    node = Node(folder, server)
    node.publish(node.item("a:v1", tiny("a")))
    return node


@pytest.mark.parametrize(
    "name", ["a b", "line\nbreak", "quo'te\"s", "100%20#?&;", "e\u0301\u00e9", "-dash", "back\\slash", "$HOME `id`", "{version}"]
)
def test_a_node_works_in_a_folder_of_any_name(tmp_path: Path, server: Server, name: str) -> None:
    node = published(tmp_path / name / "node", server)

    assert [node.run(*command).code for command in (("plan",), ("apply",), ("verify",), ("gc",))] == [0, 0, 0, 0]
    assert node.states() == {"a:v1": "active"}


COMMANDS = ["plan", "apply", "sync", "status", "verify", "gc", "history", "incidents"]


def refused(ran: Ran, what: str) -> None:
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error[bad-settings]: {what}: the path ")
    assert "is not UTF-8\nhint: " in ran.err
    assert ran.err.isascii()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_whose_name_is_not_utf8_is_refused_before_anything_is_done(tmp_path: Path, server: Server, command: str) -> None:
    node = Node(tmp_path / NOT_UTF8 / "node", server)

    refused(node.run(command), "the trust root")

    assert not node.store.exists()


def test_the_working_directory_without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    monkeypatch.chdir(folder)

    refused(run("plan"), "the trust root")


def linked(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch
    (node.folder.parent / NOT_UTF8).mkdir()
    node.store.symlink_to(node.folder.parent / NOT_UTF8)


def at_home(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", NOT_UTF8)
    node.configure('archive = "~/cold"\n')


def temporary(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.folder.parent / NOT_UTF8).mkdir()
    monkeypatch.setenv("TMPDIR", str(node.folder.parent / NOT_UTF8))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.parametrize(("how", "what"), [(linked, "the store"), (at_home, "cold storage"), (temporary, "$TMPDIR")])
def test_its_siblings(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, how: Callable[[Node, pytest.MonkeyPatch], None], what: str
) -> None:
    node = published(tmp_path / "node", server)
    if node.store.exists():
        node.store.rename(node.folder / "elsewhere")
    how(node, monkeypatch)

    refused(node.run("apply"), what)

    assert node.run("doctor", "--offline").code == 1


def test_the_doctor_tells_of_it_as_of_other_bad_settings(tmp_path: Path, server: Server) -> None:
    node = Node(tmp_path / NOT_UTF8 / "node", server)

    ran = node.run("doctor", "--offline")

    assert ran.code == 1
    assert "is not UTF-8" in ran.out
    assert "python" in ran.out
