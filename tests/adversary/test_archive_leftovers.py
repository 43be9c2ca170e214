"""What a refused archive, or a child that unpacked it and was taken over, left in its folder goes away, and nothing else does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler.core import digest
from reconciler.core.errors import UnpackRefused
from reconciler.core.lock import LockedArtifact
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from reconciler.store.trees import Trees
from reconciler.unpack import extract
from reconciler.unpack.extract import PlainUnpacker
from tests.archives import member, tar
from tests.network import NOW


def nested(folder: Path, depth: int) -> None:
    """Make *depth* folders in one another, which no path could name."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for level in range(depth):
        os.mkdir("d", dir_fd=here)
        os.close(os.open(f"f{level}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_what_a_refused_archive_wrote_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(tar(member(b"a/b/c", b"x"), member(b"../up", b"x")))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(UnpackRefused):
        PlainUnpacker().unpack(tmp_path / "archive", "tar", into)
    atomic.delete(into)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_links_are_deleted_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    (outside / "file").write_bytes(b"kept")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        (place / "to-folder").symlink_to(outside, target_is_directory=True)
        (place / "to-file").symlink_to(outside / "file")
        (place / "to-nothing").symlink_to("nowhere")
        (place / "to-itself").symlink_to("to-itself")
        os.link(outside / "file", place / "hard")
    atomic.delete(folder)
    assert not folder.exists()
    assert (outside / "kept").is_dir()
    assert (outside / "file").read_bytes() == b"kept"
    assert (outside / "file").stat().st_nlink == 1


def test_a_link_in_place_of_the_folder_is_deleted_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"kept")
    (tmp_path / "folder").symlink_to("outside", target_is_directory=True)
    atomic.delete(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside/file").read_bytes() == b"kept"


def test_folders_in_one_another_past_every_stack_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    nested(folder, 1200)
    atomic.delete(folder)
    assert not list(tmp_path.iterdir())


def test_strange_files_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        os.mkfifo(place / "fifo")
        (place / "a\n\x1b").write_bytes(b"")
        (place / os.fsdecode(b"\xff\xfe")).write_bytes(b"")
        (place / "-rf").write_bytes(b"")
    atomic.delete(folder)
    assert not list(tmp_path.iterdir())


# -- what a process says of its own work


def link_out(into: Path) -> None:
    (into / "sub").rmdir()
    (into / "sub").symlink_to("../outside", target_is_directory=True)


def link_beside(into: Path) -> None:
    (into / "more").symlink_to("../outside/file")


def link_for_a_file(into: Path) -> None:
    (into / "a").unlink()
    (into / "a").symlink_to("../outside/file")


def second_name(into: Path) -> None:
    os.link(into.parent / "outside/file", into / "sub/file")


def own_second_name(into: Path) -> None:
    os.link(into / "a", into / "sub/file")


def fifo(into: Path) -> None:
    os.mkfifo(into / "sub/file")


def unsaid(into: Path) -> None:
    (into / "more").write_bytes(b"x")


def missing(into: Path) -> None:
    (into / "a").unlink()


def folder_for_a_file(into: Path) -> None:
    (into / "a").unlink()
    (into / "a").mkdir()


def bottomless(into: Path) -> None:
    nested(into, 1200)


LIES = [link_out, link_beside, link_for_a_file, second_name, own_second_name, fifo, unsaid, missing, folder_for_a_file, bottomless]


@pytest.fixture
def unpacked(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"secret")
    into = tmp_path / "into"
    (into / "sub").mkdir(parents=True)
    (into / "a").write_bytes(b"x")
    yield into
    atomic.delete(into)  # pytest deletes by recursion, which ends at the bottomless one


def test_what_was_unpacked_as_it_is_said_is_confirmed(unpacked: Path) -> None:
    extract.check_extracted(unpacked, ("a",))
    (unpacked / "sub/file").write_bytes(b"y")
    extract.check_extracted(unpacked, ("a", "sub/file"))


@pytest.mark.parametrize("lie", LIES)
def test_an_extractor_that_was_taken_over_is_not_believed(unpacked: Path, lie: Callable[[Path], None]) -> None:
    lie(unpacked)
    for members in (("a",), ("a", "sub/file"), ("a", "more")):
        if lie is unsaid and "more" in members:
            continue
        with pytest.raises(UnpackRefused):
            extract.check_extracted(unpacked, members)


def test_no_tree_is_made_of_what_lies_behind_an_extractors_link(tmp_path: Path) -> None:
    class TakenOver:
        def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
            (into / "sub").symlink_to(tmp_path / "outside", target_is_directory=True)
            return ("sub/file",)

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"secret")
    layout = Layout(tmp_path / "store", tmp_path / "cold")
    atomic.make_folder(layout.root)
    name = digest.of(b"archive")
    atomic.make_folder(layout.blob(name).parent)
    layout.blob(name).write_bytes(b"archive")
    with Ledger.writing(layout.ledger) as ledger:
        made = Trees(layout, ledger, Blobs(layout, ledger, lambda *_: pytest.fail("it was read"), lambda: NOW), TakenOver())
        with pytest.raises(UnpackRefused):
            made.assemble("recipe", [LockedArtifact(path="a.tar", digest=name, unpack="tar")], "sub/file")
    assert (tmp_path / "outside/file").read_bytes() == b"secret"
    assert not list(layout.staging.iterdir())


# -- folders of other people


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Return a folder of a user who is not root, and become that user."""
    place = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.chown(place, 65534, 65534)
            os.setegid(65534)
            os.seteuid(65534)
        yield place
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)
        shutil.rmtree(place)


def test_folders_that_were_closed_to_us_are_deleted(unprivileged: Path) -> None:
    folder = unprivileged / "folder"
    for mode in (0o000, 0o500, 0o300):
        (folder / f"{mode}/inner").mkdir(parents=True)
        (folder / f"{mode}/inner/file").write_bytes(b"x")
        (folder / f"{mode}/inner").chmod(mode)
        (folder / f"{mode}").chmod(mode)
    atomic.delete(folder)
    assert not list(unprivileged.iterdir())
