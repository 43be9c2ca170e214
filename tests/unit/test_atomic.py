"""
The one room that syncs and renames: in which order it does, and what it leaves when the system refuses.

The order is what a power cut tests; here each call is written down, so that taking out any one of them is seen on every machine.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler import files
from reconciler.core.errors import DiskFull, StoreError
from reconciler.store import atomic

_CALLS = ("rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "write", "fsync", "chmod", "fchmod")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is done from now on, as ``call name``; what belongs together has no random part in its name."""
    seen: list[str] = []

    def named(where: Any) -> str:
        path = Path(f"/proc/self/fd/{where}").readlink() if isinstance(where, int) else Path(os.fspath(where))
        name = str(path.relative_to(tmp_path)) if path.is_relative_to(tmp_path) else str(path)
        return "/".join("TEMPORARY" if part.endswith(".tmp") else part for part in name.split("/"))

    def record(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "dir_fd" not in kwargs or kwargs["dir_fd"] is None:
                second = f" {named(args[1])}" if name in {"rename", "replace", "link", "symlink"} else ""
                seen.append(f"{name} {args[0] if name == 'symlink' else named(args[0])}{second}")
            return real(*args, **kwargs)

        return call

    for name in _CALLS:
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    return seen


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(tmp_path: Path, calls: list[str]) -> None:
    atomic.write(tmp_path / "f", b"data", 0o640)

    assert calls == ["write TEMPORARY", "fchmod TEMPORARY", "fsync TEMPORARY", "replace TEMPORARY f", "fsync ."]
    assert (tmp_path / "f").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_what_may_never_be_replaced_is_synced_with_its_folder(tmp_path: Path, calls: list[str]) -> None:
    atomic.create(tmp_path / "f", b"data")

    assert calls == ["write f", "fchmod f", "fsync f", "fsync ."]
    with pytest.raises(StoreError):
        atomic.create(tmp_path / "f", b"other")
    assert (tmp_path / "f").read_bytes() == b"data"


def test_a_blob_is_settled_before_its_name(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "f").touch()
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        atomic.sync_file(fd, 0o444)
    finally:
        os.close(fd)

    assert calls == ["fchmod f", "fsync f"]


def test_a_rename_is_synced_at_both_ends(tmp_path: Path, calls: list[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/f").touch()
    calls.clear()

    atomic.rename(tmp_path / "a/f", tmp_path / "b/f")

    assert calls == ["rename a/f b/f", "fsync b", "fsync a"]


def test_files_that_are_moved_together_are_synced_with_each_folder_once(tmp_path: Path, calls: list[str]) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    moves = {"a/1": "c/1", "a/2": "b/2", "a/3": "c/3"}
    for old in moves:
        (tmp_path / old).touch()
    calls.clear()

    for old, new in moves.items():
        atomic.move(tmp_path / old, tmp_path / new)
    atomic.sync_folders({(tmp_path / new).parent for new in moves.values()})

    assert calls == ["rename a/1 c/1", "rename a/2 b/2", "rename a/3 c/3", "fsync b", "fsync c"]


def test_a_link_is_swapped_by_one_rename_and_synced(tmp_path: Path, calls: list[str]) -> None:
    atomic.symlink("generations/1", tmp_path / "active")
    atomic.symlink("generations/2", tmp_path / "active")

    assert calls == [
        "symlink generations/1 TEMPORARY", "rename TEMPORARY active", "fsync .",
        "symlink generations/2 TEMPORARY", "rename TEMPORARY active", "fsync .",
    ]  # fmt: skip
    assert str((tmp_path / "active").readlink()) == "generations/2"


def test_every_new_folder_is_synced_in_the_one_above(tmp_path: Path, calls: list[str]) -> None:
    atomic.make_folder(tmp_path / "a/b")

    assert calls == ["mkdir a", "chmod a", "fsync .", "mkdir a/b", "chmod a/b", "fsync a"]


def test_a_tree_is_synced_from_the_deepest(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "t/sub").mkdir(parents=True)
    (tmp_path / "t/sub/f").touch()
    (tmp_path / "t/g").touch()
    (tmp_path / "t/nowhere").symlink_to("missing")
    calls.clear()

    atomic.sync_tree(tmp_path / "t")

    assert calls == ["fsync t/sub/f", "fsync t/sub", "fsync t/g", "fsync t"]


def test_a_copy_is_synced(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)

    atomic.copy(tmp_path / "f", tmp_path / "g")

    assert calls == ["write g"] * 3 + ["fchmod g", "fsync g"]
    assert (tmp_path / "g").read_bytes() == b"x" * 3_000_000
    assert stat.S_IMODE((tmp_path / "g").stat().st_mode) == 0o444


def test_what_is_deleted_stays_deleted(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "f").touch()

    atomic.delete(tmp_path / "f")
    atomic.delete(tmp_path / "f")

    assert calls == ["unlink f", "fsync ."]


# -- refusals --------------------------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize("name", ["write", "fchmod", "fsync", "replace"])
@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, StoreError), (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull)])
def test_a_refused_write_leaves_the_old_bytes_and_nothing_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, kind: type[StoreError]
) -> None:
    path = tmp_path / "f"
    atomic.write(path, b"old")
    with monkeypatch.context() as patch:
        refusing(patch, name, code)
        with pytest.raises(kind) as refused:
            atomic.write(path, b"new")

    assert type(refused.value) is kind
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("f", b"old")]


@pytest.mark.parametrize("name", ["write", "fchmod", "fsync"])
def test_a_refused_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        refusing(patch, name, errno.EIO)
        with pytest.raises(StoreError):
            atomic.create(tmp_path / "key", b"secret")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("act", "name"), [("symlink", "rename"), ("link", "rename")])
