"""Archived models on a whole node: moved to cold storage and back, hashed there in their turn, kept where it is away."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.fetch.hashing import Checked, Hashers
from tests.demand import own_disk
from tests.node import Node, flip, tiny


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own."""
    with own_disk(tmp_path / "other", 16, "cold storage on another file system") as place:
        yield place


def test_archived_to_another_file_system_and_back_without_a_download(node: Node, server: Server, other_disk: Path) -> None:
    node.configure(f'archive = "{other_disk}/cold"\n')
    item, other = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))
    node.publish(item, other)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"}, other)
    assert node.run("apply").code == 0
    cold = [path for path in other_disk.rglob("*") if path.is_file()]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in cold] == [item["artifacts"][0]["digest"].removeprefix("sha256:")]
    assert cold[0].stat().st_dev != node.store.stat().st_dev
    assert node.states() == {"a:v1": "archived", "b:v1": "active"}
    node.run("gc")  # what the generation before needs is still there; only the archived copy counts from here on
    server.files.clear()

    node.publish(item, other)
    planned = node.run("plan", "--json").json
    assert node.run("apply").code == 0

    assert planned["summary"]["download_bytes"] == 0
    assert [blob["op"] for blob in planned["blobs"]] == ["restore"]
    assert node.active() == ["a:v1", "b:v1"]
    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert not [path for path in other_disk.rglob("*") if path.is_file()]


def test_cold_storage_that_is_away_keeps_the_model_where_it_is(used: Node) -> None:
    (used.folder / "file").write_bytes(b"mine")
    used.configure('archive = "file/cold"\n')
    used.publish(used.item("a:v1", tiny("a"), state="archived"))

    ran = used.run("apply")

    assert ran.code in {1, 3}, ran
    assert "Traceback" not in ran.err
    assert len(used.blobs()) == 1
    used.configure("")
    assert used.run("apply").code == 0
    assert used.states() == {"a:v1": "archived"}


def test_a_whole_cold_copy_is_hashed_in_its_turn(node: Node) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item, node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"}, node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    flip(next((node.store / "archive").glob("blobs/*/*/*")))

    assert sorted(node.run("verify", "--sample", "50%").code for _ in range(2)) == [0, 3], "never hashed: first; then the other's turn"


def test_a_cold_copy_that_rotted_is_noticed_and_fetched(node: Node, other_disk: Path) -> None:
    node.configure(f'archive = "{other_disk}/cold"\n')
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0
    flip(next(path for path in other_disk.rglob("*") if path.is_file()))

    node.publish(item)
    assert node.run("apply").code == 0

    assert (node.store / "active/models/a/v1/a.gguf").read_bytes() == tiny("a")
    assert "blob-damaged" in node.kinds()


@pytest.mark.parametrize("command", [["verify"], ["verify", "--repair"], ["agent", "--once"]])
def test_a_scrub_sets_aside_what_rotted_in_cold_storage(node: Node, command: list[str]) -> None:
    node.configure('\n[agent]\nscrub_after = "1s"\n')
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0
    assert node.run("verify", "--json").json["checked"] == 1
    copy = next((node.store / "archive").glob("blobs/*/*/*"))
    flip(copy)

    ran = node.run(*command)

    assert ran.code == (3 if command == ["verify"] else 0), ran
    assert "blob-damaged" in node.kinds()
    assert node.states() == {"a:v1": "absent"}
    assert copy.with_name(f".{copy.name}.damaged").exists()
    assert node.run("verify").code == 0
    assert node.run("plan").code == 0, "an archived model is not fetched to be archived"
    node.publish(item)
    assert node.run("apply").code == 0
    assert node.active() == ["a:v1"]


def test_a_cold_copy_that_cannot_be_read_now_keeps_its_name(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    item = node.item("a:v1", tiny("a"))
    node.publish(item)
    assert node.run("apply").code == 0
    node.publish(item | {"state": "archived"})
    assert node.run("apply").code == 0

    def killed(_: Hashers, files: list[tuple[str, int, Path]], *__: object) -> Iterator[Checked]:
        return (Checked(digest=name, ok=False, error="killed") for name, _size, _path in files)

    with monkeypatch.context() as patched:
        patched.setattr(Hashers, "check_many", killed)
        assert node.run("verify").code == 3

    assert node.states() == {"a:v1": "archived"}
    assert node.run("verify").code == 0
