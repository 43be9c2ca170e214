"""``init``: silent in scripts, asking on a terminal; what it tells git; where newer roots are; and completion in real shells."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler import settings_file
from reconciler.commands import init as init_command
from tests.hostile_server import HostileServer, honest
from tests.network import Network
from tests.node import Node, run, tiny


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which a command finds no settings."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint(path: Path) -> str:
    found: str = run("root", "inspect", str(path), "--json").json["fingerprint"]
    return found


# -- where newer roots are


@pytest.mark.parametrize(
    ("snapshot", "roots"),
    [
        ("https://config.example.org/snapshot.json", "https://config.example.org/{version}.root.json"),
        ("https://config.example.org/a/b/snapshot.json?v=1", "https://config.example.org/a/b/{version}.root.json"),
        ("https://config.example.org", "https://config.example.org/{version}.root.json"),
        ("snapshot.json", "{version}.root.json"),
        ("../shared/snapshot.json", "../shared/{version}.root.json"),
        ("/srv/snapshot.json", "/srv/{version}.root.json"),
    ],
)
def test_newer_roots_are_looked_for_beside_the_snapshot(snapshot: str, roots: str) -> None:
    assert init_command.beside(snapshot) == roots


def test_what_init_writes_names_them(alone: Path) -> None:
    assert run("init", "--snapshot", "https://config.example.org/s.json").code == 0
    found = settings_file.decode((alone / "reconcile.toml").read_bytes(), alone)
    assert found.network.root_updates == "https://config.example.org/{version}.root.json"
    assert run("init", "--force", "--snapshot", "s.json", "--root-updates", "https://roots.example.org/r{version}.json").code == 0
    found = settings_file.decode((alone / "reconcile.toml").read_bytes(), alone)
    assert found.network.root_updates == "https://roots.example.org/r{version}.json"


def test_a_rotation_reaches_nodes_with_default_settings_one_of_which_slept_through_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator signs with ``--publish``, uploads the folder, and no operator of a node does anything."""
    monkeypatch.chdir(tmp_path)
    for who in ("alice", "bob", "carol"):
        assert run("key", "generate", who, "--no-passphrase").code == 0
    new = ["root", "new", "1.root.json", "--network", "testnet", "--root-key", "alice.pub", "--snapshot-key", "alice.pub"]
    assert run(*new).code == 0
    assert run("root", "sign", "1.root.json", "--key", "alice.key", "--publish", "public").code == 0
    assert sorted(path.name for path in (tmp_path / "public").iterdir()) == ["1.root.json", "root.json"]

    def publish(key: str, root: str, first: bool = False) -> None:
        words = ["new", "snapshot.json", "--network", "testnet"] if first else ["set", "snapshot.json", "--expires", "30d"]
        second = int(time.time())
        while not first and int(time.time()) == second:  # a node takes no other snapshot of the same second, and no clock has an event
            time.sleep(0.05)
        assert run("snapshot", *words).code == 0
        assert run("snapshot", "sign", "snapshot.json", "--key", f"{key}.key", "--root", root).code == 0
        shutil.copy("snapshot.json", "public/snapshot.json")

    def rotate(version: int, before: str, after: str) -> None:
        old, new = f"{version - 1}.root.json", f"{version}.root.json"
        assert run("root", "add-key", old, f"{after}.pub", "--role", "root", "--role", "snapshot", "--out", new).code == 0
        assert run("root", "remove-key", new, f"{before}.pub").code == 0
        half = run("root", "sign", new, "--key", f"{before}.key", "--previous", old, "--publish", "public")
        assert "not put into public yet" in half.err + half.out
        assert not (tmp_path / "public" / new).exists()
        assert run("root", "sign", new, "--key", f"{after}.key", "--previous", old, "--publish", "public").code == 0
        publish(after, new)

    publish("alice", "1.root.json", first=True)
    with HostileServer() as server:

        def upload() -> None:
            for path in (tmp_path / "public").iterdir():
                server.on(f"/{path.name}", honest(path.read_bytes()))

        def on_node(name: str, *words: str) -> tuple[int, str]:
            ran = run(*words, "--config", str(tmp_path / name / "reconcile.toml"))
            return ran.code, ran.err

        upload()
        for name in ("first", "second", "sleeper"):
            (tmp_path / name).mkdir()
            with contextlib.chdir(tmp_path / name):
                assert run("init", "--root", "../public/root.json", "--snapshot", server.url("/snapshot.json")).code == 0
            assert on_node(name, "sync") == (0, "")
        rotate(2, "alice", "bob")
        upload()
        for name in ("first", "second"):
            assert on_node(name, "sync") == (0, "")
        rotate(3, "bob", "carol")
        upload()
        for name in ("first", "second", "sleeper"):
            assert on_node(name, "sync") == (0, "")
            shown = run("trust", "show", "--json", "--config", str(tmp_path / name / "reconcile.toml")).json
            assert shown["version"] == 3
        (tmp_path / "public/3.root.json").write_bytes(b"{}")


# -- git


