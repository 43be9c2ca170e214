"""
What a model computed where it was recorded is compared on every node: token by token where it was sure, or as an embedding.

The models are tiny; those named ``sharp`` have wider leads, as trained models have, so that there is an answer to record.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import damaged_models
from reconciler.core import lifecycle, lock, snapshot
from reconciler.core.errors import BadEnvelope
from reconciler.demo import models
from reconciler.demo.server import Server
from reconciler.ports import TestReport
from reconciler.runtime import known_answer
from reconciler.runtime.result import BadModel
from tests import jobs
from tests.functional.test_operator import Terminal, ready, terminal
from tests.network import Network, payload_of
from tests.node import Node, tiny

__all__ = ["ready", "terminal"]  # fixtures


def ran(folder: Path, data: bytes, answer: Any, **smoke: Any) -> TestReport:
    return jobs.make_tester(folder).test(jobs.job(folder, data, expect={"answer": answer}, **smoke))


def recorded(folder: Path, data: bytes, **smoke: Any) -> Any:
    report = jobs.make_tester(folder).test(msgspec.structs.replace(jobs.job(folder, data, **smoke), record=True))
    assert report.verdict == "passed"
    return msgspec.to_builtins(report.answer)


def sharp(seed: str, kind: str = "completion") -> bytes:
    return tiny(seed, kind, sharpness=8)


# -- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), [("completion", "completion"), ("chat", "chat")])
def test_a_model_computes_what_was_recorded(tmp_path: Path, kind: str, task: str) -> None:
    answer = recorded(tmp_path, sharp("a", kind), task=task)
    report = ran(tmp_path, sharp("a", kind), answer, task=task)
    assert (report.verdict, report.compared) == ("passed", len(answer["sure"]))


def test_a_recording_has_32_tokens_and_eight_sure_positions_and_says_by_which_rule(tmp_path: Path) -> None:
    answer = recorded(tmp_path, sharp("a"))
    assert len(answer["tokens"]) >= 32
    assert 8 <= len(answer["sure"]) < len(answer["tokens"])
    assert (answer["margin"], answer["version"]) == (1.0, 1)
    assert list(answer["prompt"]) == [1, *(3 + byte for byte in "▁Hello".encode())]


def test_a_test_job_that_generates_more_records_more(tmp_path: Path) -> None:
    assert len(recorded(tmp_path, sharp("a"), max_tokens=48)["tokens"]) == 48


def test_a_model_that_is_never_sure_gives_no_answer_to_record(tmp_path: Path) -> None:
    report = jobs.make_tester(tmp_path).test(msgspec.structs.replace(jobs.job(tmp_path, tiny("a")), record=True))
    assert report.verdict == "unable"
    assert report.reason.startswith("too little to compare: in ")
    assert report.answer is msgspec.UNSET


def test_another_model_does_not_compute_it(tmp_path: Path) -> None:
    answer = recorded(tmp_path, sharp("a"))
    report = ran(tmp_path, sharp("b"), answer)
    assert report.verdict == "bad"
    assert report.reason.startswith("it computes another answer than the network signed: at position ")
    assert (report.tokens, report.compared) == (4, 0)


def test_one_close_choice_does_not_change_what_is_compared_after_it(tmp_path: Path) -> None:
    """The recorded tokens are fed, and not the model's own: a position that is not named may differ."""
    answer = recorded(tmp_path, sharp("a"))
    first, *rest = answer["tokens"]
    other = {"tokens": [first + 1 if first < 250 else first - 1, *rest], "sure": []}
    report = ran(tmp_path, sharp("a"), other)
    assert (report.verdict, report.compared) == ("passed", 0)  # and nothing is said to agree
    assert ran(tmp_path, sharp("a"), other | {"sure": [0]}).verdict == "bad"


