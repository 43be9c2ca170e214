"""Every file of a model is tested for what it is for: good ones are named as exercised, and a bad one fails the model by its name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reconciler.core.snapshot import Runtime, Smoke
from reconciler.demo.server import Server
from reconciler.ports import TestJob, TestReport
from reconciler.runtime import inventory, smoke_test
from reconciler.runtime.result import BadModel
from reconciler.sandbox import choose
from reconciler.sandbox.process import SandboxJob
from tests import jobs, model_files
from tests.demand import working
from tests.network import Document
from tests.node import Node, Ran, tiny

NEVER = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s", "expect": {"regex": "^never said$"}}


def ran(folder: Path, files: dict[str, bytes], text: str = "", *, entrypoint: str = "", roles: Any = None, **smoke: Any) -> TestReport:
    """The report of a test job on a model that is made of *files*."""
    tree = folder / "tree"
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    wanted = msgspec.convert({"max_tokens": 4, "timeout": "60s"} | smoke, Smoke)
    return jobs.make_tester(folder, text).test(
        TestJob(
            model="m:v1",
            tree=tree,
            entrypoint=entrypoint or min(files),
            runtime=Runtime(engine="llama-cpp"),
            smoke=wanted,
            roles=roles or {},
        )
    )


# -- good files are exercised ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bubblewrap", "landlock"])
def test_every_kind_of_good_file_is_exercised_and_the_rest_is_said_not_to_be(tmp_path: Path, mode: Any) -> None:
    files = {
        "model.gguf": tiny("a"), "mmproj.gguf": model_files.projector(), "lora.gguf": model_files.lora(), "small.gguf": tiny("d", width=16),
        "tokenizer.json": b"{}", "LICENSE": b"free",
    }  # fmt: skip
    report = ran(tmp_path, files, f'[smoke]\nsandbox = "{working(mode)}"\n', entrypoint="model.gguf", roles={"small.gguf": "draft"})
    assert (report.verdict, report.reason) == ("passed", "")
    assert report.exercised == ("lora.gguf", "mmproj.gguf", "model.gguf", "small.gguf")
    assert report.not_exercised == ("LICENSE", "tokenizer.json")
    assert report.stderr == ""


def test_every_split_is_opened_and_the_split_model_says_what_the_whole_one_says(tmp_path: Path) -> None:
    parts = model_files.split("a")
    assert len(parts) == 3
    report = ran(tmp_path / "split", parts)
    assert (report.verdict, report.exercised, report.not_exercised) == ("passed", tuple(parts), ())
    assert report.token_ids == ran(tmp_path / "whole", {"model.gguf": tiny("a")}).token_ids


def test_what_is_generated_is_generated_with_the_adapters(tmp_path: Path) -> None:
    alone = ran(tmp_path / "alone", {"model.gguf": tiny("a")})
    adapted = ran(tmp_path / "adapted", {"model.gguf": tiny("a"), "x.lora": model_files.lora()}, roles={"x.lora": "lora"})
    assert adapted.verdict == "passed"
    assert adapted.token_ids != alone.token_ids


def test_an_embedding_model_with_a_projector_is_exercised_too(tmp_path: Path) -> None:
    files = {"model.gguf": tiny("e", "embedding"), "n.gguf": model_files.projector()}
    report = ran(tmp_path, files, task="embedding")
    assert (report.verdict, report.dimension, report.exercised) == ("passed", 32, ("model.gguf", "n.gguf"))


def test_a_second_model_is_loaded_for_what_it_is(tmp_path: Path) -> None:
    report = ran(tmp_path, {"a.gguf": tiny("a"), "b.gguf": tiny("e", "embedding")})
    assert (report.verdict, report.exercised) == ("passed", ("a.gguf", "b.gguf"))


# -- bad files fail the model by their name ----------------------------------------------------------

#: Two tokens changed places; the engine refuses a vocabulary that has one twice.
OTHER_WORDS = tiny("d").replace(b"<0x41>", b"<0x-->").replace(b"<0x42>", b"<0x41>").replace(b"<0x-->", b"<0x42>")
TWICE = tiny("d").replace(b"<0x41>", b"<0x42>")


@pytest.mark.parametrize(
    ("path", "data", "role", "said"),
    [
        ("mmproj.gguf", bytes(range(256)) * 64, None, "mmproj.gguf: not a sound GGUF file: "),
        ("mmproj.bin", bytes(range(256)) * 64, "mmproj", "mmproj.bin: not a sound GGUF file: "),
        ("mmproj.gguf", model_files.projector(64), None, "the projector 'mmproj.gguf': the engine does not load it with this model"),
        ("mmproj.gguf", model_files.projector(kind="nonsense"), None, "the projector 'mmproj.gguf': the engine does not load it"),
        ("mmproj.gguf", model_files.projector(broken=True), None, "the projector 'mmproj.gguf': its logits are not finite numbers"),
        ("lora.gguf", model_files.lora(64), None, "the LoRA adapter 'lora.gguf': the engine does not load it with this model"),
        ("lora.gguf", model_files.lora(kind="other"), None, "the LoRA adapter 'lora.gguf': the engine does not load it with this model"),
        ("lora.gguf", model_files.lora(scale=float("nan")), None, "its logits with 'lora.gguf' are not finite numbers"),
        ("draft.gguf", OTHER_WORDS, None, "the draft model 'draft.gguf': its vocabulary is not the model's: token 68 is '<0x42>'"),
        ("draft.gguf", TWICE, None, "the engine died of SIGABRT with it, while loading the draft model 'draft.gguf': "),
        ("x.gguf", model_files.projector(), "lora", "x.gguf: its role is 'lora', and by its header it is a projector (mmproj)"),
        ("x.gguf", tiny("b"), "mmproj", "x.gguf: its role is 'mmproj', and by its header it is a model"),
        ("x.gguf", tiny("b"), "licence", "x.gguf: its role is 'licence', and by its header it is a model"),
        ("x.gguf", tiny("b"), "split", "x.gguf: its role is 'split', and by its header it is a model"),
        ("x-00002-of-00002.gguf", model_files.split("b")["tiny-00002-of-00003.gguf"], None, "split 2 of 3 is missing: "),
    ],
)  # fmt: skip
def test_a_bad_file_fails_the_model_and_is_named(tmp_path: Path, path: str, data: bytes, role: str | None, said: str) -> None:
    report = ran(tmp_path, {"model.gguf": tiny("a"), path: data}, entrypoint="model.gguf", roles={path: role} if role else {})
    assert report.verdict == "bad"
    assert said in report.reason
    assert path not in report.exercised


def test_a_file_that_claims_nothing_is_not_read(tmp_path: Path) -> None:
    files = {"model.gguf": tiny("a"), "mmproj.gguf": b"GGUF, so it says"}
    report = ran(tmp_path, files, entrypoint="model.gguf", roles={"mmproj.gguf": "other"})
    assert (report.verdict, report.exercised, report.not_exercised) == ("passed", ("model.gguf",), ("mmproj.gguf",))


def test_a_file_of_another_engine_is_not_loaded(tmp_path: Path) -> None:
    report = ran(tmp_path, {"model.gguf": tiny("a"), "adapter_model.safetensors": b"x"}, entrypoint="model.gguf")
    assert (report.verdict, report.not_exercised) == ("passed", ("adapter_model.safetensors",))


@pytest.mark.parametrize(("data", "roles", "role"), [(model_files.projector(), {}, "mmproj"), (tiny("a"), {"x.gguf": "other"}, "other")])
def test_an_entrypoint_that_is_no_model_fails(tmp_path: Path, data: bytes, roles: dict[str, str], role: str) -> None:
    report = ran(tmp_path, {"x.gguf": data}, roles=roles)
    assert (report.verdict, report.reason) == ("bad", f"x.gguf: its role is {role!r}, and an engine is given a model")


def _broken_splits() -> Iterator[tuple[str, dict[str, bytes], str]]:
    parts = model_files.split("a")
    first, second, third = parts
    yield "missing", {path: data for path, data in parts.items() if path != third}, f"split 3 of 3 is missing: there is no {third!r}"
    yield "renamed", {first: parts[first], third: parts[third], "second.gguf": parts[second]}, "split 2 of 3 is missing: 'second.gguf' is "
    yield "extra", parts | {"tiny-00004-of-00003.gguf": parts[third]}, "'tiny-00004-of-00003.gguf' is one split too many"


@pytest.mark.parametrize(("what", "files", "said"), list(_broken_splits()))
def test_a_broken_split_model_is_named_before_an_engine_is_asked(tmp_path: Path, what: str, files: dict[str, bytes], said: str) -> None:
    del what
    report = ran(tmp_path, files, entrypoint="tiny-00001-of-00003.gguf")
    assert report.verdict == "bad"
    assert report.reason.startswith(said)
    assert "llama" not in report.stderr  # the engine was not even loaded
    assert report.exercised == ()


def test_a_missing_shard_of_safetensors_is_named_before_a_server_is_started(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(BadModel, match=r"split 2 of 2 is missing: there is no 'model-00002-of-00002\.safetensors'"):
        inventory.check_names({"tree": str(tmp_path), "entrypoint": "config.json"})
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    inventory.check_names({"tree": str(tmp_path), "entrypoint": "config.json"})


# -- what a failed test says -------------------------------------------------------------------------


def test_the_record_of_a_failed_test_says_what_happened(tmp_path: Path) -> None:
    report = ran(tmp_path, {"model.gguf": tiny("a")}, expect={"regex": "^never said$"})
    good = ran(tmp_path, {"model.gguf": tiny("a")})
    assert report.verdict == "bad"
    assert (report.device, report.tokens, report.token_ids, report.text) == (good.device, 4, good.token_ids, good.text)
    assert report.load_seconds > 0
    assert report.run_seconds > 0
    assert report.tokens_per_second == pytest.approx(report.tokens / report.run_seconds)
    assert "llama_model_loader" in report.stderr
    assert len(report.stderr.encode()) <= 65_536
    assert report.exercised == ("model.gguf",)


def test_a_job_that_runs_out_of_time_says_what_it_had_said(tmp_path: Path) -> None:
    made = jobs.job(tmp_path, tiny("a"))
    document = smoke_test.job_document(made, {"gpu_layers": 0, "threads": 0}, seconds=0)
    job = SandboxJob(module="reconciler.runtime.llama_cpp_worker", job=document, seconds=60, read=(made.tree,))
    report = smoke_test._report_of(choose.make_sandbox(working("bubblewrap")).run(job), made, roomy=False)
    assert (report.verdict, report.reason) == ("bad", "its test job did not end in time, after 1 token")
    assert (report.tokens, len(report.token_ids)) == (1, 1)
    assert report.load_seconds > 0


# -- through the whole program -----------------------------------------------------------------------


def published(node: Node, files: dict[str, bytes], model: str = "m:v1", roles: dict[str, str] | None = None, **changes: Any) -> Document:
    """A model of several *files*, each served."""
    first = min(path for path in files if path.endswith(".gguf"))
    item = node.item(model, files[first], path=first, entrypoint=first, **changes)
    for path, data in files.items():
        if path == first:
            continue
        other = node.item("x:v1", data, path=path, entrypoint=path)["artifacts"][0] if data else _empty(path)
        item["artifacts"].append(other)
    for one in item["artifacts"]:
        if role := (roles or {}).get(one["path"]):
            one["role"] = role
    return item


def _empty(path: str) -> Document:
    return {"path": path, "digest": f"sha256:{hashlib.sha256().hexdigest()}", "size": 0, "urls": []}


def model_of(shown: Ran, model: str = "m:v1") -> Document:
    found: Document = next(one for one in shown.json["models"] if one["id"] == model)
    return found


def test_a_model_of_several_files_is_active_and_says_which_were_exercised(node: Node) -> None:
    files = {"a.gguf": tiny("a"), "mmproj.gguf": model_files.projector(), "config.json": b"", "LICENSE": b"free"}
    node.publish(published(node, files, roles={"mmproj.gguf": "mmproj", "config.json": "config", "LICENSE": "licence"}))
    assert node.run("sync").code == 0
    assert node.states() == {"m:v1": "active"}
    assert (node.store / "active/models/m/v1/config.json").read_bytes() == b""
    test = model_of(node.run("status", "m:v1", "--json"))["test"]
    assert (test["exercised"], test["not_exercised"]) == (["a.gguf", "mmproj.gguf"], ["LICENSE", "config.json"])
    listed = model_of(node.run("status", "--json"))
    assert (listed["exercised"], listed["not_exercised"]) == (test["exercised"], test["not_exercised"])
    shown = node.run("status", "m:v1").out
    assert "exercised: a.gguf, mmproj.gguf" in shown
    assert "not exercised: LICENSE, config.json" in shown


def test_a_bad_projector_fails_the_model_and_the_record_has_the_engines_words(node: Node) -> None:
    node.publish(published(node, {"a.gguf": tiny("a"), "mmproj.gguf": model_files.projector(64)}))
    assert node.run("sync").code == 3
    assert node.states() == {"m:v1": "failed"}
    shown = node.run("status", "m:v1").out
    assert "mismatch between text model (n_embd = 32) and mmproj (n_embd = 64)" in shown
    assert re.search(r"\n  loaded in \d+\.\d\ds, ran for \d+\.\d\ds, 4 tokens, ", shown)
    test = model_of(node.run("status", "m:v1", "--json"))["test"]
    assert "mismatch between text model" in test["stderr"]
    assert test["exercised"] == ["a.gguf"]
    record = (node.store / model_of(node.run("status", "m:v1", "--json"))["quarantine"] / "record.json").read_text()
    assert "mismatch between text model" in record


def _pairs() -> Iterator[tuple[str, dict[str, bytes], dict[str, bytes], str]]:
    """For each kind of file: its name, what is good, what is bad, and what names the bad one."""
    main, parts = {"a.gguf": tiny("a")}, model_files.split("a")
    yield "mmproj", main | {"p.gguf": model_files.projector()}, main | {"p.gguf": bytes(range(256)) * 64}, "p.gguf: not a sound GGUF file"
    yield "lora", main | {"l.gguf": model_files.lora()}, main | {"l.gguf": model_files.lora(64)}, "the LoRA adapter 'l.gguf'"
    yield "draft", main | {"draft.gguf": tiny("d", width=16)}, main | {"draft.gguf": OTHER_WORDS}, "the draft model 'draft.gguf'"
    first, second, third = parts
    yield "split", parts, {path: parts[path] for path in (first, third)}, f"split 2 of 3 is missing: there is no {second!r}"
    renamed = {first: parts[first], "x.gguf": parts[second], third: parts[third]}
    yield "renamed split", parts, renamed, "split 2 of 3 is missing: 'x.gguf' is that split by its header"


@pytest.mark.parametrize(("kind", "good", "bad", "said"), list(_pairs()), ids=[pair[0] for pair in _pairs()])
def test_the_good_one_is_active_with_its_file_exercised_and_the_bad_one_failed_with_its_file_named(
    node: Node, kind: str, good: dict[str, bytes], bad: dict[str, bytes], said: str
) -> None:
    del kind
    node.publish(published(node, good, "good:v1"), published(node, bad, "bad:v1"))
    assert node.run("sync").code == 3
    assert node.states() == {"good:v1": "active", "bad:v1": "failed"}
    shown = node.run("status", "--json")
    assert model_of(shown, "good:v1")["exercised"] == sorted(good)
    assert said in model_of(shown, "bad:v1")["last_error"]
    assert {file["path"]: file["tested"] for file in node.index()["models"][0]["files"]} == dict.fromkeys(good, True)


def test_another_role_calls_for_another_test_and_none_changes_the_tree(node: Node) -> None:
    files = {"a.gguf": tiny("a"), "b.gguf": tiny("b")}
    node.publish(published(node, files))
    assert node.run("sync").code == 0
    tree = model_of(node.run("status", "--json"))["tree"]
    node.publish(published(node, files, roles={"b.gguf": "draft"}))
    assert node.run("plan", "--json").json["models"][0]["reason"].startswith("test-changed")
    assert node.run("sync").code == 0
    assert model_of(node.run("status", "--json"))["tree"] == tree


def test_a_lie_about_an_empty_file_is_a_hash_mismatch(node: Node) -> None:
    item = published(node, {"a.gguf": tiny("a"), "z.txt": b""})
    item["artifacts"][1]["digest"] = f"sha256:{'0' * 64}"
    node.publish(item)
    assert node.run("sync").code == 3
    assert "an empty file hashes to e3b0c442" in model_of(node.run("status", "--json"))["reason"]


def test_the_terminal_is_not_controlled_by_what_an_engine_writes(node: Node, server: Server) -> None:
    del server
    hostile = tiny("a").replace(b"general.name", b"general.n\x1bme")
    node.publish(published(node, {"a.gguf": hostile}, smoke=NEVER))
    assert node.run("sync").code == 3
    assert "general.n" in model_of(node.run("status", "m:v1", "--json"))["test"]["stderr"]
    assert "\x1b" not in node.run("status", "m:v1").out
