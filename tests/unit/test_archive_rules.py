"""The rules for an archive's members."""

from __future__ import annotations

import pytest

from reconciler.core import archive_rules
from reconciler.core.archive_rules import FLOOR_BYTES, Members
from reconciler.core.errors import UnpackRefused
from reconciler.core.node import Limits
from tests.hostile_archives import COLLIDING, UNSAFE_NAMES


def members(length: int = 1000, **limits: int) -> Members:
    return Members(Limits(**limits), length)


def test_a_plain_name_is_its_own_path() -> None:
    assert archive_rules.check(members(), b"a/b.gguf", "file", 3) == "a/b.gguf"
    assert archive_rules.check(members(), "a/b.gguf", "file", 3) == "a/b.gguf"


def test_one_leading_dot_is_dropped_as_tar_writes_it() -> None:
    seen = members()
    assert archive_rules.check(seen, b"./", "folder", 0) == ""
    assert archive_rules.check(seen, b"./a/", "folder", 0) == "a"
    assert archive_rules.check(seen, b"./a/b", "file", 0) == "a/b"
    assert seen.files == ["a/b"]


def test_the_top_folder_is_no_file() -> None:
    with pytest.raises(UnpackRefused):
        archive_rules.check(members(), b"./", "file", 0)


@pytest.mark.parametrize("name", UNSAFE_NAMES.values(), ids=list(UNSAFE_NAMES))
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_unsafe_name_is_refused(name: bytes, kind: str) -> None:
    with pytest.raises(UnpackRefused):
        archive_rules.check(members(), name, kind, 0)


@pytest.mark.parametrize("names", COLLIDING.values(), ids=list(COLLIDING))
def test_names_that_are_one_on_some_disk_are_refused(names: tuple[bytes, bytes]) -> None:
    seen = members()
    archive_rules.check(seen, names[0], "file", 0)
    with pytest.raises(UnpackRefused):
        archive_rules.check(seen, names[1], "file", 0)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "FIFO", "socket", ""])
def test_only_files_and_folders_are_members(kind: str) -> None:
    with pytest.raises(UnpackRefused, match="only plain files and folders"):
        archive_rules.check(members(), b"a", kind, 0)


def test_a_folder_may_be_listed_after_what_is_in_it() -> None:
    seen = members()
    archive_rules.check(seen, b"a/b", "file", 0)
    assert archive_rules.check(seen, b"a/", "folder", 0) == "a"
    with pytest.raises(UnpackRefused, match="twice"):
        archive_rules.check(seen, b"a/", "folder", 0)


def test_a_folder_may_be_listed_before_what_is_in_it() -> None:
    seen = members()
    archive_rules.check(seen, b"a", "folder", 0)
    assert archive_rules.check(seen, b"a/b", "file", 0) == "a/b"


def test_a_path_is_as_deep_as_the_limit_and_no_deeper() -> None:
    assert archive_rules.check(members(archive_depth=3), b"a/b/c", "file", 0) == "a/b/c"
    with pytest.raises(UnpackRefused, match="deeper"):
        archive_rules.check(members(archive_depth=3), b"a/b/c/d", "file", 0)


def test_members_are_as_many_as_the_limit_and_no_more() -> None:
    seen = members(archive_members=2)
    archive_rules.check(seen, b"a", "file", 0)
    archive_rules.check(seen, b"b", "file", 0)
    with pytest.raises(UnpackRefused, match="more than 2 members"):
        archive_rules.check(seen, b"c", "file", 0)


@pytest.mark.parametrize("size", [-1, -(1 << 63), 1 << 63])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(UnpackRefused):
        archive_rules.check(members(), b"a", "file", size)


def test_a_folder_has_no_bytes() -> None:
    with pytest.raises(UnpackRefused):
        archive_rules.check(members(), b"a", "folder", 1)


def test_a_small_archive_unpacks_to_the_floor_and_no_further() -> None:
    seen = members(1)
    archive_rules.spend(seen, FLOOR_BYTES)
    with pytest.raises(UnpackRefused, match=r"16\.0 MiB"):
        archive_rules.spend(seen, 1)


def test_a_large_archive_unpacks_to_a_multiple_of_its_size() -> None:
    seen = members(1 << 30, archive_ratio=3)
    archive_rules.spend(seen, 3 << 30)
    with pytest.raises(UnpackRefused):
        archive_rules.spend(seen, 1)


def test_no_archive_unpacks_to_more_than_the_cap() -> None:
    seen = members(1 << 30, archive_bytes=1 << 20)
    archive_rules.spend(seen, 1 << 20)
    with pytest.raises(UnpackRefused):
        archive_rules.spend(seen, 1)


@pytest.mark.parametrize("name", [b"\xff" * 5000, "\u202e" * 5000, b"\x1b[2J", "\ud800", b"a\nb"])
def test_a_quoted_name_is_short_and_harmless_to_a_terminal(name: bytes | str) -> None:
    said = archive_rules.shown(name)
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 1400


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_of_links_is_followed_in_linear_time(backwards: bool) -> None:
    seen = members(1 << 20, archive_bytes=1 << 40)
    archive_rules.check(seen, "link-0", "file", 1)
    links = [archive_rules.Link(f"link-{number}", f"link-{number - 1}") for number in range(1, 100_000)]
    seen.links.extend(reversed(links) if backwards else links)

    assert list(archive_rules.links(seen)) == links


def test_links_in_a_circle_lead_to_no_file() -> None:
    seen = members(1 << 20)
    archive_rules.check(seen, "file", "file", 1)
    seen.links += [archive_rules.Link("copy", "file"), archive_rules.Link("a", "b"), archive_rules.Link("b", "a")]

    with pytest.raises(UnpackRefused, match="no file of the archive"):
        list(archive_rules.links(seen))
