"""Rollback and history on a whole node: what may be returned to, and what may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node import Node, flip, tiny


def test_rollback_returns_to_a_generation_and_the_next_apply_goes_forward(used: Node) -> None:
    first = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0

    assert used.run("rollback", "999").code == 64
    assert used.run("rollback").code == 0

    assert used.active() == ["a:v1"]
    assert used.index()["generation"] == first
    changes = used.run("history", "--json").json
    assert changes[-1]["actor"] == "rollback"
    assert changes[-1]["removed"] == ["b:v1"]
    assert [change["actor"] for change in changes[:2]] == ["apply", "apply"]
    assert changes[-1]["lock"] == used.run("status", "--json").json["lock"]
    planned = used.run("plan", "--json").json
    assert planned["summary"]["download_bytes"] == 0
    assert used.run("apply").code == 0
    assert used.active() == ["a:v1", "b:v1"]


@pytest.mark.parametrize("change", ["unlisted", "disabled", "other content"])
def test_rollback_to_what_the_network_took_away_is_refused(used: Node, change: str) -> None:
    first = used.index()["generation"]
    other = used.item("b:v1", tiny("b"))
    match change:
        case "unlisted":
            used.publish(other)
        case "disabled":
            used.publish(used.item("a:v1", tiny("a"), state="disabled"), other)
        case _:
            used.publish(used.item("a:v1", tiny("anew")), other)
    assert used.run("apply").code == 0
    before = used.index()

    ran = used.run("rollback", str(first))

    assert ran.code == 1
    assert "a:v1" in ran.err
    assert used.index() == before


def two_generations(used: Node) -> int:
    first: int = used.index()["generation"]
    used.publish(used.item("a:v1", tiny("a")), used.item("b:v1", tiny("b")))
    assert used.run("apply").code == 0
    return first


def test_rollback_out_of_a_damaged_generation(used: Node) -> None:
    first = two_generations(used)
    index = used.store / "active/index.json"
    index.chmod(0o644)
    index.write_bytes(b"{}")

    assert used.run("rollback").code == 0

    assert used.index()["generation"] == first
    assert used.active() == ["a:v1"]


def test_rollback_serves_no_bytes_that_are_not_known_to_be_good(used: Node) -> None:
    two_generations(used)
    serving = used.index()
    flip(next(path for path in used.blobs() if path.read_bytes() == tiny("a")))

    ran = used.run("rollback")

    assert ran.code == 1, ran
    assert "not known to be good: a:v1" in ran.err
    assert used.index() == serving


def test_rollback_follows_no_link_that_was_planted_in_a_kept_generation(used: Node, tmp_path: Path) -> None:
    first = two_generations(used)
    link = used.store / f"generations/{first}/models/a/v1"
    true = link.readlink()
    link.unlink()
    link.symlink_to(tmp_path, target_is_directory=True)

    assert used.run("rollback").code == 0

    assert used.active() == ["a:v1"]
    assert (used.store / "active/models/a/v1").readlink() == true


def test_kept_generations_are_bounded(node: Node) -> None:
    node.configure("generations = 3\n")
    one, two = node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b"))
    for turn in range(6):
        node.publish(one, two | {"state": "enabled" if turn % 2 else "disabled"})
        assert node.run("apply").code == 0

    kept = sorted(int(path.name) for path in (node.store / "generations").iterdir())
    assert len(kept) == 3
    assert node.index()["generation"] == kept[-1]
