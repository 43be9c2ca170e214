"""Writing what servers read: whole files, only changes, and nobody else's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reconciler.core.errors import ServeFailed
from reconciler.serve import content as contents
from reconciler.serve.content import Content, Entry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")] if not path.is_dir()}


def write(root: Path, *entries: Entry) -> None:
    made = Content(entries=entries)
    contents.write(made, root)
    assert contents.is_written(made, root)


def test_one_file_is_written_and_not_again_while_its_bytes_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "serve" / "models.ini"
    write(path, Entry(data=b"one"))
    before = path.stat()
    write(path, Entry(data=b"one"))

    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) == (b"one", before.st_ino, before.st_mtime_ns)
    write(path, Entry(data=b"two"))
    assert path.stat().st_ino != before.st_ino, "a new file by one rename, and never a file that is written in place"
    assert [found.name for found in path.parent.iterdir()] == ["models.ini"]


def test_a_folder_gets_what_is_new_and_loses_what_is_old(root: Path) -> None:
    first = [Entry(path="a/snapshots/1", target="/tree/1"), Entry(path="a/refs/main", data=b"1")]
    write(root, *first)
    before = times(root)
    write(root, *first)
    assert times(root) == before

    write(root, Entry(path="b/snapshots/2", target="/tree/2"), Entry(path="b/refs/main", data=b"2"))
    assert sorted(times(root)) == ["b/refs/main", "b/snapshots/2"]
    assert not (root / "a").exists(), "no empty folder is left"


def test_a_link_that_leads_elsewhere_is_replaced(root: Path) -> None:
    write(root, Entry(path="x", target="/tree/1"))
    write(root, Entry(path="x", target="/tree/2"))

    assert (root / "x").readlink() == Path("/tree/2")


def test_what_somebody_else_keeps_in_the_folder_stays_and_is_not_replaced(root: Path) -> None:
    (root / "manifests").mkdir()
    (root / "manifests" / "theirs").write_bytes(b"theirs")
    write(root, Entry(path="manifests/ours", data=b"ours"))
    with pytest.raises(ServeFailed, match="was not written by reconcile"):
        contents.write(Content(entries=(Entry(path="manifests/theirs", data=b"ours"),)), root)

    assert (root / "manifests" / "theirs").read_bytes() == b"theirs"
    write(root, Entry(path="x", data=b"1"))
    assert (root / "manifests" / "theirs").read_bytes() == b"theirs"


def test_a_blob_of_theirs_is_shared_and_outlives_ours(root: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs" / "sha256-ab").write_bytes(b"the bytes of that digest")
    contents.write(Content(entries=(Entry(path="blobs/sha256-ab", target="/tree/x", shared=True),)), root)
    contents.write(Content(entries=(Entry(path="y", data=b"1"),)), root)

    assert (root / "blobs" / "sha256-ab").read_bytes() == b"the bytes of that digest"


def test_what_an_interrupted_run_began_is_deleted_by_the_next(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def cut(entry: Entry, place: Path) -> None:
        calls.append(entry.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(entry, place)

    whole = contents._write_entry
    monkeypatch.setattr(contents, "_write_entry", cut)
    with pytest.raises(KeyboardInterrupt):
        write(root, Entry(path="a", data=b"1"), Entry(path="b", data=b"2"))
    monkeypatch.undo()
    write(root, Entry(path="c", data=b"3"))

    assert sorted(found.name for found in root.iterdir()) == ["c"]


@pytest.mark.parametrize("listed", ["../outside", "{here}/outside", "a/../../outside"])
def test_a_list_that_was_changed_deletes_nothing_outside_the_folder(tmp_path: Path, listed: str) -> None:
    (tmp_path / "outside").write_bytes(b"theirs")
    folder = tmp_path / "folder"
    folder.mkdir()
    contents.list_of(folder).write_text(json.dumps([listed.format(here=tmp_path)]))
    write(folder, Entry(path="a", data=b"1"))

    assert (tmp_path / "outside").read_bytes() == b"theirs"
