"""
Whatever is damaged, swapped or replaced on the disk is found, is not served anew, and is healed by the next runs or refused clearly.

A scrub hashes the whole store, as ``reconcile verify`` does; everything else is seen by a plan.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler.commands import verify
from reconciler.commands.context import from_settings
from reconciler.core.errors import StoreError, TrustStateLost
from reconciler.core.lock import Lock
from reconciler.settings import Settings, StoreSettings
from reconciler.store import generations
from reconciler.store.ledger import Ledger
from tests.storenode import StoreNode, memory
from tests.twins.content import Files, name_of
from tests.twins.node import EventLog

A: Files = {"a.gguf": b"A" * 40_000, "sub/a.txt": b"words of a"}
B: Files = {"b.gguf": b"B" * 40_000}
APPROVED = {"a:v1": [A], "b:v1": [B]}


@pytest.fixture
def node() -> Iterator[StoreNode]:
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield StoreNode(Path(folder))


@pytest.fixture
def lock(node: StoreNode) -> Lock:
    lock = node.lock(node.item("a:v1", A), node.item("b:v1", B))
    node.run(lock)
    return lock


def scrub(node: StoreNode) -> list[str]:
    """Return the kinds of damage that ``verify`` finds."""
    settings = Settings(store=StoreSettings(path=str(node.layout.root), archive=str(node.layout.cold)))
    return [damage.kind for damage in verify.verify(from_settings(settings), EventLog(), workers=1).damage]


# -- ways to spoil a file

Spoil = Callable[[Path, Path], None]


def flip(at: float) -> Spoil:
    """Flip one bit of a file and hide it: same size, same times, same mode, same inode."""

    def spoil(path: Path, _other: Path) -> None:
        before = path.stat()
        path.chmod(0o644)
        with path.open("r+b") as file:
            place = int((before.st_size - 1) * at)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))
        path.chmod(stat.S_IMODE(before.st_mode))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return spoil


def zero_page(path: Path, _other: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(4096))


def truncate(path: Path, _other: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path, _other: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def swap(path: Path, other: Path) -> None:
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def hard_link(path: Path, other: Path) -> None:
    path.unlink()
    os.link(other, path)


def symbolic_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def folder(path: Path, _other: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def fifo(path: Path, _other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def gone(path: Path, _other: Path) -> None:
    path.unlink()


def no_mode(path: Path, _other: Path) -> None:
    path.chmod(0)


def future(path: Path, _other: Path) -> None:
    os.utime(path, (4e9, 4e9))


HIDDEN: dict[str, Spoil] = {"first bit": flip(0.0), "middle bit": flip(0.5), "last bit": flip(1.0)}
SEEN: dict[str, Spoil] = {
    "zero page": zero_page, "truncated": truncate, "appended": append, "swapped": swap, "hard link": hard_link, "symlink": symbolic_link,
    "folder": folder, "fifo": fifo, "gone": gone, "no mode": no_mode, "future time": future,
}  # fmt: skip
HARMLESS = {"no mode", "future time"}


# -- blobs and trees -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*HIDDEN, *SEEN])
def test_a_spoiled_blob_is_found_and_healed(node: StoreNode, lock: Lock, how: str) -> None:
    path, other = node.layout.blob(name_of(A["a.gguf"])), node.layout.blob(name_of(B["b.gguf"]))
    (HIDDEN | SEEN)[how](path, other)

    if how in HIDDEN:
        assert scrub(node) == ["blob"]
    assert node.plan(lock).changes
    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes
    assert scrub(node) == []
    assert node.internet.asked.count(name_of(A["a.gguf"])) == (1 if how in HARMLESS else 2)


@pytest.mark.parametrize("how", [*HIDDEN, *sorted(set(SEEN) - HARMLESS - {"swapped"})])
def test_a_spoiled_blob_that_nobody_has_any_more_is_not_served(node: StoreNode, lock: Lock, how: str) -> None:
    (HIDDEN | SEEN)[how](node.layout.blob(name_of(A["a.gguf"])), node.layout.blob(name_of(B["b.gguf"])))
    node.internet.pages.clear()
    if how in HIDDEN:
        scrub(node)

    outcome = node.run(lock)

    assert outcome.unfetched == ("a:v1",)
    assert node.active() == {"b:v1": B}
    assert node.states(lock)["a:v1"] in {"absent", "pending"}


@pytest.mark.parametrize("how", sorted(set(SEEN) - HARMLESS))
@pytest.mark.parametrize("file", ["a.gguf", "sub/a.txt"])
def test_a_spoiled_file_of_a_tree_is_found_and_healed(node: StoreNode, lock: Lock, how: str, file: str) -> None:
    path = node.layout.active / "models/a/v1" / file
    if how in {"zero page", "truncated", "appended"}:  # it is the blob's own inode: a copy in its place is another's
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    SEEN[how](path, node.layout.active / "models/b/v1/b.gguf")
    assert node.plan(lock).changes
    assert "tree" in scrub(node)

    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes
    assert scrub(node) == []


def strange_file(tree: Path) -> None:
    (tree / "strange").write_bytes(b"x")


def strange_folder(tree: Path) -> None:
    (tree / "empty").mkdir()


def linked_folder(tree: Path) -> None:
    (tree / "sub").rename(tree.with_name("elsewhere"))
    (tree / "sub").symlink_to(tree.with_name("elsewhere"))


def linked_tree(tree: Path) -> None:
    tree.rename(tree.with_name("elsewhere"))
    tree.symlink_to("elsewhere")


def no_tree(tree: Path) -> None:
    tree.rename(tree.with_name("elsewhere"))


@pytest.mark.parametrize("how", [strange_file, strange_folder, linked_folder, linked_tree, no_tree])
def test_a_spoiled_tree_is_found_and_healed(node: StoreNode, lock: Lock, how: Callable[[Path], None]) -> None:
    how(node.layout.tree(node.state().active.entries["a:v1"].tree))
    assert node.plan(lock).changes

    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes


# -- active, generations and the index -------------------------------------------------------------


def retarget(node: StoreNode) -> None:
    link = node.layout.active / "models/a/v1"
    target = (node.layout.active / "models/b/v1").readlink()
    link.unlink()
    link.symlink_to(target)


def unlink(node: StoreNode) -> None:
    (node.layout.active / "models/a/v1").unlink()


def replace_link(node: StoreNode) -> None:
    link = node.layout.active / "models/a/v1"
    link.unlink()
    link.mkdir()


@pytest.mark.parametrize("how", [retarget, unlink, replace_link])
def test_a_generation_link_that_strays_is_found_and_made_anew(node: StoreNode, lock: Lock, how: Callable[[StoreNode], None]) -> None:
    how(node)
    made = node.plan(lock)
    assert made.changes
    assert made.drift == ("active: the link of a:v1 does not lead to its tree",)

    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes
    assert len(node.internet.asked) == 3
    with Ledger.reading(node.layout.ledger) as ledger:
        assert [change.what for change in ledger.history(1)] == ["the active set was damaged"], "the network took nothing away"


@pytest.mark.parametrize("state", ["unlisted", "disabled"])
def test_a_stray_link_of_a_model_that_leaves_goes_with_it(node: StoreNode, lock: Lock, state: str) -> None:
    retarget(node)
    items = [node.item("b:v1", B), *([node.item("a:v1", A, state="disabled")] if state == "disabled" else [])]
    wanted = node.lock(*items)

    node.run(wanted)

    assert node.active() == {"b:v1": B}
    assert node.faults(APPROVED) == []


def is_found_and_made_anew_in_one_swap(node: StoreNode, lock: Lock) -> None:
    assert node.plan(lock).changes
    before = generations.numbers(node.layout)[-1]

    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes
    assert generations.numbers(node.layout)[-1] == before + 1
    assert len(node.internet.asked) == 3


def empty_index(path: Path) -> None:
    path.write_bytes(b"")


def garbage_index(path: Path) -> None:
    path.write_bytes(os.urandom(200))


def another_index(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"generation":', b'"generation":9'))


def flipped_entrypoint(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"entrypoint":"a.gguf"', b'"entrypoint":"q.gguf"'))


def escaping_path(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"models/a/v1", b"../../../etc"))


def fifo_index(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("how", [empty_index, garbage_index, another_index, flipped_entrypoint, escaping_path, fifo_index])
def test_a_spoiled_index_is_found_and_made_anew_in_one_swap(node: StoreNode, lock: Lock, how: Callable[[Path], None]) -> None:
    index = node.layout.active / "index.json"
    index.chmod(0o644)
    how(index)
    is_found_and_made_anew_in_one_swap(node, lock)


def active_gone(active: Path) -> None:
    active.unlink()


def active_file(active: Path) -> None:
    active.unlink()
    active.write_bytes(b"x")


def active_folder(active: Path) -> None:
    active.unlink()
    (active / "models").mkdir(parents=True)


def active_elsewhere(active: Path) -> None:
    active.unlink()
    active.symlink_to("/etc")


def active_beyond(active: Path) -> None:
    active.unlink()
    active.symlink_to("generations/99")


@pytest.mark.parametrize("how", [active_gone, active_file, active_folder, active_elsewhere, active_beyond])
def test_a_spoiled_active_is_found_and_made_anew_in_one_swap(node: StoreNode, lock: Lock, how: Callable[[Path], None]) -> None:
    how(node.layout.active)
    is_found_and_made_anew_in_one_swap(node, lock)


# -- the ledger and the trust state ------------------------------------------------------------------


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(8192))


def torn_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096))


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def removed(path: Path) -> None:
    path.unlink()


SPOILED = [empty_file, half, garbage, torn_page, into_folder, into_fifo, into_link, removed]


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_ledger_is_begun_anew_without_a_download(node: StoreNode, lock: Lock, how: Callable[[Path], None]) -> None:
    how(node.layout.ledger)
    try:
        assert node.plan(lock).changes
    except StoreError as refused:
        assert "ledger" in refused.message  # noqa: PT017  either is right: read as empty, or refused with a clear word

    node.run(lock)

    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.faults(APPROVED) == []
    assert not node.plan(lock).changes
    assert len(node.internet.asked) == 3
    assert sorted(node.tester.jobs) == ["a:v1", "a:v1", "b:v1", "b:v1"]
    assert node.trust_state() == lock.snapshot.version


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("ledger", ["there", "spoiled too"])
def test_a_spoiled_floor_is_read_from_its_copy_or_fails_closed(
    node: StoreNode, lock: Lock, how: Callable[[Path], None], ledger: str
) -> None:
    path = node.layout.trust / "floor.json"
    (garbage if how is torn_page else how)(path)
    if ledger == "there":
        assert node.trust_state() == lock.snapshot.version
    else:
        node.layout.ledger.unlink()
        with pytest.raises(TrustStateLost):
            node.trust_state()


def test_a_link_that_the_disk_refuses_to_read_is_not_taken_for_a_damaged_one(
    node: StoreNode, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says nothing must not cost a new generation, nor what serves."""
    real = os.readlink

    def refuse(path: str | Path, **given: int) -> str:
        if "/models/" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, **given)

    monkeypatch.setattr(os, "readlink", refuse)
    with pytest.raises(StoreError):
        node.plan(lock)
    monkeypatch.undo()

    assert not node.plan(lock).changes
