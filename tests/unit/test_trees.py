"""Trees on a disk: complete when their name appears, mended one rename at a time, and never through a link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.core.errors import StoreError, UnpackRefused
from reconciler.core.lock import LockedArtifact
from reconciler.store import atomic
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from reconciler.store.trees import Trees, files_of
from tests.calls import noting
from tests.storenode import hash_file
from tests.twins.content import name_of, tar
from tests.twins.fetch import TarUnpacker
from tests.twins.node import Clock


class Bench:
    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.layout = Layout(root, root / "cold")
        self.ledger = ledger
        atomic.make_folder(self.layout.staging, 0o700)
        self.blobs = Blobs(self.layout, ledger, hash_file, Clock())
        self.trees = Trees(self.layout, ledger, self.blobs, TarUnpacker())

    def artifact(self, path: str, data: bytes, unpack: str | None = None) -> LockedArtifact:
        file = self.layout.staging / "data"
        file.write_bytes(data)
        self.blobs.add_file(file)
        return LockedArtifact(path=path, digest=name_of(data), unpack=unpack)

    def staged(self) -> list[str]:
        return sorted(path.name for path in self.layout.staging.iterdir() if path.name != "data")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Ledger.writing(tmp_path / "ledger.db") as ledger:
        yield Bench(tmp_path, ledger)


def test_a_file_of_a_tree_is_the_blob_itself(bench: Bench) -> None:
    seen = bench.trees.assemble("r", [bench.artifact("sub/m", b"model")], "sub/m")

    assert (bench.layout.tree(seen.digest) / "sub/m").samefile(bench.layout.blob(name_of(b"model")))
    assert bench.ledger.trees()["r"][0] == seen.digest
    assert bench.staged() == []


@pytest.mark.parametrize("spoil", ["other bytes", "link", "gone", "folder", "extra", "extra folder", "linked folder"])
def test_a_spoiled_tree_is_mended_and_nothing_else_is_touched(bench: Bench, spoil: str) -> None:
    artifacts = [bench.artifact("sub/m", b"model"), bench.artifact("n", b"other")]
    seen = bench.trees.assemble("r", artifacts, "n")
    tree = bench.layout.tree(seen.digest)
    untouched = (tree / "n").stat().st_ino
    file = tree / "sub/m"
    outside = bench.layout.root / "outside"
    outside.mkdir()
    if spoil in {"other bytes", "link", "gone", "folder"}:
        file.unlink()
    if spoil == "other bytes":
        file.write_bytes(b"modem")
    elif spoil == "link":
        file.symlink_to("/etc/passwd")
    elif spoil == "folder":
        (file / "x").mkdir(parents=True)
    elif spoil == "extra":
        (tree / "extra").symlink_to("/etc/passwd")
    elif spoil == "extra folder":
        (tree / "a/b").mkdir(parents=True)
    elif spoil == "linked folder":
        file.rename(outside / "m")
        (tree / "sub").rmdir()
        (tree / "sub").symlink_to(outside)

    assert bench.trees.assemble("r", artifacts, "n") == seen

    assert files_of(tree) == ("n", "sub/m")
    assert sorted(path.name for path in tree.iterdir()) == ["n", "sub"]
    assert not (tree / "sub").is_symlink()
    assert file.read_bytes() == b"model"
    assert (tree / "n").stat().st_ino == untouched
    assert [path.name for path in outside.iterdir()] == (["m"] if spoil == "linked folder" else [])


def test_a_tree_is_synced_before_it_has_its_name_and_after_it_was_mended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [bench.artifact("m", b"model")]
    done: list[str] = []
    for name in ("sync_tree", "rename", "link"):
        real = getattr(atomic, name)
        monkeypatch.setattr(atomic, name, noting(done, name, real))

    seen = bench.trees.assemble("r", artifacts, "m")
    assert done == ["link", "sync_tree", "rename"]

    (bench.layout.tree(seen.digest) / "m").unlink()
    bench.trees.assemble("r", artifacts, "m")
    assert done[3:] == ["link", "sync_tree"]


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_stands_in_a_trees_place_is_replaced(bench: Bench, what: str) -> None:
    artifacts = [bench.artifact("m", b"model")]
    seen = bench.trees.assemble("r", artifacts, "m")
    tree = bench.layout.tree(seen.digest)
    moved = tree.rename(bench.layout.root / "moved")
    tree.write_bytes(b"x") if what == "file" else tree.symlink_to(moved)

    bench.trees.assemble("r", artifacts, "m")

    assert not tree.is_symlink()
    assert files_of(tree) == ("m",)


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//x", "./x", "a\\x", "a\x00x", "x" * 300])
@pytest.mark.parametrize("boxed", [True, False])
def test_no_path_leads_out_of_a_tree(bench: Bench, path: str, boxed: bool) -> None:
    class Lying(TarUnpacker):
        def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
            return (path,)

    trees = Trees(bench.layout, bench.ledger, bench.blobs, Lying())
    artifact = bench.artifact("box" if boxed else path, tar({"m": b"m"}), "tar" if boxed else None)

    with pytest.raises(UnpackRefused):
        trees.assemble("r", [artifact], path)

    assert bench.staged() == []
    assert not bench.layout.trees.exists()


@pytest.mark.parametrize("members", [{"a": b"1", "a/b": b"2"}, {"A/x": b"1", "a": b"2"}])
def test_a_file_is_no_folder_too(bench: Bench, members: dict[str, bytes]) -> None:
    boxes = [bench.artifact(f"box{index}", tar({path: data}), "tar") for index, (path, data) in enumerate(members.items())]

    with pytest.raises(UnpackRefused):
        bench.trees.assemble("r", boxes, "a")


def test_nothing_is_left_of_an_archive_that_is_refused_half_way(bench: Bench) -> None:
    class Refusing(TarUnpacker):
        def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
            (into / "sub").mkdir()
            (into / "sub/half").write_bytes(b"x")
            raise UnpackRefused("a member is a device")

    with pytest.raises(UnpackRefused):
        Trees(bench.layout, bench.ledger, bench.blobs, Refusing()).assemble("r", [bench.artifact("b", tar({"m": b"m"}), "tar")], "m")

    assert bench.staged() == []


def test_a_tree_that_cannot_be_finished_never_gets_its_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [bench.artifact("m", b"model"), bench.artifact("n", b"other")]
    real = os.link

    def refuse_second(*args: object, **kwargs: object) -> None:
        if str(args[0]).endswith(name_of(b"other").partition(":")[2]):
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", refuse_second)

    with pytest.raises(StoreError):
        bench.trees.assemble("r", artifacts, "m")

    assert list(bench.layout.trees.rglob("*")) == []
    assert bench.staged() == []
    assert bench.ledger.trees() == {}


def test_a_removed_tree_is_forgotten_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = bench.trees.assemble("r", [bench.artifact("m", b"model")], "m")
    monkeypatch.setattr(atomic, "delete", lambda _path: (_ for _ in ()).throw(StoreError("no")))

    with pytest.raises(StoreError):
        bench.trees.remove(seen.digest)

    assert bench.ledger.trees() == {}
