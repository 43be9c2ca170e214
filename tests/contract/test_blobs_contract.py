"""One suite for blobs on a disk and their memory twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from reconciler.core.errors import BlobDamaged, HashMismatch, StoreError
from reconciler.ports import Blobs as Port
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests.storenode import hash_file
from tests.twins.content import changed, name_of
from tests.twins.fetch import adopt, fetched_at
from tests.twins.node import Clock
from tests.twins.store import MemoryBlobs

DATA = b"some bytes of a model" * 50
NAME = name_of(DATA)


class Side(Protocol):
    """A port, and a way to look and to spoil behind its back."""

    port: Port

    def hot(self, name: str) -> bytes | None: ...

    def cold(self, name: str) -> bytes | None: ...

    def spoil(self, name: str, *, cold: bool = False) -> None: ...


class Memory(Side):
    def __init__(self) -> None:
        self.port = self.twin = MemoryBlobs()

    def hot(self, name: str) -> bytes | None:
        return self.twin.hot.get(name)

    def cold(self, name: str) -> bytes | None:
        return self.twin.cold.get(name)

    def spoil(self, name: str, *, cold: bool = False) -> None:
        where = self.twin.cold if cold else self.twin.hot
        where[name] = b"rot" + where[name][3:]


class Disk(Side):
    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.layout = Layout(root / "store", root / "cold")
        atomic.make_folder(self.layout.staging, 0o700)
        self.port = Blobs(self.layout, ledger, hash_file, Clock())

    def hot(self, name: str) -> bytes | None:
        path = self.layout.blob(name)
        return path.read_bytes() if path.exists() else None

    def cold(self, name: str) -> bytes | None:
        path = self.layout.cold_blob(name)
        return path.read_bytes() if path.exists() else None

    def spoil(self, name: str, *, cold: bool = False) -> None:
        path = self.layout.cold_blob(name) if cold else self.layout.blob(name)
        path.chmod(0o644)
        path.write_bytes(b"rot" + path.read_bytes()[3:])


@pytest.fixture(params=["memory", "disk"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "memory":
        yield Memory()
        return
    atomic.make_folder(tmp_path / "store")
    with Ledger.writing(tmp_path / "store/ledger.db") as ledger:
        yield Disk(tmp_path, ledger)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in staging."""
    path = tmp_path / "store/staging/x/data"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DATA)
    return path


def test_a_verified_file_gets_its_name(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))

    assert side.hot(NAME) == DATA
    assert not file.exists()
    assert side.port.check(NAME)


@pytest.mark.parametrize("how", ["inode", "size", "mtime_ns", "device"])
def test_a_file_that_is_not_the_one_that_was_hashed_is_refused(side: Side, file: Path, how: str) -> None:
    fetched = fetched_at(file, NAME)

    with pytest.raises(HashMismatch):
        adopt(side.port, changed(fetched, **{how: getattr(fetched, how) + 1}))

    assert side.hot(NAME) is None


def test_a_file_that_was_replaced_after_its_hash_is_refused(side: Side, file: Path) -> None:
    fetched = fetched_at(file, NAME)
    other = file.with_name("other")
    other.write_bytes(DATA)
    other.rename(file)

    with pytest.raises(HashMismatch):
        adopt(side.port, fetched)


def test_a_file_with_another_name_is_refused(side: Side, file: Path) -> None:
    file.with_name("kept open for writing by somebody").hardlink_to(file)

    with pytest.raises(HashMismatch):
        adopt(side.port, fetched_at(file, NAME))


def test_what_is_adopted_twice_is_there_once(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))
    file.write_bytes(DATA)
    adopt(side.port, fetched_at(file, NAME))

    assert side.hot(NAME) == DATA


def test_a_damaged_blob_is_no_longer_good_and_a_new_one_takes_its_place(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))
    side.spoil(NAME)
    assert not side.port.check(NAME)

    file.write_bytes(DATA)
    adopt(side.port, fetched_at(file, NAME))

    assert side.port.check(NAME)


def test_a_blob_that_is_not_there_is_not_good(side: Side) -> None:
    assert not side.port.check(NAME)


def test_discarding_is_final_and_may_be_repeated(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))

    side.port.discard(NAME)
    side.port.discard(NAME)

    assert side.hot(NAME) is None


def test_cold_storage_gives_back_what_it_took(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))

    side.port.archive(NAME)
    assert (side.hot(NAME), side.cold(NAME)) == (None, DATA)
    side.port.restore(NAME)

    assert (side.hot(NAME), side.cold(NAME)) == (DATA, None)
    assert side.port.check(NAME)


def test_bad_bytes_do_not_get_into_cold_storage(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))
    side.spoil(NAME)

    with pytest.raises(BlobDamaged):
        side.port.archive(NAME)

    assert side.cold(NAME) is None
    assert side.hot(NAME) is not None


def test_bad_bytes_do_not_get_out_of_cold_storage(side: Side, file: Path) -> None:
    adopt(side.port, fetched_at(file, NAME))
    side.port.archive(NAME)
    side.spoil(NAME, cold=True)

    with pytest.raises(BlobDamaged):
        side.port.restore(NAME)

    assert (side.hot(NAME), side.cold(NAME)) == (None, None)


@pytest.mark.parametrize("act", ["archive", "restore"])
def test_what_is_not_there_cannot_move(side: Side, act: str) -> None:
    with pytest.raises(StoreError):
        getattr(side.port, act)(NAME)


@pytest.mark.parametrize("name", ["", "sha256:", "../../etc/passwd", "sha256:" + "0" * 63, "md5:" + "0" * 32, "sha256:" + "A" * 64])
def test_what_is_no_digest_never_becomes_a_path(side: Side, name: str) -> None:
    with pytest.raises((StoreError, ValueError)):
        side.port.discard(name)


def test_of_files_that_are_adopted_together_the_wrong_one_alone_is_refused(side: Side, file: Path) -> None:
    files, names = [file], [NAME]
    for number in range(4):
        data = DATA + bytes([number])
        files.append(file.with_name(f"data-{number}"))
        files[-1].write_bytes(data)
        names.append(name_of(data))
    fetched = [fetched_at(path, name) for path, name in zip(files, names, strict=True)]
    fetched[2] = changed(fetched[2], inode=fetched[2].inode + 1)

    failures = side.port.adopt(fetched)

    assert list(failures) == [names[2]]
    assert isinstance(failures[names[2]], HashMismatch)
    assert [side.hot(name) is not None for name in names] == [True, True, False, True, True]


def test_nothing_is_adopted_of_nothing(side: Side) -> None:
    assert side.port.adopt([]) == {}
