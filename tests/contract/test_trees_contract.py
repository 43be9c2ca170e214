"""One suite for trees on a disk and their memory twin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import ReconcileError, UnpackRefused
from reconciler.core.lock import LockedArtifact
from reconciler.ports import Blobs as BlobsPort
from reconciler.ports import Trees as Port
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from reconciler.store.trees import Trees
from tests.storenode import hash_file
from tests.twins.content import Files, name_of, tar
from tests.twins.fetch import TarUnpacker, adopt, fetched_at
from tests.twins.node import Clock
from tests.twins.store import MemoryBlobs, MemoryTrees


class Side:
    def __init__(self, root: Path, blobs: BlobsPort, trees: Port) -> None:
        self.root = root
        self.blobs = blobs
        self.trees = trees

    def artifact(self, path: str, data: bytes, unpack: str | None = None) -> LockedArtifact:
        """Bring *data* in, and return it as an artifact."""
        file = self.root / "data"
        file.write_bytes(data)
        adopt(self.blobs, fetched_at(file, name_of(data)))
        return LockedArtifact(path=path, digest=name_of(data), unpack=unpack)

    def files(self, tree: str) -> Files:
        raise NotImplementedError


class Memory(Side):
    def __init__(self, root: Path) -> None:
        self.twin = MemoryBlobs()
        self.listed = MemoryTrees(self.twin)
        super().__init__(root, self.twin, self.listed)

    def files(self, tree: str) -> Files:
        return {entry.path: self.twin.hot[entry.digest] for entry in self.listed.listings.get(tree, ())}


class Disk(Side):
    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.layout = Layout(root, root / "cold")
        atomic.make_folder(self.layout.staging, 0o700)
        blobs = Blobs(self.layout, ledger, hash_file, Clock())
        super().__init__(root, blobs, Trees(self.layout, ledger, blobs, TarUnpacker()))

    def files(self, tree: str) -> Files:
        folder = self.layout.tree(tree)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["memory", "disk"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "memory":
        yield Memory(tmp_path)
        return
    with Ledger.writing(tmp_path / "ledger.db") as ledger:
        yield Disk(tmp_path, ledger)


def test_a_tree_holds_the_files_and_the_members_of_archives(side: Side) -> None:
    artifacts = [side.artifact("m.gguf", b"model"), side.artifact("box.tar", tar({"sub/x": b"x", "y": b"y"}), "tar")]

    seen = side.trees.assemble("recipe", artifacts, "m.gguf")

    assert side.files(seen.digest) == {"m.gguf": b"model", "sub/x": b"x", "y": b"y"}
    assert (seen.recipe, seen.bytes, seen.damaged) == ("recipe", 7, False)
    assert set(seen.blobs) == {name_of(b"model"), name_of(b"x"), name_of(b"y")}


def test_the_same_files_are_the_same_tree_however_they_came(side: Side) -> None:
    loose = side.trees.assemble("one", [side.artifact("m", b"model"), side.artifact("x", b"x")], "m")
    boxed = side.trees.assemble("two", [side.artifact("box.tar", tar({"x": b"x", "m": b"model"}), "tar")], "m")

    assert loose.digest == boxed.digest


def test_another_name_or_another_byte_is_another_tree(side: Side) -> None:
    trees = {
        side.trees.assemble(str(index), [side.artifact(path, data)], path).digest
        for index, (path, data) in enumerate([("m", b"model"), ("n", b"model"), ("m", b"modem")])
    }

    assert len(trees) == 3


def test_assembling_twice_changes_nothing(side: Side) -> None:
    artifacts = [side.artifact("m", b"model")]

    assert side.trees.assemble("one", artifacts, "m") == side.trees.assemble("one", artifacts, "m")


@pytest.mark.parametrize("case", ["no entrypoint", "path twice", "path twice but for case", "no archive"])
def test_what_makes_no_model_is_refused(side: Side, case: str) -> None:
    artifacts = {
        "no entrypoint": lambda: [side.artifact("m", b"model")],
        "path twice": lambda: [side.artifact("e", b"model"), side.artifact("b", tar({"e": b"other"}), "tar")],
        "path twice but for case": lambda: [side.artifact("e", b"model"), side.artifact("b", tar({"E": b"other"}), "tar")],
        "no archive": lambda: [side.artifact("e", b"model"), side.artifact("b", b"no archive at all", "tar")],
    }[case]()

    with pytest.raises(UnpackRefused):
        side.trees.assemble("recipe", artifacts, "e")


def test_a_blob_that_is_not_there_makes_no_tree(side: Side) -> None:
    with pytest.raises(ReconcileError):
        side.trees.assemble("recipe", [LockedArtifact(path="m", digest=name_of(b"nowhere"))], "m")


def test_removing_is_final_and_may_be_repeated_and_leaves_the_blobs(side: Side) -> None:
    artifacts = [side.artifact("m", b"model")]
    seen = side.trees.assemble("one", artifacts, "m")

    side.trees.remove(seen.digest)
    side.trees.remove(seen.digest)

    assert side.files(seen.digest) == {}
    assert side.blobs.check(name_of(b"model"))
    assert side.trees.assemble("one", artifacts, "m") == seen


def test_a_standing_tree_is_not_unpacked_again_and_its_entrypoint_is_still_looked_for(side: Side) -> None:
    box = side.artifact("box.tar", tar({"a": b"1"}), "tar")
    made = side.trees.assemble("recipe", [box], "a")
    side.blobs.discard(box.digest)

    assert side.trees.assemble("recipe", [box], "a", standing=True) == made
    assert side.files(made.digest) == {"a": b"1"}
    with pytest.raises(UnpackRefused):
        side.trees.assemble("recipe", [box], "b", standing=True)
    with pytest.raises(ReconcileError):  # it was never made
        side.trees.assemble("other", [box], "a", standing=True)
