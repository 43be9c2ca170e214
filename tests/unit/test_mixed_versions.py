"""Lists of a newer version: what is not known here is named, harms its own model alone, and is never acted on (SPEC 4)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reconciler.core import digest, lifecycle, lock, snapshot, vocabulary
from reconciler.core.errors import BadEnvelope, LockMismatch
from reconciler.core.plan import WORK
from tests.network import Document, Network, compact
from tests.twins.content import Files, name_of
from tests.twins.node import MemoryNode

A: Files = {"a.gguf": b"one"}
B: Files = {"b.gguf": b"bbb"}
SHA3 = f"sha3-256:{'ab' * 32}"

#: Changes of a model that bring one word that this version does not know, with what is said of it.
UNKNOWN: dict[str, tuple[Document, str]] = {
    "state": ({"state": "paused"}, "state 'paused'"),
    "task": ({"tasks": ["completion", "rerank"]}, "task 'rerank'"),
    "test job's task": ({"tasks": ["rerank"], "smoke": {"task": "rerank"}}, "task 'rerank'"),
    "unpack": ({"unpack": "tar.br"}, "unpack 'tar.br'"),
    "role": ({"role": "adapter"}, "role 'adapter'"),
    "digest": ({"digest": SHA3}, "digest 'sha3-256'"),
    "requires": ({"requires": ["replaces", "moonlight"]}, "requires 'moonlight'"),
}
_OF_ARTIFACTS = {"unpack", "role", "digest"}


@pytest.fixture
def node() -> MemoryNode:
    return MemoryNode()


def unknown(node: MemoryNode, kind: str, name: str = "a:v1", **changes: Any) -> Document:
    """Return model *name* of the files A, with a word of *kind* that nobody knows yet."""
    given, _ = UNKNOWN[kind]
    item = node.item(name, A, **{key: value for key, value in given.items() if key not in _OF_ARTIFACTS}, **changes)
    item["artifacts"][0] |= {key: value for key, value in given.items() if key in _OF_ARTIFACTS}
    return item


# -- one model, and never the list


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_word_that_is_not_known_makes_its_own_model_incompatible_and_no_other(node: MemoryNode, kind: str) -> None:
    wanted = node.lock(unknown(node, kind), node.item("b:v1", B))

    for _ in range(2):
        outcome = node.run(wanted)
        assert (outcome.failed, outcome.untested, outcome.unfetched) == ((), (), ())

    assert node.active() == {"b:v1": B}
    assert node.internet.asked == [name_of(B["b.gguf"])]
    assert node.heard.kinds() == ["incompatible"]
    record = node.ledger.records["a:v1"]
    assert record.state == "absent"
    assert record.reason == f"incompatible: needs-newer: this version of reconcile does not know {UNKNOWN[kind][1]}"
    assert not node.plan(wanted).changes


def test_all_that_is_not_known_is_named(node: MemoryNode) -> None:
    item = unknown(node, "role", state="paused", requires=["moonlight", "tides"])
    node.run(node.lock(item))
    said = node.ledger.records["a:v1"].reason
    assert said.endswith("does not know state 'paused', role 'adapter', requires 'moonlight', requires 'tides'")


@pytest.mark.parametrize("kind", ["role", "requires", "task"])
def test_a_copy_that_is_active_with_the_same_content_serves_on(node: MemoryNode, kind: str) -> None:
    node.run(node.lock(node.item("a:v1", A)))
    for state in ("enabled", "retired"):
        wanted = node.lock(unknown(node, kind, state=state), node.item("b:v1", B))
        node.run(wanted)
        assert node.active()["a:v1"] == A
        change = next(change for change in node.plan(wanted).models if change.id == "a:v1")
        assert (change.op, change.from_) == ("keep", "active")
        assert change.reason.startswith("incompatible: needs-newer: ")
        assert not node.plan(wanted).changes


@pytest.mark.parametrize("kind", ["role", "requires", "task", "unpack", "digest"])
def test_other_content_that_is_not_understood_takes_the_place_of_nothing(node: MemoryNode, kind: str) -> None:
    node.run(node.lock(node.item("a:v1", {"a.gguf": b"older"})))
    node.run(node.lock(unknown(node, kind)))
    assert node.active() == {}


def test_a_model_of_a_state_that_is_not_known_stops_serving_keeps_its_bytes_and_comes_back_without_a_download(node: MemoryNode) -> None:
    known = node.item("a:v1", A)
    node.run(node.lock(known, node.item("b:v1", B)))
    asked = list(node.internet.asked)
    wanted = node.lock(unknown(node, "state"), node.item("b:v1", B))

    node.run(wanted)

    assert node.active() == {"b:v1": B}
    assert (node.ledger.records["a:v1"].state, node.heard.kinds()) == ("inactive", ["incompatible"])
    assert not node.plan(wanted).changes
    node.run(node.lock(known, node.item("b:v1", B)))
    assert node.active() == {"a:v1": A, "b:v1": B}
    assert node.internet.asked == asked


@pytest.mark.parametrize("state", [*vocabulary.STATES, "paused"])
@pytest.mark.parametrize("before", [None, "enabled", "disabled", "archived"])
@pytest.mark.parametrize("kind", sorted(UNKNOWN.keys() - {"state"}))
def test_no_work_is_ever_done_for_a_model_that_is_not_understood(node: MemoryNode, kind: str, before: str | None, state: str) -> None:
    for was in ("enabled", before) if before else ():
        node.run(node.lock(node.item("a:v1", A, state=was)))
    asked = list(node.internet.asked)
    wanted = node.lock(unknown(node, kind, state=state))
    for _ in range(2):
        assert not {change.op for change in node.plan(wanted).models} & WORK
        node.run(wanted)
    assert node.internet.asked == asked
    assert node.active() in ({}, {"a:v1": A} if state in {"enabled", "retired"} else {})
    assert node.plan(wanted).changes is False


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_a_model_replaces_serves_on_while_the_model_is_not_understood(node: MemoryNode, kind: str) -> None:
    old: Files = {"a.gguf": b"older"}
    node.run(node.lock(node.item("a:v0", old)))
    wanted = node.lock(node.item("a:v0", old, state="retired"), unknown(node, kind, replaces=["a:v0"]))
    for _ in range(2):
        node.run(wanted)
        assert node.active() == {"a:v0": old}


def test_words_that_are_known_change_nothing(node: MemoryNode) -> None:
    item = node.item("a:v1", A, requires=list(vocabulary.REQUIRES))
    item["artifacts"][0]["role"] = "model"
    node.run(node.lock(node.item("a:v1", A)))
    asked = list(node.internet.asked)

    wanted = node.lock(item)

    assert not node.plan(wanted).changes
    node.run(wanted)
    assert node.internet.asked == asked


def test_a_model_with_more_tasks_than_this_version_knows_is_no_error() -> None:
    network = Network()
    tasks = ["completion", *(f"task-{index}" for index in range(40))]
    assert lock.compile(network.verified(network.model("a:v1", tasks=tasks))).model[0].unknown_words[0] == "task 'task-0'"


# -- fields


@pytest.mark.parametrize(
    "place", ["", "sources", "models.0", "models.0.runtime", "models.0.smoke", "models.0.smoke.expect", "models.0.artifacts.0"]
)
def test_an_unknown_field_is_ignored_wherever_it_stands_and_covered_by_the_digest(place: str) -> None:
    network = Network()
    document = network.snapshot_document(network.model("a:v1", smoke={"expect": {}}), sources={}, version=1)
    plain = lock.compile(network.verified(**document))
    held: Any = document
    for step in place.split(".") if place else ():
        held = held[int(step)] if step.isdigit() else held[step]
    held["colour"] = {"any": [1, {"thing": None}]}

    found = network.verified(**document)

    made = lock.compile(found)
    assert (made.model, made.blob) == (plain.model, plain.blob)
    assert found.digest == digest.of(compact(document)) != plain.snapshot.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"state": 1}, {"state": None}, {"state": ""}, {"state": "Enabled"}, {"state": "a b"}, {"state": "x" * 65}, {"state": "on\n"},
        {"tasks": ["chat\n"]}, {"tasks": [1]}, {"tasks": []}, {"tasks": ["completion", "completion"]}, {"tasks": "completion"},
        {"requires": "answer"}, {"requires": [1]}, {"requires": ["Answer"]}, {"requires": None}, {"requires": ["a"] * 65},
        {"smoke": {"task": "rerank"}}, {"smoke": {"task": None}},
    ],
)  # fmt: skip
def test_a_word_of_another_shape_is_an_error_as_before(changes: Document) -> None:
    network = Network()
    with pytest.raises(BadEnvelope):
        snapshot.decode(compact(network.snapshot_document(network.model("a:v1", **changes))))


@pytest.mark.parametrize("changes", [{"role": None}, {"role": "A"}, {"role": 1}, {"unpack": 1}, {"unpack": "a/b"}, {"unpack": ""}])
def test_a_word_of_an_artifact_of_another_shape_is_an_error(changes: Document) -> None:
    network = Network()
    model = network.model("a:v1")
    model["artifacts"][0] |= changes
    with pytest.raises(BadEnvelope):
        snapshot.decode(compact(network.snapshot_document(model)))


# -- the lock


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_lock_holds_the_words_themselves_so_that_every_version_writes_the_same(node: MemoryNode, kind: str) -> None:
    made = node.lock(unknown(node, kind))
    data = lock.encode(made)
    assert lock.decode(data) == made
    assert lock.encode(lock.decode(data)) == data
    lock.check(data, made)
    assert UNKNOWN[kind][1].partition("'")[2].rstrip("'").encode() in data
    assert lock.decode(data).model[0].unknown_words == (UNKNOWN[kind][1],)


def test_a_lock_without_any_of_it_has_the_bytes_that_it_had() -> None:
    network = Network()
    text = lock.encode(lock.compile(network.verified(network.model("a:v1")))).decode()
    assert not {"requires", "roles", "role", "replaces", "names"} & {line.partition(" ")[0].strip("[]") for line in text.splitlines()}
    assert "model.roles" not in text


def test_a_role_changes_no_recipe(node: MemoryNode) -> None:
    item = node.item("a:v1", A)
    plain = node.lock(item).model[0]
    item["artifacts"][0]["role"] = "mmproj"
    told = node.lock(item).model[0]
    assert plain.recipe == told.recipe
    assert lifecycle.smoke_digest(plain) != lifecycle.smoke_digest(told)  # a pass speaks of what was loaded
    assert told.roles == {"a.gguf": "mmproj"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"schema = 1", b"schema = 2", "its schema is 2"),
        (b"allow_node_fallback", b"waves = 3\nallow_node_fallback", "'waves'"),
        (b"[model.runtime]", b"[model.runtime]\nbuild = 3", "'model[0].runtime.build'"),
        (b"[[model.artifact]]", b'[[model.artifact]]\ncolour = "red"', "'model[0].artifact[0].colour'"),
        (b"size = ", b"parts = 2\nsize = ", ".parts'"),
    ],
)  # fmt: skip
def test_a_lock_that_a_newer_version_wrote_is_said_to_be_that(node: MemoryNode, old: bytes, new: bytes, said: str) -> None:
    made = node.lock(node.item("a:v1", A))
    data = lock.encode(made).replace(old, new, 1)
    for read in (lambda: lock.check(data, made), lambda: lock.decode(data)):
        with pytest.raises(LockMismatch, match="a newer version of reconcile") as refusal:
            read()
        assert said in refusal.value.message
        assert "reconcile lock" in refusal.value.hint


def test_an_edited_lock_is_not_said_to_be_newer(node: MemoryNode) -> None:
    made = node.lock(node.item("a:v1", A))
    with pytest.raises(LockMismatch, match="line") as refusal:
        lock.check(lock.encode(made).replace(b'"enabled"', b'"paused"'), made)
    assert "newer" not in refusal.value.message


# -- digests


@pytest.mark.parametrize("text", [SHA3, f"md5:{'0' * 32}", f"sha1:{'0' * 40}", f"blake2b:{'0' * 128}", f"shake-256:{'0' * 256}"])
def test_a_digest_of_an_algorithm_that_is_not_known_is_text_and_never_a_path(text: str) -> None:
    network = Network()
    model = network.model("a:v1")
    model["artifacts"][0]["digest"] = text
    compiled = lock.compile(network.verified(model, sources={"fallback": ["https://f.example.org/{algorithm}/{hex}"]}))
    assert list(compiled.blob) == [text]
    assert not digest.is_digest(text)
    with pytest.raises(ValueError, match="not a digest"):
        digest.parse(text)


@pytest.mark.parametrize(
    "text",
    ["../x:" + "0" * 64, "a/b:" + "0" * 64, "a..b:" + "0" * 64, ".:" + "0" * 64, "sha3:../" + "0" * 61, "sha3:" + "0" * 31,
     "sha3:" + "0" * 33,
     "sha3:" + "A" * 64, "sha3:" + "0" * 64 + "\n", "sha3:" + "0" * 300, "x" * 40 + ":" + "0" * 64, "sha3:" + "g" * 64, "-a:" + "0" * 64],
)  # fmt: skip
def test_a_hostile_digest_is_refused_whatever_its_algorithm(text: str) -> None:
    network = Network()
    model = network.model("a:v1")
    model["artifacts"][0]["digest"] = text
    with pytest.raises(BadEnvelope, match="digest"):
        snapshot.decode(json.dumps(network.snapshot_document(model)).encode())
