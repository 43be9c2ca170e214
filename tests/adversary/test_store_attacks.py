"""A store that somebody else wrote to: another process of its user, a slip, a backup that was restored with other links."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.core import digest as digests
from reconciler.core.errors import StoreError
from reconciler.fetch import aria2_daemon
from reconciler.fetch import staging as stagings
from reconciler.fetch.staging import Staging
from reconciler.store import observe
from reconciler.store.blobs import Blobs
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from tests import network as networks
from tests.node import Node, run, tiny, traces
from tests.twins.content import name_of
from tests.twins.node import Clock


@pytest.fixture
def used(node: Node) -> Node:
    """A node that has work to do: one model is active, one is to be removed, and one is to be installed."""
    node.configure('grace = "0s"\n')
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    node.publish(node.item("a:v1", tiny("a")), node.item("c:v1", tiny("c")))
    return node


def a_shelf(node: Node, kind: str) -> str:
    return str(next(path for path in (node.store / kind / "sha256").iterdir()).relative_to(node.store))


FOLDERS = ["generations", "blobs", "blobs/sha256", "trees", "trees/sha256", "staging", "quarantine", "trust", "cache"]
INNER = ["trust/roots", "trust/snapshots", "archive/blobs", "archive/blobs/sha256"]
SHELVES = ["blobs shelf", "trees shelf"]
WRITERS = [("apply", "--yes"), ("sync",), ("gc",), ("verify", "--repair"), ("rollback",), ("retry", "b:v1")]


def test_a_link_in_the_place_of_a_folder_is_not_followed(used: Node, tmp_path: Path) -> None:
    for folder in (*FOLDERS, *INNER, *SHELVES):
        kind, _, shelf = folder.partition(" ")
        place, outside = used.store / (a_shelf(used, kind) if shelf else folder), tmp_path / "outside"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.rename(outside) if place.exists() else outside.mkdir()
        (outside / "theirs").write_bytes(b"kept")
        place.symlink_to(outside, target_is_directory=True)
        before = traces(outside)

        for command in WRITERS if folder == "generations" else WRITERS[:1]:
            ran = used.run(*command)
            assert ran.code == 1, (command, ran)
            assert f"{place} is a link" in ran.err
            assert "hint: put the folder" in ran.err
            assert traces(outside) == before, (folder, command)
        assert shelf or used.run("plan").code == 1

        place.unlink()
        (outside / "theirs").unlink()
        outside.rename(place)
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "active", "c:v1": "active"}


def test_a_store_may_be_reached_through_a_link(used: Node, tmp_path: Path) -> None:
    used.store.rename(tmp_path / "elsewhere")
    used.store.symlink_to(tmp_path / "elsewhere", target_is_directory=True)

    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "active", "c:v1": "active"}


def test_nobody_else_may_write_to_a_store_whatever_the_umask(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    before = os.umask(0)
    try:
        assert node.run("apply").code == 0
    finally:
        os.umask(before)

    open_ = [path for path in node.store.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert open_ == []


@pytest.mark.parametrize("where", ["models/evil/v1", "models/a/v2", "evil", "models/a", "index.json", "models", "the generation", "active"])
def test_what_was_planted_in_the_active_generation_is_found_and_leaves(node: Node, tmp_path: Path, where: str) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    generation = (node.store / "active").resolve()
    place = {"the generation": generation, "active": node.store / "active"}.get(where, generation / where)
    outside = tmp_path / "outside"
    if where == "active":
        outside.mkdir()
        place.unlink()
    elif place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
        place.parent.mkdir(exist_ok=True)
    if where != "active":
        place.symlink_to(outside)

    assert node.run("verify").code == 3
    assert node.run("plan", "--detailed-exitcode").code == 2
    assert node.run("apply").code == 0

    assert outside.exists()
    found = (node.store / "active").resolve()
    assert {path.name for path in found.iterdir()} == {"index.json", "models", "names"}
    assert {path.name for path in (found / "models").iterdir()} == {"a"}
    assert {path.name for path in (found / "models/a").iterdir()} == {"v1"}
    assert not any(path.is_symlink() for path in (found / "index.json", found / "models", found / "models/a", found / "names"))
    assert (found / "models/a/v1").resolve().is_relative_to(node.store / "trees")
    assert node.run("plan", "--detailed-exitcode").code == 0
    assert node.run("verify").code == 0


@pytest.mark.parametrize("what", ["blob", "tree's file"])
def test_a_link_to_the_very_bytes_does_not_pass_for_them(node: Node, tmp_path: Path, what: str) -> None:
    """Inode, size, time and mode are right behind it, and whoever put it there changes them when they like."""
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    (blob,) = (node.store / "blobs").glob("*/*/*")
    place = blob if what == "blob" else next(path for path in (node.store / "trees").rglob("*") if path.is_file())
    if what == "blob":
        blob.rename(tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
    else:
        place.unlink()
        place.symlink_to(blob)

    assert node.run("plan", "--detailed-exitcode").code == 2
    assert node.run("apply").code == 0

    assert not place.is_symlink()
    assert not blob.is_symlink()
    assert node.run("plan", "--detailed-exitcode").code == 0


def test_a_link_in_a_blobs_place_is_no_blob_whoever_hashes_it(tmp_path: Path) -> None:
    layout, name = Layout(tmp_path / "store", tmp_path / "cold"), name_of(b"theirs")
    victim = tmp_path / "victim"
    victim.write_bytes(b"theirs")
    victim.chmod(0o600)
    layout.blob(name).parent.mkdir(parents=True)
    layout.blob(name).symlink_to(victim)

    with Ledger.writing(layout.ledger) as ledger:
        blobs = Blobs(layout, ledger, lambda path, algorithm: digests.of(path.read_bytes(), algorithm), Clock())
        assert not blobs.check(name)
        assert ledger.verifications() == {}
    assert victim.stat().st_mode & 0o777 == 0o600


def test_a_link_is_a_damaged_blob_whatever_its_length(tmp_path: Path) -> None:
    """A link is as long as what it says, and of a blob that nobody remembers nothing else is known."""
    (tmp_path / "blob").symlink_to("elsewhere")

    assert observe._blob((tmp_path / "blob").lstat(), None).damaged


def test_a_file_that_was_put_beside_a_models_own_is_found_and_leaves(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    tree = (node.store / "active/models/a/v1").resolve()
    (tree / "planted.py").write_bytes(b"theirs")

    assert node.run("plan", "--detailed-exitcode").code == 2
    assert node.run("apply").code == 0

    assert [path.name for path in tree.iterdir()] == ["a.gguf"]


def test_active_that_leads_to_a_generation_elsewhere_is_found_and_made_anew(node: Node, tmp_path: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    active = node.store / "active"
    number = active.readlink().name
    (tmp_path / number).mkdir()
    active.unlink()
    active.symlink_to(tmp_path / number)

    assert node.run("plan", "--detailed-exitcode").code == 2
    assert node.run("apply").code == 0

    assert str(active.readlink().parent) == "generations"


def test_bytes_that_come_back_under_their_old_name_are_tested_again(node: Node) -> None:
    """Their tree is still there, and the last test that the model passed was of other bytes."""
    for seed, state in (("one", "enabled"), ("two", "enabled"), ("one", "disabled")):
        node.publish(node.item("a:v1", tiny(seed), state=state))
        assert node.run("apply", *["--yes"] * (state == "disabled")).code == 0
    node.publish(node.item("a:v1", tiny("one")))
    (change,) = node.run("plan", "--json").json["models"]
    assert change["op"] == "retest"


# -- what was confirmed ----------------------------------------------------------------------------


def _another_lock(node: Node) -> None:
    with (node.folder / "models.lock").open("a") as file:
        file.write("# and this\n")


def _another_envelope(node: Node) -> None:
    (node.folder / "snapshot.json").write_bytes(networks.Network().snapshot())


def _another_pinned_root(node: Node) -> None:
    other = networks.Network()
    other.root_keys = other.snapshot_keys = networks.keys("thief", 2)
    (node.folder / "root.json").write_bytes(other.root())


def _another_fingerprint(node: Node) -> None:
    path = node.folder / "reconcile.toml"
    path.write_text(path.read_text().replace("[network]\n", f'[network]\nroot_fingerprint = "{"0" * 64}"\n'))


def _another_walked_root(node: Node) -> None:
    node.network.snapshot_keys = networks.keys("next", 2)
    path = node.store / "trust/roots/2.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(node.network.rotate())


@pytest.mark.parametrize("change", [_another_lock, _another_envelope, _another_pinned_root, _another_fingerprint, _another_walked_root])
def test_what_was_confirmed_once_is_confirmed_again_where_anything_of_it_changed(node: Node, change: Callable[[Node], None]) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    assert node.run("plan").code == 0

    change(node)

    assert node.run("plan").code == 4


def test_the_floor_does_not_begin_anew_below_itself(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    old = {name: (node.folder / name).read_bytes() for name in ("models.lock", "snapshot.json")}
    node.publish(node.item("b:v1", tiny("b")))
    assert node.run("sync").code == 0
    for name, data in old.items():
        (node.folder / name).write_bytes(data)

    ran = run("trust", "init", "--yes", "--config", str(node.folder / "reconcile.toml"))

    assert ran.code == 4
    assert "rollback" in ran.err


# -- staging ---------------------------------------------------------------------------------------

NAME = name_of(b"a blob")
SIZE = 1 << 20


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An attempt that an earlier run left in staging, with half of its blob."""
    path = tmp_path / "staging" / NAME.replace(":", "-") / "attempt"
    path.mkdir(mode=0o700, parents=True)
    (path / "data").write_bytes(bytes(SIZE // 2))
    (tmp_path / "staging").chmod(0o700)
    return path


def test_a_link_that_comes_between_the_look_at_a_download_and_its_opening_is_not_followed(
    folder: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        seen = real(path)
        if path == folder / "data":
            path.unlink()
            path.symlink_to(victim)
        return seen

    monkeypatch.setattr(Path, "lstat", lstat)

    with pytest.raises(StoreError):
        Staging(folder.parents[1]).resume(NAME, SIZE)
    assert victim.read_bytes() == b"precious"


def test_a_link_is_no_download(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "data").symlink_to(victim)

    assert stagings.length(tmp_path / "data") == -1
    assert stagings.length(victim) == len(b"precious")


def test_the_downloaders_secrets_are_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "netrc").symlink_to(victim)

    with pytest.raises(FileExistsError):
        aria2_daemon._write_private(tmp_path / "netrc", "secret")

    assert victim.read_bytes() == b"precious"