def test_another_choice_contradicts_where_it_is_as_sure_and_not_where_it_hardly_leads(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "sharp.gguf").write_bytes(sharp("a"))
    with contextlib.closing(llama_cpp.Llama(str(tmp_path / "sharp.gguf"), n_ctx=256, n_threads=1, verbose=False)) as model:
        prompt = model.tokenize(b"Hello", add_bos=True)
        answer, choices = known_answer.record(llama_cpp, model, prompt, lambda _: None)
        tokens, close = list(answer["tokens"]), min(range(len(choices)), key=lambda position: choices[position].lead)
        assert choices[close].lead < known_answer.MARGIN

        def compared(position: int, token: int) -> int:
            """Compare an answer that ends at *position* with *token*, where the recorder would have been sure of it."""
            said = {"tokens": [*tokens[:position], token], "sure": [*(one for one in answer["sure"] if one < position), position]}
            return known_answer.compare(llama_cpp, model, prompt, said, lambda _: None)

        def runner_up(position: int) -> int:
            reader = known_answer.Reader(llama_cpp, model, prompt)
            for token in tokens[:position]:
                reader.feed(token)
            return min(
                (token for token in range(model.n_vocab()) if token != tokens[position]), key=lambda token: reader.lead_over(token)[1]
            )

        assert compared(close, runner_up(close)) == len([one for one in answer["sure"] if one < close]) + 1
        for position in answer["sure"]:
            with pytest.raises(BadModel, match=f"at position {position} it chooses token {tokens[position]}"):
                compared(position, runner_up(position))


@pytest.mark.parametrize(
    ("leads", "sure", "another"),
    [
        ([], 8, False), ([0.9], 8, False), ([1.0], 8, True), ([0.1, 0.1], 8, True), ([0.1, 0.1], 99, True), ([0.1] * 4, 200, False),
        ([0.1] * 5, 200, True), ([0.1] * 4 + [1.5], 200, True),
    ],
)  # fmt: skip
def test_one_that_leads_or_several_that_hardly_lead_are_another_answer(leads: list[float], sure: int, *, another: bool) -> None:
    assert known_answer.contradicts(leads, sure) is another


def test_an_answer_is_recorded_anew_where_the_listed_one_is_another(tmp_path: Path) -> None:
    old = recorded(tmp_path, sharp("a"))
    assert recorded(tmp_path, sharp("b"), expect={"answer": old})["tokens"] != old["tokens"]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(tmp_path: Path, threads: int) -> None:
    answer = recorded(tmp_path, sharp("a"))
    tester = jobs.make_tester(tmp_path, f"[runtime.llama-cpp]\nthreads = {threads}\n")
    assert tester.test(jobs.job(tmp_path, sharp("a"), expect={"answer": answer})).verdict == "passed"


@pytest.mark.parametrize("task", ["completion", "embedding"])
def test_a_tokenizer_that_splits_the_prompt_otherwise_is_named_and_fails_no_model(tmp_path: Path, task: str) -> None:
    data = sharp("a") if task == "completion" else tiny("e", "embedding")
    answer = recorded(tmp_path, data, task=task)
    report = ran(tmp_path, data, answer | {"prompt": [*answer["prompt"][:3], 70, *answer["prompt"][3:]]}, task=task)
    assert report.verdict == "unable"
    assert report.reason.startswith(
        "this engine's tokenizer splits the prompt otherwise than the one that recorded its answer: into 9 tokens,"
    )
    assert report.reason.endswith(" not 10, the first other one at position 3")
    assert report.compared == 0


def test_a_template_that_writes_the_date_asks_the_same_on_every_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = "{{ strftime_now('%d %B %Y') }}: {{ messages[0]['content'] }}"
    monkeypatch.setattr(models, "CHAT_TEMPLATE", dated)
    answer = recorded(tmp_path, sharp("c", "chat"), task="chat")
    assert bytes(token - 3 for token in answer["prompt"][1:]) == "▁01▁January▁2026:▁Hello".encode()


