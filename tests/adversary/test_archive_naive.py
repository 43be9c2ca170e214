"""Why nothing here is extracted by the standard library: what it does with archives that are refused here."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from reconciler.core.errors import UnpackRefused
from reconciler.unpack.extract import PlainUnpacker
from tests import hostile_archives
from tests.archives import Zipped, member, tar, zip_of

#: Both came with the fixes, so that a vendor's backport is seen as well as a version: gh-135034 and gh-109858.
LINKS_ARE_MENDED = hasattr(os.path, "ALLOW_MISSING")
OVERLAPS_ARE_MENDED = hasattr(zipfile.ZipInfo, "_end_offset")

needs_filters = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python's tarfile has no filters at all")


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "into"
    folder.mkdir()
    (tmp_path / "victim").write_bytes(b"untouched")
    return folder


def refused(data: bytes, kind: str, folder: Path) -> bool:
    source = folder.parent / f"archive-{kind}"
    source.write_bytes(data)
    fresh = folder.parent / f"fresh-{kind}"
    fresh.mkdir()
    with pytest.raises(UnpackRefused):
        PlainUnpacker().unpack(source, kind, fresh)
    return True


@needs_filters
def test_the_data_filter_is_led_outside_by_links_past_path_max(into: Path) -> None:
    data = hostile_archives.link_chain("victim")
    assert refused(data, "tar", into)
    victim = into.parent / "victim"
    assert victim.read_bytes() == b"untouched"
    source = into.parent / "archive-tar"
    try:
        with tarfile.open(source) as archive:
            archive.extractall(into, filter="data")
    except (tarfile.TarError, OSError):
        pass
    assert (victim.read_bytes() == hostile_archives.OVERWRITTEN) is not LINKS_ARE_MENDED


@needs_filters
def test_the_data_filter_leaves_what_it_wrote_before_it_refused(into: Path) -> None:
    source = into.parent / "archive"
    source.write_bytes(tar(member(b"first", b"x"), member(b"../up", b"x")))
    with tarfile.open(source) as archive, pytest.raises(tarfile.OutsideDestinationError):
        archive.extractall(into, filter="data")
    assert (into / "first").exists()


@needs_filters
def test_the_data_filter_lets_a_second_member_replace_the_first(into: Path) -> None:
    data = tar(member(b"a", b"first"), member(b"./a", b"second"))
    assert refused(data, "tar", into)
    with tarfile.open(into.parent / "archive-tar") as archive:
        archive.extractall(into, filter="data")
    assert (into / "a").read_bytes() == b"second"


def test_zipfile_unpacks_the_bomb_whose_members_quote_each_other(into: Path) -> None:
    data = hostile_archives.quoting(50)
    assert refused(data, "zip", into)
    with zipfile.ZipFile(into.parent / "archive-zip") as archive:
        if OVERLAPS_ARE_MENDED:
            with pytest.raises(zipfile.BadZipFile):
                archive.extractall(into)
        else:
            archive.extractall(into)
            assert sum(path.stat().st_size for path in into.iterdir()) > 400 * len(data)


def test_zipfile_mends_unsafe_names_so_that_two_members_become_one_file(into: Path) -> None:
    data = zip_of(Zipped(b"up", b"signed"), Zipped(b"../../up", b"other"))
    assert refused(data, "zip", into)
    with zipfile.ZipFile(into.parent / "archive-zip") as archive:
        archive.extractall(into)
    assert (into / "up").read_bytes() == b"other"


def test_zipfile_reads_what_lies_behind_a_program(into: Path) -> None:
    data = b"#!/bin/sh\nexit 0\n" + zip_of(Zipped(b"a", b"x"))
    assert refused(data, "zip", into)
    with zipfile.ZipFile(into.parent / "archive-zip") as archive:
        assert archive.namelist() == ["a"]
