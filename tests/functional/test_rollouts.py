"""A model reaches a network step by step: on real nodes, and at the operator's terminal."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from reconciler import settings_file
from reconciler.core import rollout
from reconciler.demo.server import Server
from tests.functional.test_operator import Terminal, accepted, ready, terminal
from tests.node import Node, run, tiny

__all__ = ["ready", "terminal"]


def test_a_step_reaches_its_nodes_and_a_step_back_restores_what_was_there(tmp_path: Path, server: Server) -> None:
    nodes = {name: Node(tmp_path / name, server, f'[node]\nid = "{name}"\ncohorts = ["{name}"]\n') for name in ("canary", "other")}

    def publish(share: int, *cohorts: str) -> dict[str, list[str]]:
        for node in nodes.values():
            old = node.item("a:v1", tiny("a1"), state="retired")
            new = node.item("a:v2", tiny("a2"), replaces=["a:v1"], requires=["rollouts"])
            node.publish(old, new, rollouts={"wave": {"models": ["a:v2"], "per_10000": share, "cohorts": list(cohorts)}})
            assert node.run("apply").code == 0
        return {name: node.active() for name, node in nodes.items()}

    assert publish(0) == {"canary": ["a:v1"], "other": ["a:v1"]}
    assert publish(0, "canary") == {"canary": ["a:v2"], "other": ["a:v1"]}
    assert nodes["canary"].run("status", "--json").json["lock"] == nodes["other"].run("status", "--json").json["lock"]
    assert publish(0) == {"canary": ["a:v1"], "other": ["a:v1"]}
    assert publish(10_000) == {"canary": ["a:v2"], "other": ["a:v2"]}


def test_a_node_has_a_random_id_from_the_beginning_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = []
    for force in ((), ("--force",)):
        assert run("init", *force).code == 0
        ids.append(settings_file.decode((tmp_path / "reconcile.toml").read_bytes(), tmp_path).node.id)
    assert ids[0] == ids[1]
    assert uuid.UUID(ids[0]).version == 4
    (tmp_path / "reconcile.toml").unlink()
    assert run("init").code == 0
    assert settings_file.decode((tmp_path / "reconcile.toml").read_bytes(), tmp_path).node.id != ids[0]


def test_the_operator_widens_takes_back_and_ends_a_rollout(ready: Terminal) -> None:
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf --url https://models.example.org/tiny.gguf")
    ready("snapshot rollout snapshot.json wave --model tiny:v2 --share 1% --cohort canary")
    (ready.folder / "before.json").write_bytes(ready.bytes("snapshot.json"))
    ready("snapshot rollout snapshot.json wave --share 25%")
    ready("snapshot diff before.json snapshot.json")
    assert "tiny:v2 goes to 25 % of nodes and cohorts canary in rollout wave, after 1 %" in ready.out
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key --root root.1.json")
    found = accepted(ready).snapshot
    assert found.rollouts
    wave = found.rollouts["wave"]
    assert (wave.models, wave.per_10000, wave.cohorts) == (("tiny:v2",), 2_500, ("canary",))
    assert found.models[1].requires == ("rollouts",)
    assert rollout.is_in("testnet", "wave", wave, "x", ("canary",))
    ready("snapshot rollout snapshot.json wave --share 0% --no-cohorts")
    ready("snapshot rollout snapshot.json wave --end")
    assert "rollouts" not in ready("snapshot inspect snapshot.json --full")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("wave --model tiny:v9 --share 1%", 1, "lists no model"),
        ("wave --share 1%", 1, "there is no rollout 'wave'"),
        ("wave --end", 1, "there is no rollout 'wave'"),
        ("wave --model tiny:v1 --share 101%", 64, "not a part"),
        ("wave --model tiny:v1 --share 100", 64, "not a part"),
        ("wave --model tiny:v1 --share 0.001%", 64, "not a part"),
        ("other --model tiny:v1 --share 1%", 1, "in rollout 'first' already"),
    ],
)
def test_a_rollout_that_is_none_is_refused_and_nothing_written(ready: Terminal, line: str, code: int, said: str) -> None:
    if said.startswith("in rollout"):
        ready("snapshot rollout snapshot.json first --model tiny:v1 --share 1%")
    before = ready.bytes("snapshot.json")
    ready(f"snapshot rollout snapshot.json {line}", code=code)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


def test_a_rollout_of_a_model_that_is_not_listed_is_not_signed(ready: Terminal) -> None:
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf --beside --url https://models.example.org/tiny.gguf")
    ready("snapshot rollout snapshot.json wave --model tiny:v2 --share 1%")
    ready("snapshot remove snapshot.json tiny:v2")
    ready("snapshot sign snapshot.json --key carol.key", code=1)
    assert "rollout 'wave' names tiny:v2, which is not listed" in ready.err