def test_a_token_that_the_model_has_not_fails_it_and_not_the_engine(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("a"), {"tokens": [10_000], "sure": []})
    assert (report.verdict, report.reason) == ("bad", "its answer is recorded with token 10,000, and it has 259 tokens")


def test_an_answer_that_is_longer_than_the_context_fails(tmp_path: Path) -> None:
    assert ran(tmp_path, tiny("a"), {"tokens": [70] * 400, "sure": []}).reason.endswith("and its context holds 256")


# -- on a node ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all of the rows of blk.1.ffn_down.weight zeroed", "layers 0 and 1 swapped"])
def test_a_damaged_model_that_the_network_signed_fails_on_the_node(tmp_path: Path, server: Server, name: str) -> None:
    """Hashed and signed again, its bytes are what was signed: only what it computes tells."""
    (tmp_path / "model.gguf").write_bytes(data := tiny("a", sharpness=8, layers=3))
    source, damaged = damaged_models.Source(tmp_path / "model.gguf"), tmp_path / "damaged.gguf"
    damaged_models.write(source, damaged, next(one for one in damaged_models.damages(source) if one.name == name))
    answer = recorded(tmp_path, data)
    smoke = {"max_tokens": 4, "timeout": "60s", "expect": {"answer": answer}}
    node = Node(tmp_path / "node", server)
    node.publish(node.item("good:v1", data, smoke=smoke), node.item("damaged:v1", damaged.read_bytes(), smoke=smoke))

    assert node.run("apply").code == 3
    assert node.states() == {"good:v1": "active", "damaged:v1": "failed"}
    assert "computes another answer than the network signed: at position " in node.run("status", "damaged:v1").out
    compared = len(answer["sure"])
    assert f"computes what the network signed: compared at {compared} positions" in node.run("status", "good:v1").out


# -- embeddings --------------------------------------------------------------------------------------


def test_an_embedding_is_what_was_recorded(tmp_path: Path) -> None:
    answer = recorded(tmp_path, tiny("e", "embedding"), task="embedding")
    assert len(answer["embedding"]) == 32
    report = ran(tmp_path, tiny("e", "embedding"), answer, task="embedding")
    assert (report.verdict, report.compared) == ("passed", 1)
    report = ran(tmp_path, tiny("f", "embedding"), answer, task="embedding")
    assert report.verdict == "bad"
    assert report.reason.startswith("it computes another answer than the network signed: the cosine to its embedding is ")


def test_an_embedding_of_another_length_or_kind_fails(tmp_path: Path) -> None:
    assert (
        "of 32 components, the recorded one has 2" in ran(tmp_path, tiny("e", "embedding"), {"embedding": [1, 0]}, task="embedding").reason
    )
    assert "an embedding is expected of it" in ran(tmp_path, tiny("a"), {"embedding": [1, 0]}).reason
    assert "tokens are expected of it" in ran(tmp_path, tiny("e", "embedding"), {"tokens": [1]}, task="embedding").reason


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
        ({"tokens": [1], "margin": 0}, "margin"),
        ({"tokens": [1], "version": 0}, "version"),
        ({"tokens": [1], "prompt": [-1]}, "prompt"),
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
    (ready.folder / "b.gguf").write_bytes(sharp("b"))
    said = ready("snapshot add snapshot.json b:v1 b.gguf --url https://models.example.org/b.gguf --record-answer")
    assert "recorded: 32 tokens, of which " in said
    plain, made = (one["smoke"]["expect"] for one in payload_of(ready.bytes("snapshot.json"))["models"] if one["name"] in {"a", "b"})
    assert "answer" not in plain
    assert len(made["answer"]["tokens"]) == 32


def test_what_does_not_pass_here_is_not_recorded(ready: Terminal) -> None:
    (ready.folder / "b.gguf").write_bytes(b"GGUF")
    ready("snapshot add snapshot.json b:v1 b.gguf --url https://models.example.org/b.gguf --record-answer", code=1)
    assert "no answer was recorded: not a sound GGUF file" in ready.err
