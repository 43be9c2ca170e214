"""Blobs on a disk: what the contract suite does not say of them, since memory has no inodes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import HashMismatch, StoreError
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger, Verification
from tests.storenode import hash_file
from tests.twins.content import name_of
from tests.twins.fetch import adopt, fetched_at
from tests.twins.node import Clock

DATA = b"some bytes of a model" * 50
NAME = name_of(DATA)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "store", tmp_path / "cold")
    atomic.make_folder(layout.staging, 0o700)
    return layout


@pytest.fixture
def ledger(layout: Layout) -> Iterator[Ledger]:
    with Ledger.writing(layout.ledger) as writing:
        yield writing


@pytest.fixture
def blobs(layout: Layout, ledger: Ledger) -> Blobs:
    return Blobs(layout, ledger, hash_file, Clock())


def staged(layout: Layout, data: bytes = DATA) -> Path:
    path = layout.staging / "data"
    path.write_bytes(data)
    return path


def test_a_blob_is_read_only_and_remembered_with_its_numbers(layout: Layout, ledger: Ledger, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))

    seen = layout.blob(NAME).stat()
    assert stat.S_IMODE(seen.st_mode) == 0o444
    known = ledger.verifications()[NAME]
    assert (known.size, known.inode, known.mtime_ns) == (seen.st_size, seen.st_ino, seen.st_mtime_ns)


@pytest.mark.parametrize("what", ["link", "fifo", "folder", "gone"])
def test_what_is_no_plain_file_is_not_adopted(layout: Layout, blobs: Blobs, what: str) -> None:
    path = staged(layout)
    fetched = fetched_at(path, NAME)
    path.rename(path.with_name("moved"))
    if what == "link":
        path.symlink_to(path.with_name("moved"))
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()

    with pytest.raises((HashMismatch, StoreError)):
        adopt(blobs, fetched)

    assert not layout.blob(NAME).exists()


def test_what_is_no_plain_file_is_not_adopted_by_its_own_numbers_either(layout: Layout, blobs: Blobs) -> None:
    path = layout.staging / "pipe"
    os.mkfifo(path)

    with pytest.raises(HashMismatch):
        adopt(blobs, fetched_at(path, NAME))

    assert not layout.blob(NAME).exists()


def test_a_file_that_was_written_to_after_its_hash_is_refused(layout: Layout, blobs: Blobs) -> None:
    path = staged(layout)
    fetched = fetched_at(path, NAME)
    os.utime(path, ns=(0, fetched.mtime_ns + 1))

    with pytest.raises(HashMismatch):
        adopt(blobs, fetched)


def test_a_blob_takes_the_place_of_a_folder(layout: Layout, blobs: Blobs) -> None:
    (layout.blob(NAME) / "inside").mkdir(parents=True)

    adopt(blobs, fetched_at(staged(layout), NAME))

    assert layout.blob(NAME).read_bytes() == DATA


def test_a_reader_keeps_what_is_discarded(layout: Layout, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))
    with layout.blob(NAME).open("rb") as reader:
        blobs.discard(NAME)

        assert reader.read() == DATA


def test_checking_sets_a_mode_right_and_believes_what_it_hashed(layout: Layout, ledger: Ledger, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))
    layout.blob(NAME).chmod(0o600)
    ledger.forget_blobs([NAME])

    assert blobs.check(NAME)

    assert stat.S_IMODE(layout.blob(NAME).stat().st_mode) == 0o444
    assert NAME in ledger.verifications()


def test_a_bad_blob_is_believed_no_longer(layout: Layout, ledger: Ledger, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))
    layout.blob(NAME).chmod(0o644)
    layout.blob(NAME).write_bytes(b"rot" + DATA[3:])

    assert not blobs.check(NAME)

    assert NAME not in ledger.verifications()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_without_means_says_nothing_about_a_blob(layout: Layout, ledger: Ledger, blobs: Blobs, code: int) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))

    def refuse(_path: Path, _algorithm: str) -> str:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StoreError):
        Blobs(layout, ledger, refuse, Clock()).check(NAME)

    assert NAME in ledger.verifications()


def test_a_blob_that_the_disk_does_not_give_is_bad(layout: Layout, ledger: Ledger, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))

    def refuse(_path: Path, _algorithm: str) -> str:
        raise OSError(errno.EIO, "bad sector")

    assert not Blobs(layout, ledger, refuse, Clock()).check(NAME)


def test_a_member_is_named_by_what_it_holds(layout: Layout, blobs: Blobs) -> None:
    assert blobs.add_file(staged(layout)) == (NAME, len(DATA))
    assert layout.blob(NAME).read_bytes() == DATA


def test_a_member_that_is_here_keeps_its_inode_and_one_that_rotted_is_replaced(layout: Layout, blobs: Blobs) -> None:
    blobs.add_file(staged(layout))
    before = layout.blob(NAME).stat().st_ino
    blobs.add_file(staged(layout))
    assert layout.blob(NAME).stat().st_ino == before

    layout.blob(NAME).chmod(0o644)
    layout.blob(NAME).write_bytes(b"rot" + DATA[3:])
    blobs.add_file(staged(layout))

    assert layout.blob(NAME).read_bytes() == DATA


def test_the_original_goes_only_when_the_copy_was_hashed(layout: Layout, ledger: Ledger, blobs: Blobs) -> None:
    adopt(blobs, fetched_at(staged(layout), NAME))
    hashed: list[bool] = []

    def watching(path: Path, algorithm: str) -> str:
        hashed.append(layout.blob(NAME).exists() and layout.cold in path.parents)
        return hash_file(path, algorithm)

    Blobs(layout, ledger, watching, Clock()).archive(NAME)

    assert hashed == [True]
    assert not layout.blob(NAME).exists()
    assert [path.name for path in layout.cold.rglob("*") if path.is_file()] == [NAME.partition(":")[2]]


def test_what_is_no_plain_file_in_cold_storage_does_not_come_back(layout: Layout, blobs: Blobs) -> None:
    cold = layout.cold_blob(NAME)
    cold.parent.mkdir(parents=True)
    os.mkfifo(cold)

    with pytest.raises(StoreError):
        blobs.restore(NAME)

    assert not layout.blob(NAME).exists()


def test_blobs_that_are_adopted_together_cost_one_commit_and_one_sync_a_folder(
    layout: Layout, ledger: Ledger, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    for number in range(70):  # more than are held open at once
        data = DATA + bytes([number])
        path = layout.staging / str(number)
        path.write_bytes(data)
        fetched.append(fetched_at(path, name_of(data)))
    commits: list[int] = []
    synced: list[Path] = []
    record, sync = ledger.record_verified, atomic.sync_folder

    def recorded(found: dict[str, Verification]) -> None:
        record(found)
        commits.append(len(found))

    def counted(path: Path) -> None:
        sync(path)
        synced.append(path)

    monkeypatch.setattr(ledger, "record_verified", recorded)
    monkeypatch.setattr(atomic, "sync_folder", counted)

    assert blobs.adopt(fetched) == {}

    assert commits == [64, 6]
    places = {layout.blob(one.digest).parent for one in fetched}
    assert places <= set(synced)
    assert max(synced.count(place) for place in places) <= 2
    assert ledger.verifications().keys() == {one.digest for one in fetched}


def test_where_the_ledger_refuses_none_of_the_files_counts_as_kept(
    layout: Layout, ledger: Ledger, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise StoreError("the disk refused")

    monkeypatch.setattr(ledger, "record_verified", refuse)

    assert blobs.adopt([fetched_at(staged(layout), NAME)]).keys() == {NAME}
    assert not ledger.verifications()
