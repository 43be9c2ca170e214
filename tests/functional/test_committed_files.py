"""What git, editors and formatters do to committed files: each cause is named with what mends it, and git is told to do none of it."""

from __future__ import annotations

import codecs
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node import Node, run, tiny

Damage = Callable[[bytes], bytes]


@pytest.fixture
def node(node: Node) -> Node:
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    return node


def crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


def conflict(data: bytes) -> bytes:
    half = len(data) // 2
    half = data.find(b"\n", half) + 1 or half
    return data[:half] + b"\n<<<<<<< HEAD\nversion = 2\n=======\nversion = 3\n>>>>>>> next\n" + data[half:]


def lfs(data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize %d\n" % len(data)


def reindented(data: bytes) -> bytes:
    return json.dumps(json.loads(data), indent=4).encode() + b"\n"


#: What no document of ours survives, in any format.
RUINED: dict[str, tuple[Damage, str]] = {
    "bom": (lambda data: codecs.BOM_UTF8 + data, "byte order mark"),
    "conflict": (conflict, "merge conflict markers, the first in line "),
    "utf-16": (lambda data: data.decode().encode("utf-16"), "UTF-16"),
    "lfs": (lfs, "Git LFS pointer"),
    "empty": (lambda data: b"", "it is empty"),
}
LOCKS: dict[str, tuple[Damage, str]] = RUINED | {
    "crlf": (crlf, "its lines end in CRLF"),
    "some-crlf": (lambda data: data.replace(b"\n", b"\r\n", 3), "its lines end in CRLF"),
    "no-final-newline": (lambda data: data.rstrip(b"\n"), "it ends in no newline"),
    "final-newlines": (lambda data: data + b"\n\n", "it ends in 3 newlines"),
    "crlf-and-newlines": (lambda data: crlf(data + b"\n"), "its lines end in CRLF"),
    "formatted": (lambda data: data.replace(b" = ", b"="), "its values are the same, and its layout is not, from line "),
    "spaces-at-ends": (lambda data: data.replace(b"\n", b" \n"), "its values are the same, and its layout is not, from line 1"),
}


@pytest.mark.parametrize("name", LOCKS)
def test_what_a_tool_did_to_the_lock_is_named_and_lock_mends_it(node: Node, name: str) -> None:
    damage, cause = LOCKS[name]
    path = node.folder / "models.lock"
    before = path.read_bytes()
    path.write_bytes(damage(before))

    ran = node.run("plan")

    assert ran.code == 4
    assert ran.err.startswith("error[lock-mismatch]: models.lock is not what its snapshot compiles to: ")
    assert cause in ran.err
    assert "hint: run `reconcile lock`" in ran.err
    assert node.run("lock").code == 0
    assert path.read_bytes() == before
    assert node.run("plan").code == 0


def test_two_long_lines_that_differ_at_their_ends_are_not_shown_as_the_same(node: Node) -> None:
    path = node.folder / "models.lock"
    path.write_bytes(re.sub(rb'(http://[^"]{64,})",', rb'\1/x",', path.read_bytes(), count=1))

    ran = node.run("plan")

    found, expected = ran.err.split(" is ")[-1].splitlines()[0].split(", expected ")
    assert found != expected
    assert found.endswith("/x\",'")


@pytest.mark.parametrize("damage", [crlf, reindented, lambda data: data + b"\n", lambda data: b"\n" + data.rstrip()])
def test_white_space_in_the_envelope_harms_nothing_and_lock_restores_what_was_fetched(node: Node, damage: Damage) -> None:
    path = node.folder / "snapshot.json"
    before = path.read_bytes()
    path.write_bytes(damage(before))

    assert node.run("plan").code == 0
    assert node.run("lock").code == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", RUINED)
def test_what_a_tool_did_to_the_envelope_is_named_and_lock_mends_it(node: Node, name: str) -> None:
    damage, cause = RUINED[name]
    path = node.folder / "snapshot.json"
    before = path.read_bytes()
    path.write_bytes(damage(before))

    ran = node.run("plan")

    assert ran.code == 4
    assert ran.err.startswith(f"error[bad-envelope]: {path}: ")
    assert cause in ran.err
    assert "hint: run `reconcile lock` to get it anew, or bring it back from git" in ran.err
    assert node.run("lock").code == 0
    assert path.read_bytes() == before
    assert node.run("plan").code == 0


@pytest.mark.parametrize("name", RUINED)
def test_a_ruined_envelope_that_is_the_settings_own_snapshot_comes_back_from_git(node: Node, name: str) -> None:
    damage, cause = RUINED[name]
    text = (node.folder / "reconcile.toml").read_text()
    (node.folder / "reconcile.toml").write_text(text.replace("published.json", "snapshot.json"))
    path = node.folder / "snapshot.json"
    path.write_bytes(damage(path.read_bytes()))

    for command in ("plan", "lock"):
        ran = node.run(command)
        assert ran.code == 4
        assert cause in ran.err
        assert "`git checkout HEAD -- snapshot.json`" in ran.err
        assert "run `reconcile lock`" not in ran.err


@pytest.mark.parametrize("name", RUINED)
def test_what_a_tool_did_to_the_root_is_named(node: Node, name: str) -> None:
    damage, cause = RUINED[name]
    path = node.folder / "root.json"
    path.write_bytes(damage(path.read_bytes()))

    ran = node.run("plan")

    assert ran.code == 4
    assert ran.err.startswith(f"error[bad-envelope]: {path}: ")
    assert cause in ran.err


# -- git -------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run git in *folder* as it comes: without the settings of whoever runs the test."""
    environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin:/usr/local/bin", "GIT_CONFIG_NOSYSTEM": "1"}
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done
    return done.stdout


@pytest.fixture
def repository(node: Node) -> Path:
    """A repository as a person makes one: init, lock, commit."""
    (node.folder / "reconcile.toml").unlink()
    config = ["--root", str(node.folder / "root.json"), "--snapshot", "published.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(node.folder)
        assert run("init", *config).code == 0
        assert run("lock").code == 0
    git(node.folder, "init")
    (node.folder / ".gitignore").write_text("store/\n")
    git(node.folder, "add", ".")
    git(node.folder, "commit", "-m", "the node")
    return node.folder


COMMITTED = ("models.lock", "snapshot.json", "root.json")


def test_a_clone_with_autocrlf_has_the_very_bytes(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "-c", "core.autocrlf=true", "clone", str(repository), "clone")

    for name in COMMITTED:
        assert (tmp_path / "clone" / name).read_bytes() == (repository / name).read_bytes(), name
    assert run("plan", "--config", str(tmp_path / "clone" / "reconcile.toml")).code == 0


def test_git_merges_no_generated_file(repository: Path) -> None:
    git(repository, "checkout", "-b", "other")
    for name in COMMITTED:
        (repository / name).write_bytes((repository / name).read_bytes() + b"\n# other")
    git(repository, "commit", "-am", "other")
    git(repository, "checkout", "main")
    for name in COMMITTED:
        (repository / name).write_bytes((repository / name).read_bytes() + b"\n# main")
    git(repository, "commit", "-am", "main")

    git(repository, "merge", "other", code=1)

    for name in COMMITTED:
        data = (repository / name).read_bytes()
        assert data.endswith(b"\n# main"), name
        assert b"<<<<<<<" not in data, name


def test_init_adds_the_missing_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".gitattributes"
    path.write_bytes(b"*.bin filter=lfs\n/models.lock -diff\n# snapshot.json is not here")

    assert run("init").code == 0
    first = path.read_bytes()
    assert run("init", "--force").code == 0

    assert first.startswith(b"*.bin filter=lfs\n/models.lock -diff\n# snapshot.json is not here\n")
    assert [line.split()[0] for line in first.decode().splitlines()] == ["*.bin", "/models.lock", "#", "snapshot.json", "root.json"]
    assert path.read_bytes() == first


def test_init_follows_no_link_and_makes_no_file_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.write_text("* text=auto\n")
    (tmp_path / ".gitattributes").symlink_to("other")

    assert run("init").code == 0
    assert other.read_text() == "* text=auto\n"
    assert (tmp_path / ".gitattributes").is_symlink()
    (tmp_path / ".gitattributes").unlink()
    (tmp_path / ".gitattributes").mkdir()
    assert run("init", "--force").code == 0


# -- the settings ----------------------------------------------------------------------------------


def test_settings_with_crlf_or_a_byte_order_mark_are_read(node: Node) -> None:
    path = node.folder / "reconcile.toml"
    path.write_bytes(codecs.BOM_UTF8 + crlf(path.read_bytes()))
    assert node.run("plan").code == 0


@pytest.mark.parametrize("name", ["conflict", "utf-16", "lfs"])
def test_what_a_tool_did_to_the_settings_is_named(node: Node, name: str) -> None:
    damage, cause = RUINED[name]
    path = node.folder / "reconcile.toml"
    path.write_bytes(damage(path.read_bytes()))

    ran = node.run("plan")

    assert ran.code == 1
    assert ran.err.startswith(f"error[bad-settings]: {path} is not TOML: ")
    assert cause in ran.err
