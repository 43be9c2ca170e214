"""A real llama-server, started once and never restarted, follows every change of the active set; its clients never get an error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from tests.llama_server import Client, LlamaServer, eventually, free_port, running
from tests.node import Node, tiny

pytestmark = pytest.mark.slow

_TABLE = """
[[serve]]
kind = "llama-server"
name = "main"
path = "serve/models.ini"
reload = "http://127.0.0.1:{port}/models?reload=1"
"""


class Served(Node):
    """A node with a llama-server that follows its active set."""

    llama: LlamaServer

    def follows(self, listed: dict[str, list[str]]) -> float:
        """Check that the server answers from exactly the active set, and return after how many seconds it did."""
        began = time.monotonic()
        eventually(lambda: self.llama.listed() == listed, f"it lists {listed}")
        trees = {model["id"]: str((self.store / model["resolved"]).resolve() / model["entrypoint"]) for model in self.index()["models"]}
        for name, aliases in listed.items():
            assert self.llama.complete(name) != ""
            assert self.llama.file_of(name) == trees[aliases[0]]
        took = time.monotonic() - began
        eventually(lambda: self.llama.mapped() <= set(trees.values()), "nothing is mapped but what is active")
        server = self.run("status", "--json").json["serve"][0]
        assert (server["generation"], server["error"]) == (self.index()["generation"], "")
        return took


@pytest.fixture
def served(tmp_path: Path, server: Server) -> Iterator[Served]:
    port = free_port()
    made = Served(tmp_path / "node", server, _TABLE.format(port=port))
    made.publish(made.item("tiny:v1", tiny("one"), state="disabled"))
    assert made.run("serve write").code == 0
    with running(made.folder / "serve" / "models.ini", tmp_path, port=port) as made.llama:
        yield made


def test_a_server_that_is_never_restarted_answers_from_exactly_the_active_set(served: Served) -> None:
    steps: dict[str, float] = {}
    one, two, corrected = (tiny(seed) for seed in ("one", "two", "two, corrected"))
    other = served.item("other:v1", tiny("other"))
    first = served.item("tiny:v1", one)

    def step(what: str, command: str, code: int, listed: dict[str, list[str]]) -> None:
        assert served.run(command).code == code
        steps[what] = served.follows(listed)

    served.publish(first)
    step("install", "apply", 0, {"tiny": ["tiny:v1"]})
    with Client(served.llama, "tiny", pause_seconds=0.02) as client:
        served.publish(first, other)
        step("add", "apply", 0, {"tiny": ["tiny:v1"], "other": ["other:v1"]})
        first = served.item("tiny:v1", one, state="retired")
        second = served.item("tiny:v2", two, replaces=["tiny:v1"])
        served.publish(first, second, other)
        step("v1 to v2", "apply", 0, {"tiny": ["tiny:v2"], "other": ["other:v1"]})
        broken = served.item("tiny:v3", tiny("three"), replaces=["tiny:v2"], smoke={"expect": {"text": "no model says this"}})
        served.publish(first, served.item("tiny:v2", two, replaces=["tiny:v1"], state="retired"), broken, other)
        step("v3 is broken", "apply", 3, {"tiny": ["tiny:v2"], "other": ["other:v1"]})
        served.publish(first, served.item("tiny:v2", corrected, replaces=["tiny:v1"]), other)
        step("same id, new content", "apply", 0, {"tiny": ["tiny:v2"], "other": ["other:v1"]})
        served.publish(first, served.item("tiny:v2", corrected, replaces=["tiny:v1"]))
        step("remove", "apply", 0, {"tiny": ["tiny:v2"]})
        served.publish(first, served.item("tiny:v2", corrected, replaces=["tiny:v1"]), served.item("more:v1", tiny("more")))
        step("add again", "apply", 0, {"tiny": ["tiny:v2"], "more": ["more:v1"]})
        step("rollback", "rollback", 0, {"tiny": ["tiny:v2"]})
        assert served.run("resume").code == 0
        step("resume", "apply", 0, {"tiny": ["tiny:v2"], "more": ["more:v1"]})

    sys.stdout.write(f"{client.answers} answers; seconds after each command: {steps}\n")
    assert client.errors == []
    assert client.answers > len(steps)
    assert served.llama.process.poll() is None


def test_a_server_that_is_told_the_same_again_unloads_nothing(served: Served) -> None:
    served.publish(served.item("tiny:v1", tiny("one")))
    assert served.run("apply").code == 0
    served.follows({"tiny": ["tiny:v1"]})
    before = served.llama.mapped(), (served.folder / "serve" / "models.ini").stat()

    assert served.run("apply").code == 0
    assert served.run("serve reload").code == 0
    assert (served.llama.mapped(), (served.folder / "serve" / "models.ini").stat()) == before


def test_versions_side_by_side_have_a_name_each_and_the_bare_name_moves(served: Served) -> None:
    first, second = served.item("tiny:v1", tiny("one")), served.item("tiny:v2", tiny("two"))
    served.publish(first, second)
    assert served.run("apply").code == 0
    served.follows({"tiny": ["tiny:v2"], "tiny@v1": ["tiny:v1"]})

    served.publish(first, second, names={"tiny": "v1"})
    assert served.run("apply").code == 0
    served.follows({"tiny": ["tiny:v1"], "tiny@v2": ["tiny:v2"]})
    served.publish(first)
    assert served.run("apply").code == 0
    served.follows({"tiny": ["tiny:v1"]})


def test_an_embedding_model_answers_with_embeddings(served: Served) -> None:
    served.publish(served.item("e:v1", tiny("e", "embedding"), tasks=["embedding"], smoke={"task": "embedding", "prompt": "Hello"}))
    assert served.run("apply").code == 0

    assert served.llama.listed() == {"e": ["e:v1"]}
    assert "embeddings = true" in (served.folder / "serve" / "models.ini").read_text()