def test_a_refused_link_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, name: str
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "f").write_bytes(b"f")
    with monkeypatch.context() as patch:
        refusing(patch, name, errno.EIO)
        with pytest.raises(StoreError):
            atomic.link(tmp_path / "a", tmp_path / "f") if act == "link" else atomic.symlink("a", tmp_path / "f")

    assert sorted((found.name, found.read_bytes()) for found in tmp_path.iterdir()) == [("a", b"a"), ("f", b"f")]


def test_an_fsync_that_fails_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def failing_once(fd: int) -> None:
        tried.append(fd)
        if len(tried) == 1:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", failing_once)

    with pytest.raises(StoreError, match="cannot write"):
        atomic.write(tmp_path / "f", b"new")

    assert not (tmp_path / "f").exists()


def test_what_cannot_be_read_does_not_count_as_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    refusing(monkeypatch, "scandir", errno.EIO)

    with pytest.raises(StoreError):
        atomic.sync_tree(tmp_path / "t")


# -- links, devices, modes -------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere"
    path.write_bytes(b"not ours")
    return path


def test_writing_does_not_follow_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "f").symlink_to(elsewhere)

    atomic.write(tmp_path / "f", b"new")

    assert elsewhere.read_bytes() == b"not ours"
    assert not (tmp_path / "f").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_creating_does_not_follow_a_link(tmp_path: Path, elsewhere: Path, there: bool) -> None:
    (tmp_path / "f").symlink_to(elsewhere if there else tmp_path / "nowhere")

    with pytest.raises(StoreError):
        atomic.create(tmp_path / "f", b"new")

    assert elsewhere.read_bytes() == b"not ours"
    assert not (tmp_path / "nowhere").exists()


def test_copying_follows_no_link_at_either_end(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "f").write_bytes(b"f")

    with pytest.raises(StoreError):
        atomic.copy(tmp_path / "link", tmp_path / "g")
    with pytest.raises(StoreError):
        atomic.copy(tmp_path / "f", tmp_path / "link")

    assert elsewhere.read_bytes() == b"not ours"
    assert not (tmp_path / "g").exists()


def test_copying_replaces_nothing(tmp_path: Path) -> None:
    for name in ("f", "g"):
        (tmp_path / name).write_bytes(name.encode())

    with pytest.raises(StoreError):
        atomic.copy(tmp_path / "f", tmp_path / "g")

    assert (tmp_path / "g").read_bytes() == b"g"


def test_linking_names_a_link_and_not_what_it_leads_to(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "link").symlink_to(elsewhere)

    atomic.link(tmp_path / "link", tmp_path / "f")

    assert (tmp_path / "f").is_symlink()
    assert elsewhere.stat().st_nlink == 1


def test_syncing_follows_no_link(tmp_path: Path, calls: list[str], elsewhere: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/link").symlink_to(elsewhere)
    calls.clear()

    atomic.sync_tree(tmp_path / "t")

    assert calls == ["fsync t"]


def test_deleting_follows_no_link_and_stays_in_its_folder(tmp_path: Path, elsewhere: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(elsewhere)

    atomic.delete(folder)
    (tmp_path / "to").symlink_to(outside)
    atomic.delete(tmp_path / "to")

    assert (outside / "kept").exists()
    assert elsewhere.exists()
    assert not folder.exists()


def test_a_link_that_comes_between_the_look_and_the_opening_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_bytes(b"x")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/link").symlink_to(elsewhere)
    (tmp_path / "to").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)

    with pytest.raises(StoreError):
        atomic.sync_tree(tmp_path / "t")
    before = (tmp_path / "outside").stat().st_mode
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        files._make_accessible(tmp_path / "to", None)
    monkeypatch.setattr(files, "_make_accessible", lambda *_: None)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        files._delete_folder(tmp_path / "to")

    assert (tmp_path / "outside/kept").exists()
    assert (tmp_path / "outside").stat().st_mode == before


@pytest.mark.parametrize("act", ["copy", "read"])
def test_nothing_waits_for_a_fifo(tmp_path: Path, act: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    ended: list[BaseException] = []

    def work() -> None:
        try:
            atomic.copy(tmp_path / "pipe", tmp_path / "g") if act == "copy" else atomic.read(tmp_path / "pipe")
        except (StoreError, OSError) as refused:
            ended.append(refused)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)

    assert len(ended) == 1


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def test_a_mode_is_what_was_asked_for_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    atomic.make_folder(tmp_path / "a/b", 0o750)
    atomic.write(tmp_path / "a/b/f", b"x", 0o644)
    atomic.create(tmp_path / "a/b/g", b"x", 0o600)
    atomic.copy(tmp_path / "a/b/f", tmp_path / "a/b/h")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o750, "b": 0o750, "f": 0o644, "g": 0o600, "h": 0o444}


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_what_is_in_a_folders_place_is_refused_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x") if what == "file" else path.symlink_to("nowhere")
    before = path.lstat().st_mode

    with pytest.raises(StoreError):
        atomic.make_folder(path / "below" if what == "file" else path)
    with pytest.raises(StoreError):
        atomic.make_folder(path)

    assert path.lstat().st_mode == before


def test_a_second_name_for_the_same_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """A rename between two names of one file does nothing and leaves both (POSIX)."""
    (tmp_path / "a").write_bytes(b"a")
    atomic.link(tmp_path / "a", tmp_path / "b")
    atomic.link(tmp_path / "a", tmp_path / "b")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").stat().st_nlink == 2
