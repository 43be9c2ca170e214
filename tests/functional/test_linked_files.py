"""
Links in the place of the files that a person keeps in git: the lock, its envelope, the settings, the trust root.

What is written goes to the file that the link leads to, and the link stays; or the command refuses, and nothing is written.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.network import Network
from tests.node import Node, run, tiny


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as git has it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    return folder


def linked(node: Node, checkout: Path, name: str, target: str = "") -> Path:
    """Put *name* into the checkout, and a link to it in its place; return the file in the checkout."""
    path = node.folder / name
    if path.exists():
        path.rename(checkout / name)
    path.symlink_to(target or checkout / name)
    return checkout / name


def lock(node: Node) -> int:
    """Sign a snapshot of another model, and lock it."""
    (node.folder / "published.json").write_bytes(node.network.snapshot(node.item("b:v1", tiny("b"))))
    return node.run("lock").code


@pytest.mark.parametrize("name", ["models.lock", "snapshot.json"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_lock_that_is_a_link_is_written_where_it_leads(node: Node, checkout: Path, name: str, relative: bool) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    kept = linked(node, checkout, name, f"../checkout/{name}" if relative else "")
    before = kept.read_bytes()

    assert lock(node) == 0

    assert (node.folder / name).is_symlink()
    assert kept.read_bytes() != before
    assert node.run("plan").code == 0
    assert [path.name for path in checkout.iterdir()] == [name]


def test_a_link_to_a_link_is_followed_to_the_file(node: Node, checkout: Path) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    kept = linked(node, checkout, "models.lock")
    (checkout / "there").mkdir()
    kept = kept.rename(checkout / "there" / "lock")
    (checkout / "models.lock").symlink_to("there/lock")

    assert lock(node) == 0

    assert (node.folder / "models.lock").is_symlink()
    assert (checkout / "models.lock").is_symlink()
    assert b"b:v1" in kept.read_bytes()


def test_a_link_to_nothing_yet_is_filled(node: Node, checkout: Path) -> None:
    kept = linked(node, checkout, "models.lock")
    assert not kept.exists()

    node.publish(node.item("a:v1", tiny("a")))

    assert b"a:v1" in kept.read_bytes()
    assert (node.folder / "models.lock").is_symlink()


def test_a_link_into_a_folder_that_is_not_there_is_refused(node: Node, checkout: Path) -> None:
    linked(node, checkout, "models.lock", str(checkout / "gone" / "models.lock"))

    assert lock(node) == 1
    assert (node.folder / "models.lock").is_symlink()
    assert not (node.folder / "snapshot.json").exists(), "an envelope without its lock"


def test_a_link_to_itself_is_refused(node: Node, checkout: Path) -> None:
    linked(node, checkout, "models.lock", "models.lock")

    assert lock(node) == 1
    assert (node.folder / "models.lock").readlink() == Path("models.lock")


@pytest.mark.parametrize("what", ["folder", "fifo"])
def test_a_link_to_what_is_no_file_is_refused(node: Node, checkout: Path, what: str) -> None:
    (checkout / "models.lock").mkdir() if what == "folder" else os.mkfifo(checkout / "models.lock")
    (node.folder / "models.lock").symlink_to(checkout / "models.lock")

    assert lock(node) == 1
    assert not (checkout / "models.lock").is_file()


def test_a_link_to_another_file_system_is_written_there(node: Node, checkout: Path) -> None:
    other = Path("/dev/shm")
    assert other.stat().st_dev != checkout.stat().st_dev
    kept = other / f"reconcile-{os.getpid()}"
    kept.mkdir(0o755)
    try:
        (node.folder / "models.lock").symlink_to(kept / "models.lock")
        assert lock(node) == 0
        assert b"b:v1" in (kept / "models.lock").read_bytes()
    finally:
        for path in kept.iterdir():
            path.unlink()
        kept.rmdir()


def test_a_folder_that_is_a_link_is_passed_through(node: Node, checkout: Path) -> None:
    (node.folder / "locks").symlink_to(checkout)
    text = (node.folder / "reconcile.toml").read_text().replace("[network]", '[network]\nlockfile = "locks/models.lock"')
    (node.folder / "reconcile.toml").write_text(text)

    node.publish(node.item("a:v1", tiny("a")))

    assert (node.folder / "locks").is_symlink()
    assert sorted(path.name for path in checkout.iterdir()) == ["models.lock", "snapshot.json"]


def test_a_link_in_a_folder_that_others_may_write_to_is_refused(node: Node, checkout: Path) -> None:
    """Whoever may write there could let the lock be written over any file of the caller's."""
    node.publish(node.item("a:v1", tiny("a")))
    kept = linked(node, checkout, "models.lock")
    before = kept.read_bytes()
    node.folder.chmod(0o777)
    (node.folder / "published.json").write_bytes(node.network.snapshot(node.item("b:v1", tiny("b"))))

    ran = node.run("lock")

    assert ran.code == 1
    assert ran.err.startswith(f"error[untrusted-file]: {node.folder / 'models.lock'} is a link, and {node.folder} may be changed by")
    assert "; or name the file itself" in ran.err
    assert kept.read_bytes() == before


def test_what_is_no_link_is_written_as_ever_where_the_settings_are_named(node: Node) -> None:
    node.folder.chmod(0o777)

    node.publish(node.item("a:v1", tiny("a")))

    assert (node.folder / "models.lock").is_file()


@pytest.mark.parametrize("name", ["reconcile.toml", "root.json"])
def test_init_writes_through_links_too(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / name).symlink_to(checkout / name)
    given = tmp_path / "given.json"
    given.write_bytes(Network().root())
    monkeypatch.chdir(folder)

    assert run("init", "--root", str(given)).code == 0

    assert (folder / name).is_symlink()
    assert (checkout / name).is_file()


def test_the_operators_documents_are_written_through_links_too(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("snapshot", "new", str(checkout / "s.json"), "--network", "testnet").code == 0
    before = run("snapshot", "inspect", str(checkout / "s.json"), "--json").json["expires_at"]
    Path("s.json").symlink_to("checkout/s.json")

    assert run("snapshot", "set", "s.json", "--expires", "300d").code == 0

    assert Path("s.json").is_symlink()
    assert run("snapshot", "inspect", str(checkout / "s.json"), "--json").json["expires_at"] > before