def test_init_keeps_the_store_out_of_git(alone: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert run("init").code == 0
    (alone / "store/blobs").mkdir(parents=True)
    (alone / "store/blobs/x").write_text("x")
    seen = subprocess.run(["git", "status", "--porcelain", "--untracked-files=all"], capture_output=True, text=True, check=True).stdout
    assert "store" not in seen
    assert "reconcile.toml" in seen


@pytest.mark.parametrize(
    ("store", "before", "after"),
    [
        ("store", "", "/store/\n"), ("data/store", "", "/data/store/\n"), ("/srv/store", "", None), ("../store", "", None), (".", "", None),
        ("store", "*.pyc", "*.pyc\n/store/\n"), ("store", "store/\n", "store/\n"), ("store", "/store\n", "/store\n"),
    ],
)  # fmt: skip
def test_the_store_is_ignored_once_and_only_where_it_lies_here(alone: Path, store: str, before: str, after: str | None) -> None:
    if before:
        (alone / ".gitignore").write_text(before)
    run("init", "--store", store)
    lines = (alone / ".gitignore").read_text().splitlines() if (alone / ".gitignore").exists() else []
    found = [line for line in lines if line != "/node.key"]  # which signs reports
    assert found == (after or "").splitlines()


# -- a root from an address


def test_a_root_that_is_fetched_needs_its_fingerprint(alone: Path) -> None:
    envelope = Network().root()
    (alone / "elsewhere").mkdir()
    (alone / "elsewhere/root.json").write_bytes(envelope)
    expected = fingerprint(alone / "elsewhere/root.json")
    with HostileServer() as server:
        address = server.on("/root.json", honest(envelope))
        refused = run("init", "--root", address)
        assert (refused.code, "--fingerprint" in refused.err) == (64, True)
        assert not (alone / "reconcile.toml").exists()
        assert run("init", "--root", address, "--fingerprint", "0" * 64).code == 4
        assert run("init", "--root", address, "--fingerprint", expected).code == 0
    assert (alone / "root.json").read_bytes() == envelope


# -- a person at a terminal


class Terminal:
    """A person at a real terminal, who reads and types."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RECONCILE_")}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "reconciler", *words],
            cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"COLUMNS": "200", "NO_COLOR": "1"},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> None:
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._ours], [], [], 0.2)[0]:
                self.seen += os.read(self._ours, 1 << 16).decode()
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._ours, f"{text}\n".encode())

    def end(self) -> int:
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 1 << 16):
                self.seen += data.decode()
        os.close(self._ours)
        return self._child.wait(timeout=30)


@pytest.fixture
def published(node: Node) -> Iterator[HostileServer]:
    node.publish(node.item("a:v1", tiny("a")))
    with HostileServer() as server:
        server.on("/snapshot.json", honest((node.folder / "published.json").read_bytes()))
        server.on("/root.json", honest((node.folder / "root.json").read_bytes()))
        yield server


def test_a_person_is_asked_and_what_is_typed_is_tested(node: Node, published: HostileServer, tmp_path: Path) -> None:
    here = tmp_path / "new"
    here.mkdir()
    person = Terminal(here, "init")
    person.until("Address of the network's signed snapshot")
    person.type(published.url("/nothing-here.json"))
    person.until("404")
    person.until("Use it all the same?")
    person.type("n")
    person.until("Address of the network's signed snapshot")
    person.type(published.url("/snapshot.json"))
    person.until("trust root")
    person.type(published.url("/root.json"))
    person.until(fingerprint(node.folder / "root.json"))
    person.until("Is it the fingerprint")
    person.type("y")
    person.until("snapshot 1 of testnet: 1 model, validly signed")
    assert person.end() == 0
    assert run("lock", "--config", str(here / "reconcile.toml")).code == 0


def test_a_fingerprint_that_is_not_the_one_pins_nothing(node: Node, published: HostileServer, tmp_path: Path) -> None:
    here = tmp_path / "new"
    here.mkdir()
    person = Terminal(here, "init")
    person.until("Address of the network's signed snapshot")
    person.type("")
    person.until("trust root")
    person.type(str(node.folder / "root.json"))
    person.until("Is it the fingerprint")
    person.type("n")
    person.until("Nothing is pinned")
    assert person.end() == 0
    assert not (here / "root.json").exists()


# -- completion and misspelt words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_takes_its_script(shell: str, tmp_path: Path) -> None:
    script = run("completion", shell).out
    assert "_RECONCILE_COMPLETE" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is made, and not tried")
    (tmp_path / "script").write_text(script)
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0


def test_bash_completes_commands_and_model_ids(used: Node, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/reconcile").write_text(f'#!/bin/sh\nexec {sys.executable} -m reconciler "$@"\n')
    (tmp_path / "bin/reconcile").chmod(0o755)

    def completed(*words: str) -> list[str]:
        line = " ".join(words)
        code = (
            f'source <("{sys.executable}" -m reconciler completion bash); COMP_WORDS=({line} ""); COMP_WORDS=({line}); '
            f'COMP_CWORD={len(words) - 1}; COMPREPLY=(); _reconcile_completion reconcile; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        ran = subprocess.run(["bash", "-c", code], cwd=used.folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()

    assert "status" in completed("reconcile", "sta")
    assert completed("reconcile", "status", "a") == ["a:v1"]
    assert completed("reconcile", "plan", "--only", "a") == ["a:v1"]
    assert "--detailed-exitcode" in completed("reconcile", "plan", "--det")


def test_a_misspelt_command_names_the_nearest() -> None:
    ran = run("plna")
    assert ran.code == 64
    assert "did you mean 'plan'?" in ran.err
    assert "there is no command 'xyzzy'" in run("xyzzy").err


def test_a_name_without_a_version_means_all_its_versions(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("a:v2", tiny("a2")), node.item("b:v1", tiny("b")))
    ops = {one["id"]: one["op"] for one in node.run("plan", "--only", "a", "--json").json["models"]}
    assert ops == {"a:v1": "install", "a:v2": "install", "b:v1": "keep"}
    ops = {one["id"]: one["op"] for one in node.run("plan", "--except", "a", "--json").json["models"]}
    assert ops == {"a:v1": "keep", "a:v2": "keep", "b:v1": "install"}
    assert [one["id"] for one in node.run("status", "a", "--json").json["models"]] == ["a:v1", "a:v2"]
    ran = node.run("status", "a:v3")
    assert (ran.code, "did you mean 'a:v" in ran.err) == (64, True)
