"""A real node that is older than its network: every command works with a list of which it does not know every word."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.demo.server import Server
from tests.network import Document
from tests.node import Node, run, tiny

SHA3 = f"sha3-256:{'ab' * 32}"


def newer(node: Node) -> list[Document]:
    """Return models with a word of each kind that nobody knows yet, one of them in each state."""
    items = [node.item(f"x{index}:v1", tiny(f"x{index}")) for index in range(8)]
    items[0]["state"] = "paused"
    items[1]["artifacts"][0]["digest"] = SHA3
    for index, state in ((2, "archived"), (3, "disabled")):
        items[index] |= {"state": state}
        items[index]["artifacts"][0]["digest"] = SHA3
    items[4]["artifacts"][0]["unpack"] = "tar.br"
    items[5]["artifacts"][0]["role"] = "adapter"
    items[6]["requires"] = ["moonlight"]
    items[7] |= {"tasks": ["rerank"], "smoke": {"task": "rerank"}, "colour": {"red": 1}}
    return items


def test_every_command_works_with_a_list_of_a_newer_version(node: Node, server: Server) -> None:
    node.publish(node.item("a:v1", tiny("a")), *newer(node), waves=[1, 2])

    for command in (
        ["sync"], ["lock", "--check"], ["plan", "--detailed-exitcode"], ["apply"], ["status"], ["status", "x1:v1"], ["verify"], ["gc"],
        ["incidents"], ["history"], ["sync"],
    ):  # fmt: skip
        ran = node.run(*command)
        assert ran.code == 0, (command, ran)

    assert node.active() == ["a:v1"]
    models = {model["id"]: model for model in node.run("status", "--json").json["models"]}
    assert models["a:v1"]["state"] == "active"
    for model in (model for name, model in models.items() if name != "a:v1"):
        assert model["state"] == "absent"
        assert model["reason"].startswith("incompatible: needs-newer: this version of reconcile does not know ")
    incidents = node.run("incidents", "--json").json
    assert {one["kind"] for one in incidents} == {"incompatible"}
    assert len({one["model"] for one in incidents}) == len(incidents)
    assert len(node.blobs()) == 1


def test_a_source_that_does_not_answer_is_shown_as_that_and_is_no_failure(node: Node, server: Server) -> None:
    node.publish(node.item("a:v1", tiny("a"), serve=False))

    for _ in range(2):
        assert node.run("apply").code == 3

    shown = node.run("status", "--json").json["models"][0]
    assert (shown["state"], shown["attempts"], shown["last_error"], shown["quarantine"]) == ("absent", 0, None, None)
    assert shown["reason"].startswith("source-failed: ")
    assert node.run("plan", "--json").json["models"][0]["reason"].startswith("source-failed: ")
    assert "are retried" in node.run("status").out
    assert node.run("status", "--json").json["summary"].startswith("Failed, not fetched or not tested yet: 1 model (a:v1); ")
    assert set(node.kinds()) == {"source-failed"}
    assert node.records() == []
    server.add(tiny("a"))
    assert node.run("apply").code == 0
    assert node.states() == {"a:v1": "active"}


def test_the_program_says_which_words_it_knows() -> None:
    known = run("--version", "--json")
    assert known.code == 0
    assert known.json["requires"] == ["replaces", "rollouts"]
    assert known.json["state"] == ["enabled", "disabled", "archived", "retired"]
    assert run("--json", "--version").json == known.json
    assert run("--version").out == f"reconcile, version {known.json['version']}\n"


@pytest.mark.parametrize("arguments", [["--json", "status"], ["--json"]])
def test_json_before_a_command_is_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments).code == 64


def test_signing_says_what_nodes_would_ignore_and_refuses_what_they_would_not_know(node: Node, tmp_path: Path) -> None:
    key, file = tmp_path / "ci.key", tmp_path / "list.json"
    key.write_bytes(node.network.snapshot_keys[0].private_pem())
    key.chmod(0o600)
    file.write_bytes(node.network.snapshot(node.item("a:v1", tiny("a")) | {"colour": "red"}, signers=[]))
    signed = run("snapshot", "sign", str(file), "--key", str(key))
    assert signed.code == 0, signed
    assert "models[0].colour" in signed.err
    file.write_bytes(node.network.snapshot(*newer(node), signers=[]))
    refused = run("snapshot", "sign", str(file), "--key", str(key))
    assert refused.code == 1, refused
    assert "does not know state 'paused'" in refused.err
