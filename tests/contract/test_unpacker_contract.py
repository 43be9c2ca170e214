"""What every ``ports.Unpacker`` guarantees, whatever it reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from reconciler.core.errors import StoreError, UnpackRefused
from reconciler.core.node import Limits
from reconciler.ports import Unpacker
from reconciler.unpack.extract import PlainUnpacker
from tests import archives
from tests.twins.unpack import MemoryUnpacker, Packed, pack


class Subject(NamedTuple):
    """An unpacker, and what packs for it."""

    make: Callable[[Limits], Unpacker]
    pack: Callable[[Iterable[Packed]], bytes]
    kind: str


_TAR = {"file": b"0", "folder": b"5", "symbolic link": b"2", "FIFO": b"6", "hard link": b"1"}
_MODES = {"file": stat.S_IFREG, "folder": stat.S_IFDIR, "symbolic link": stat.S_IFLNK, "FIFO": stat.S_IFIFO, "hard link": stat.S_IFSOCK}


def _tar(members: Iterable[Packed]) -> bytes:
    return archives.tar(*(archives.member(name.encode(), text.encode(), kind=_TAR[what]) for name, what, text in members))


def _zip(members: Iterable[Packed]) -> bytes:
    return archives.zip_of(*(_zipped(*one) for one in members))


def _zipped(name: str, what: str, text: str) -> archives.Zipped:
    slash = "/" if what == "folder" else ""
    return archives.Zipped(f"{name}{slash}".encode(), text.encode(), method=8 if text else 0, attributes=_MODES[what] << 16)


SUBJECTS = {
    "memory": Subject(MemoryUnpacker, pack, "tar"),
    "tar": Subject(PlainUnpacker, _tar, "tar"),
    "tar.gz": Subject(PlainUnpacker, lambda members: archives.packed(_tar(members), "tar.gz"), "tar.gz"),
    "tar.xz": Subject(PlainUnpacker, lambda members: archives.packed(_tar(members), "tar.xz"), "tar.xz"),
    "tar.zst": Subject(PlainUnpacker, lambda members: archives.packed(_tar(members), "tar.zst"), "tar.zst"),
    "zip": Subject(PlainUnpacker, _zip, "zip"),
}


@pytest.fixture(params=SUBJECTS.values(), ids=[*SUBJECTS])
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.param
    return found


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    return folder


def unpack(subject: Subject, into: Path, *members: Packed, limits: Limits | None = None) -> tuple[str, ...]:
    source = into.parent / "archive"
    source.write_bytes(subject.pack(members))
    return subject.make(limits or Limits()).unpack(source, subject.kind, into)


def test_files_come_out_as_they_went_in(subject: Subject, into: Path) -> None:
    unpack(subject, into, ("a", "file", "one"), ("b/c/d", "file", "two\n"), ("é", "file", "три"))
    assert (into / "a").read_text() == "one"
    assert (into / "b/c/d").read_text() == "two\n"
    assert (into / "é").read_text() == "три"


def test_the_paths_of_files_are_returned_sorted_and_folders_are_not(subject: Subject, into: Path) -> None:
    assert unpack(subject, into, ("z", "file", "1"), ("b", "folder", ""), ("b/y", "file", "2"), ("a", "file", "3")) == ("a", "b/y", "z")


def test_an_empty_file_is_a_file(subject: Subject, into: Path) -> None:
    assert unpack(subject, into, ("empty", "file", "")) == ("empty",)
    assert (into / "empty").read_bytes() == b""


def test_an_empty_folder_is_made(subject: Subject, into: Path) -> None:
    assert unpack(subject, into, ("a", "folder", ""), ("a/b", "folder", "")) == ()
    assert (into / "a/b").is_dir()


def test_an_archive_of_nothing_gives_nothing(subject: Subject, into: Path) -> None:
    assert unpack(subject, into) == ()
    assert not list(into.iterdir())


def test_files_are_read_only_and_folders_can_be_entered(subject: Subject, into: Path) -> None:
    before = os.umask(0o077)
    try:
        unpack(subject, into, ("a/b", "file", "x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((into / "a/b").stat().st_mode) == 0o444
    assert (into / "a").stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("what", ["symbolic link", "FIFO", "hard link"])
def test_what_is_no_file_or_folder_refuses_the_archive(subject: Subject, into: Path, what: str) -> None:
    with pytest.raises(UnpackRefused):
        unpack(subject, into, ("good", "file", "x"), ("bad", what, ""), ("later", "file", "x"))
    assert {path.name for path in into.iterdir()} <= {"good"}


@pytest.mark.parametrize("name", ["../up", "/absolute", "a/../b", "a//b", "a\\b", "a\nb", "e\u0301", "a/./b"])
def test_an_unsafe_name_refuses_the_archive(subject: Subject, into: Path, name: str) -> None:
    with pytest.raises(UnpackRefused):
        unpack(subject, into, ("good", "file", "x"), (name, "file", "x"))
    assert {path.name for path in into.parent.iterdir()} == {"archive", "into"}


@pytest.mark.parametrize("names", [("a", "a"), ("a", "A"), ("a/b", "A/c"), ("a", "a/b"), ("a/b", "a")])
def test_two_members_never_share_a_name(subject: Subject, into: Path, names: tuple[str, str]) -> None:
    with pytest.raises(UnpackRefused):
        unpack(subject, into, *((name, "file", "x") for name in names))


def test_too_many_members_are_refused(subject: Subject, into: Path) -> None:
    few = tuple((str(index), "file", "x") for index in range(8))
    with pytest.raises(UnpackRefused, match="7"):
        unpack(subject, into, *few, limits=Limits(archive_members=7))


def test_too_many_bytes_are_refused(subject: Subject, into: Path) -> None:
    with pytest.raises(UnpackRefused, match="most for one of its size"):
        unpack(subject, into, ("a", "file", "x" * 60_000), ("b", "file", "y" * 60_000), limits=Limits(archive_bytes=100_000))


def test_too_deep_a_path_is_refused(subject: Subject, into: Path) -> None:
    with pytest.raises(UnpackRefused, match="deeper"):
        unpack(subject, into, ("a/b/c/d", "file", "x"), limits=Limits(archive_depth=3))


def test_what_is_no_archive_is_refused(subject: Subject, into: Path) -> None:
    source = into.parent / "archive"
    source.write_bytes(b"no archive of any kind")
    with pytest.raises(UnpackRefused):
        subject.make(Limits()).unpack(source, subject.kind, into)


def test_a_missing_archive_is_the_stores_fault(subject: Subject, into: Path) -> None:
    with pytest.raises(StoreError):
        subject.make(Limits()).unpack(into.parent / "none", subject.kind, into)


def test_a_link_to_an_archive_is_not_followed(subject: Subject, into: Path) -> None:
    (into.parent / "archive").write_bytes(subject.pack([("a", "file", "x")]))
    (into.parent / "link").symlink_to("archive")
    with pytest.raises(StoreError):
        subject.make(Limits()).unpack(into.parent / "link", subject.kind, into)


def test_a_fifo_for_an_archive_is_refused_at_once(subject: Subject, into: Path) -> None:
    os.mkfifo(into.parent / "archive")
    with pytest.raises(StoreError):
        subject.make(Limits()).unpack(into.parent / "archive", subject.kind, into)


def test_a_folder_that_is_not_empty_is_refused(subject: Subject, into: Path) -> None:
    (into / "there").write_bytes(b"before")
    with pytest.raises(StoreError):
        unpack(subject, into, ("there", "file", "after"))
    assert (into / "there").read_bytes() == b"before"


def test_a_link_to_a_folder_is_not_written_into(subject: Subject, into: Path) -> None:
    link = into.parent / "link"
    link.symlink_to(into, target_is_directory=True)
    with pytest.raises(StoreError):
        unpack(subject, link, ("a", "file", "x"))
    assert not list(into.iterdir())
