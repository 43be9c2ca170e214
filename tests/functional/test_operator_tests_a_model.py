"""``snapshot test``: whoever signs tries a model first, with the very job and sandbox of the nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.publish import snapshots
from tests.functional.test_operator import Terminal, ready, terminal
from tests.node import tiny

__all__ = ["ready", "terminal"]


@pytest.fixture
def listed(ready: Terminal) -> Terminal:
    (ready.folder / "files").mkdir()
    (ready.folder / "files" / "good.gguf").write_bytes(tiny("good", sharpness=8))
    ready("snapshot add snapshot.json good:v1 files/good.gguf --gpu-memory 0 --url https://h.example.org/good.gguf --timeout 60s")
    return ready


def test_a_good_model_passes_and_its_answer_is_recorded(listed: Terminal) -> None:
    before = listed.bytes("snapshot.json")
    listed("snapshot test snapshot.json good:v1 files")
    assert "good:v1 passes" in listed.out
    assert listed.bytes("snapshot.json") == before
    listed("snapshot test snapshot.json good:v1 files/good.gguf --record")
    expect = snapshots.listed(snapshots.open_(listed.bytes("snapshot.json")), "good:v1").smoke.expect
    assert expect.answer
    assert len(expect.answer.tokens) >= 32
    assert f"recorded: {len(expect.answer.tokens)} tokens, of which {len(expect.answer.sure)} are compared: " in listed.out
    listed("snapshot test snapshot.json good:v1 files")
    assert f"it computes what is recorded, compared at {len(expect.answer.sure)} positions" in listed.out


def test_a_model_that_fails_its_test_is_not_recorded(listed: Terminal) -> None:
    listed("snapshot edit snapshot.json good:v1 --expect-regex ^never$")
    before = listed.bytes("snapshot.json")
    listed("snapshot test snapshot.json good:v1 files --record --json", code=1)
    assert json.loads(listed.out)["verdict"] == "bad"
    assert listed.bytes("snapshot.json") == before


def test_other_files_than_the_listed_ones_are_not_tested(listed: Terminal, tmp_path: Path) -> None:
    (listed.folder / "files" / "good.gguf").write_bytes(tiny("other"))
    listed("snapshot test snapshot.json good:v1 files", code=1)
    assert "is listed" in listed.err
    listed("snapshot test snapshot.json good:v1 snapshot.json", code=1)
    assert "no file 'good.gguf' is among what was named" in listed.err
    listed("snapshot test snapshot.json gone:v1 files", code=1)
    assert "lists no model" in listed.err


def test_without_files_they_are_fetched_from_where_nodes_fetch_them(listed: Terminal, server: Server) -> None:
    name = server.add(tiny("good", sharpness=8))
    listed("snapshot edit snapshot.json good:v1 --url", f"{server.address}{server.path_of(name)}")
    listed("snapshot test snapshot.json good:v1")
    assert "good:v1 passes" in listed.out
    server.lies.add(server.path_of(name))
    listed("snapshot test snapshot.json good:v1", code=1)
    assert "no source gave" in listed.err
