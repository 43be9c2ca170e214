"""What is observed: nothing is touched, nothing is believed that was not hashed, and what cannot be read is no damage."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import StoreError
from reconciler.store import generations, observe
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests.storenode import StoreNode, memory, traces
from tests.twins.content import Files, changed, name_of

A: Files = {"a.gguf": b"A" * 5000, "sub/more": b"more"}
B: Files = {"b.gguf": b"B" * 5000}
NAME = name_of(A["a.gguf"])


@pytest.fixture
def node() -> Iterator[StoreNode]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield StoreNode(Path(folder))


def test_looking_leaves_no_trace(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", {}, boxed=B))
    node.run(lock)
    before = traces(node.root)

    for _ in range(3):
        node.state()
        node.plan(lock)
        node.states(lock)

    assert traces(node.root) == before


def test_a_store_that_is_not_there_is_empty_and_is_not_made(node: StoreNode) -> None:
    state = node.state()

    assert (state.active.number, state.blobs, state.records, state.unfinished) == (0, {}, {}, False)
    assert list(node.root.iterdir()) == []


def test_a_clean_run_leaves_no_drift_and_no_doubt(node: StoreNode) -> None:
    node.run(node.lock(node.item("a:v1", A), node.item("b:v1", {}, boxed=B)))
    state = node.state()

    assert (state.drift, state.misdirected, state.unfinished) == ((), (), False)
    assert all(seen.verified_at and not seen.damaged for seen in state.blobs.values())
    assert not any(tree.damaged for tree in state.trees.values())


def test_archiving_leaves_no_drift(node: StoreNode) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    node.run(node.lock(node.item("a:v1", A, state="archived")))

    assert node.state().drift == ()
    assert set(node.state().archived) == {name_of(data) for data in A.values()}


@pytest.mark.parametrize("what", ["touched", "copied", "made writable"])
def test_a_blob_that_is_not_the_very_file_that_was_hashed_is_in_doubt(node: StoreNode, what: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    path = node.layout.blob(NAME)
    if what == "touched":
        os.utime(path, (1, 1))
    elif what == "made writable":
        path.chmod(0o644)
    else:
        data, times = path.read_bytes(), path.stat()
        path.rename(path.with_name("old"))
        path.write_bytes(data)
        path.chmod(0o444)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    seen = node.state().blobs[NAME]

    assert (seen.verified_at, seen.damaged) == (None, False)


@pytest.mark.parametrize("what", ["longer", "gone"])
def test_a_blob_of_another_size_or_none_is_drift(node: StoreNode, what: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    path = node.layout.blob(NAME)
    path.chmod(0o644)
    path.write_bytes(b"x" * 5001) if what == "longer" else path.unlink()

    state = node.state()

    assert any(NAME in text for text in state.drift)
    assert NAME not in state.blobs if what == "gone" else state.blobs[NAME].damaged


@pytest.mark.parametrize("name", ["x", "sha256", "sha256/zz/" + "a" * 64, "sha256/ab/" + "cd" * 32, "md5/aa/" + "a" * 32])
def test_what_is_no_blob_is_not_seen_as_one(node: StoreNode, name: str) -> None:
    path = node.layout.blobs / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")

    assert node.state().blobs == {}


@pytest.mark.parametrize("call", ["lstat", "scandir", "readlink", "open"])
def test_a_disk_that_refuses_to_read_is_an_error_and_no_damage(node: StoreNode, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    real = getattr(os, call)

    def refuse(*args: object, **kwargs: object) -> object:
        in_store = args and str(node.layout.root) in str(args[0]) and "ledger" not in str(args[0])
        if in_store or "dir_fd" in kwargs:
            raise OSError(5, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refuse)

    with pytest.raises(StoreError):
        node.state()


@pytest.mark.parametrize("what", ["file", "fifo"])
def test_a_store_that_is_no_folder_is_refused(node: StoreNode, what: str) -> None:
    node.layout.root.write_bytes(b"x") if what == "file" else os.mkfifo(node.layout.root)

    with pytest.raises(StoreError, match="is not a folder"):
        node.state()


def test_status_works_beside_a_run_that_deletes(node: StoreNode) -> None:
    """A blob that goes between its listing and its stat is gone, and no error."""
    items = [node.item(f"m{number}:v1", {"m": str(number).encode()}) for number in range(12)]
    full, empty = node.lock(*items), node.lock()
    node.run(full)
    stop, refused = threading.Event(), list[Exception]()

    def look() -> None:
        while not stop.is_set():
            try:
                node.state()
            except Exception as error:
                refused.append(error)
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(4):
            node.run(empty)
            node.run(full)
    finally:
        stop.set()
        thread.join(30)

    assert refused == []


def test_readers_never_miss_through_twenty_swaps(node: StoreNode) -> None:
    """A reader that opens a model's files by their names, in a loop, finds the whole and nothing but the whole."""
    node.policy = changed(node.policy, generations=10)
    stay = node.item("stay:v1", A)
    locks = [node.lock(stay, *([node.item("b:v1", B)] if number % 2 else [])) for number in range(2)]
    node.run(locks[0])
    folder = node.layout.active / "models/stay/v1"
    stop, missed, reads = threading.Event(), list[str](), [0]

    def hammer() -> None:
        while not stop.is_set():
            try:
                found = {path: (folder / path).read_bytes() for path in A}
                index = (node.layout.active / "index.json").read_bytes()
            except OSError as error:
                missed.append(str(error))
                return
            if found != A or b"stay:v1" not in index:
                missed.append("other bytes")
            reads[0] += 1

    readers = [threading.Thread(target=hammer) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(20):
            node.run(locks[(number + 1) % 2])
    finally:
        stop.set()
        for reader in readers:
            reader.join(30)

    assert missed == []
    assert reads[0] > 20
    assert generations.current(node.layout).number >= 21


def test_a_plan_reads_while_another_process_writes(node: StoreNode) -> None:
    lock = node.lock(node.item("a:v1", A))
    node.run(lock)
    with Ledger.writing(node.layout.ledger) as ledger:
        ledger.set_running(running=True)

        assert node.state().unfinished
        ledger.set_running(running=False)
        assert not node.plan(lock).changes


# -- what belongs nowhere --------------------------------------------------------------------------

DIGITS = name_of(b"").partition(":")[2]


@pytest.mark.parametrize(
    "path",
    [
        "README", "sha256/README", "sha256/zz/x", "sha256/ab/notes.txt", f"sha256/00/{DIGITS}", f"sha256/{DIGITS}",
        f"sha256/{DIGITS[:2]}/{DIGITS}.part", f"sha256/{DIGITS[:2]}/{DIGITS.upper()}", f"md5/{DIGITS[:2]}/{DIGITS}",
        f"sha256/{DIGITS[:1]}/{DIGITS}",
    ],
)  # fmt: skip
def test_a_path_that_is_no_digests_is_named_and_is_no_blob(tmp_path: Path, path: str) -> None:
    blob = tmp_path / "sha256" / DIGITS[:2] / DIGITS
    for file in (blob, tmp_path / path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    assert list(observe.scan(tmp_path)) == [f"sha256:{DIGITS}"]
    (found,) = observe.unexpected_paths(tmp_path)
    assert path.startswith(found)


def test_a_link_among_the_folders_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "blobs" / "sha256").mkdir(parents=True)
    (tmp_path / "blobs" / "sha256" / "ab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "blobs" / "sha512").symlink_to(tmp_path / "elsewhere")

    assert observe.unexpected_paths(tmp_path / "blobs") == ("sha256/ab", "sha512")


def test_copies_in_the_making_and_damaged_ones_belong_in_cold_storage(tmp_path: Path) -> None:
    folder = tmp_path / "sha256" / DIGITS[:2]
    folder.mkdir(parents=True)
    (folder / f".{DIGITS}.tmp").touch()
    (folder / f".{DIGITS}.damaged").touch()

    assert observe.unexpected_paths(tmp_path) == ()


def test_a_link_in_staging_counts_for_nothing(tmp_path: Path) -> None:
    name = "sha256:" + "0" * 64
    layout = Layout(tmp_path, tmp_path / "archive")
    attempt = layout.staging / name.replace(":", "-") / "1"
    attempt.mkdir(parents=True)
    (tmp_path / "other").write_bytes(b"x" * 9000)
    (attempt / "data").symlink_to(os.path.relpath(tmp_path / "other", attempt))

    assert observe.partial_bytes(layout, {name: 1 << 20}) == {}
