"""What a model computed where it was recorded is compared on every node: token by token where it was sure, or as an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.core import lifecycle, lock, snapshot
from reconciler.core.errors import BadEnvelope
from reconciler.ports import TestReport
from tests import jobs
from tests.functional.test_operator import Terminal, ready, terminal
from tests.network import Network, payload_of
from tests.node import tiny

__all__ = ["ready", "terminal"]  # fixtures


def ran(folder: Path, data: bytes, answer: Any, **smoke: Any) -> TestReport:
    return jobs.make_tester(folder).test(jobs.job(folder, data, expect={"answer": answer}, **smoke))


def recorded(folder: Path, data: bytes, **smoke: Any) -> Any:
    report = jobs.make_tester(folder).test(msgspec.structs.replace(jobs.job(folder, data, **smoke), record=True))
    assert report.verdict == "passed"
    return msgspec.to_builtins(report.answer)


# -- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), [("completion", "completion"), ("chat", "chat")])
def test_a_model_computes_what_was_recorded(tmp_path: Path, kind: str, task: str) -> None:
    answer = recorded(tmp_path, tiny("a", kind), task=task)
    assert len(answer["tokens"]) == 4
    everywhere = answer | {"sure": [0, 1, 2, 3]}  # the same machine
    assert ran(tmp_path, tiny("a", kind), everywhere, task=task).verdict == "passed"


def test_another_model_does_not_compute_it(tmp_path: Path) -> None:
    answer = recorded(tmp_path, tiny("a"))
    report = ran(tmp_path, tiny("b"), answer | {"sure": [0, 1, 2, 3]})
    assert report.verdict == "bad"
    assert report.reason.startswith("its answer is not the recorded one: at position ")
    assert report.tokens == 4


def test_one_close_choice_does_not_change_what_is_compared_after_it(tmp_path: Path) -> None:
    """The recorded tokens are fed, and not the model's own: a position that is not named may differ."""
    answer = recorded(tmp_path, tiny("a"))
    first, *rest = answer["tokens"]
    other = {"tokens": [first + 1 if first < 250 else first - 1, *rest], "sure": []}
    assert ran(tmp_path, tiny("a"), other).verdict == "passed"
    assert ran(tmp_path, tiny("a"), other | {"sure": [0]}).verdict == "bad"


def test_a_token_that_the_model_has_not_fails_it_and_not_the_engine(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), {"tokens": [10_000], "sure": []})
    assert (report.verdict, report.reason) == ("bad", "its answer is recorded with token 10,000, and it has 259 tokens")


def test_an_answer_that_is_longer_than_the_context_fails(tmp_path: Path) -> None:
    assert ran(tmp_path, tiny("a"), {"tokens": [70] * 400, "sure": []}).reason.endswith("and its context holds 256")


# -- embeddings --------------------------------------------------------------------------------------


def test_an_embedding_is_what_was_recorded(tmp_path: Path) -> None:
    answer = recorded(tmp_path, tiny("e", "embedding"), task="embedding")
    assert len(answer["embedding"]) == 32
    assert ran(tmp_path, tiny("e", "embedding"), answer, task="embedding").verdict == "passed"
    report = ran(tmp_path, tiny("f", "embedding"), answer, task="embedding")
    assert report.verdict == "bad"
    assert report.reason.startswith("its embedding is not the recorded one: their cosine is ")


def test_an_embedding_of_another_length_or_kind_fails(tmp_path: Path) -> None:
    assert "the recorded one 2" in ran(tmp_path, tiny("e", "embedding"), {"embedding": [1, 0]}, task="embedding").reason
    assert "an embedding is expected of it" in ran(tmp_path, tiny("a"), {"embedding": [1, 0]}).reason


# -- in a snapshot -----------------------------------------------------------------------------------


def decoded(answer: Any) -> snapshot.Snapshot:
    network = Network()
    item = network.model("a:v1", b"x", smoke={"expect": {"answer": answer}} if answer != "absent" else {"expect": {}})
    return snapshot.decode(msgspec.json.encode(network.snapshot_document(item)))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "an answer is made of tokens or of an embedding"),
        ({"tokens": [1], "embedding": [1.0]}, "an answer is made of tokens or of an embedding"),
        ({"tokens": [1], "sure": [1]}, "a position is not among the 1 tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"embedding": [1.0], "cosine": 1.5}, "cosine"),
    ],
)
def test_an_answer_that_says_nothing_or_two_things_is_refused(answer: Any, said: str) -> None:
    with pytest.raises(BadEnvelope, match=said):
        decoded(answer)


def test_no_answer_and_a_null_are_the_same_test_job(tmp_path: Path) -> None:
    del tmp_path
    absent, null = (lock.compile_model(decoded(answer).models[0]) for answer in ("absent", None))
    assert lifecycle.smoke_digest(absent) == lifecycle.smoke_digest(null)
    assert msgspec.json.encode(absent) == msgspec.json.encode(null)


def test_an_answer_calls_for_another_test_and_stands_in_the_lock() -> None:
    one, other = (lock.compile_model(decoded({"tokens": [number]}).models[0]) for number in (1, 2))
    assert lifecycle.smoke_digest(one) != lifecycle.smoke_digest(other)


# -- the operator records it -------------------------------------------------------------------------


def test_the_operator_records_what_a_model_computes(ready: Terminal) -> None:
    ready("snapshot add snapshot.json a:v1 tiny.gguf --url https://models.example.org/a.gguf")
    (ready.folder / "b.gguf").write_bytes(tiny("b"))
    said = ready("snapshot add snapshot.json b:v1 b.gguf --url https://models.example.org/b.gguf --record-answer")
    assert "recorded: 8 tokens, of which " in said
    plain, made = (one["smoke"]["expect"] for one in payload_of(ready.bytes("snapshot.json"))["models"] if one["name"] in {"a", "b"})
    assert "answer" not in plain
    assert len(made["answer"]["tokens"]) == 8


def test_what_does_not_pass_here_is_not_recorded(ready: Terminal) -> None:
    (ready.folder / "b.gguf").write_bytes(b"GGUF")
    ready("snapshot add snapshot.json b:v1 b.gguf --url https://models.example.org/b.gguf --record-answer", code=1)
    assert "no answer was recorded: not a sound GGUF file" in ready.err
