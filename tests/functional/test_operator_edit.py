"""Correcting a listed model, and what is probably wrong with a snapshot, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reconciler.core import dsse
from reconciler.publish import snapshots
from tests import gguf_files
from tests.functional.test_operator import Terminal, ready, terminal
from tests.hostile_server import HostileServer, honest, status
from tests.network import b64

__all__ = ["ready", "terminal"]


def model(ready: Terminal) -> Any:
    return snapshots.open_(ready.bytes("snapshot.json")).models[0]


def test_every_kind_of_field_is_corrected(ready: Terminal) -> None:
    ready(
        "snapshot edit snapshot.json tiny:v1 --gpu-memory 2GiB --memory 1GiB --engine vllm --engine-version >=1 --prompt Hi --seed 7"
        " --max-tokens 3 --expect-text x --expect-regex y --expect-tokens 2 --expect-token-ids 4,5 --min-rate 9 --timeout 5s"
        " --url https://new.example.org/{path} --task chat --smoke-task chat --unset smoke.expect.text",
        "--set",
        'artifacts[tiny.gguf].role="model"',
    )
    found = model(ready)
    assert (found.gpu_memory, found.memory, found.tasks) == (2 << 30, 1 << 30, ("chat",))
    assert (found.runtime.engine, found.runtime.version) == ("vllm", ">=1")
    assert (found.smoke.prompt, found.smoke.seed, found.smoke.max_tokens, found.smoke.timeout, found.smoke.task) == (
        "Hi",
        7,
        3,
        "5s",
        "chat",
    )
    expect = found.smoke.expect
    assert (expect.text, expect.regex, expect.min_tokens, expect.tokens, expect.min_rate) == (None, "y", 2, (4, 5), 9)
    assert (found.artifacts[0].urls, found.artifacts[0].role) == (("https://new.example.org/tiny.gguf",), "model")
    assert "tiny:v1 is tested again on every node" in ready.err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("artifacts[tiny.gguf].digest", "is content"),
        ("artifacts[tiny.gguf].size", "is content"),
        ("name", "is content"),
        ("artifacts", "is content"),
        ("artifacts[other.gguf].urls", "no artifact"),
        ("smoke.promt", "did you mean 'prompt'?"),
        ("gpu_memmory", "did you mean 'gpu_memory'?"),
        ("smoke..prompt", "no place in a model"),
        ("[0]", "no place in a model"),
        ("smoke.prompt.deep", "nodes would ignore"),
        ("", "no place in a model"),
    ],
)
def test_content_and_places_that_are_none_are_refused(ready: Terminal, place: str, said: str) -> None:
    before = ready.bytes("snapshot.json")
    ready("snapshot edit snapshot.json tiny:v1 --set", f"{place}=1", code=1)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("tiny:v1", 64, "nothing to change"),
        ("tiny:v9 --prompt x", 1, "lists no model"),
        ("tiny:v1 --engine-version nonsense", 1, "nodes would refuse"),
        ("tiny:v1 --expect-regex (", 1, "regular expression"),
        ("tiny:v1 --set smoke.prompt=Hello", 64, "not PLACE=JSON"),
        ("tiny:v1 --set gpu_memory=-1", 1, "nodes would refuse"),
        ("tiny:v1 --expect-token-ids 1,x", 64, "not a list of token ids"),
        ("tiny:v1 --url ftp://h.example.org/x", 1, "scheme"),
    ],
)
def test_what_nodes_would_refuse_is_not_written(ready: Terminal, line: str, code: int, said: str) -> None:
    before = ready.bytes("snapshot.json")
    ready(f"snapshot edit snapshot.json {line}", code=code)
    assert said in ready.err
    assert ready.bytes("snapshot.json") == before


def test_fields_that_this_version_does_not_know_survive_a_correction(ready: Terminal) -> None:
    outer = json.loads(ready.bytes("snapshot.json"))
    payload = json.loads(dsse.decode_base64(outer["payload"]))
    payload["models"][0] |= {"colour": "red"}
    payload["models"][0]["smoke"] |= {"depth": {"x": 1}}
    (ready.folder / "snapshot.json").write_text(json.dumps(outer | {"payload": b64(json.dumps(payload).encode())}))
    ready("snapshot edit snapshot.json tiny:v1 --prompt Hi")
    kept = json.loads(dsse.decode_base64(json.loads(ready.bytes("snapshot.json"))["payload"]))["models"][0]
    assert (kept["colour"], kept["smoke"]["depth"], kept["smoke"]["prompt"]) == ("red", {"x": 1}, "Hi")


# -- lint ------------------------------------------------------------------------------------------


def findings(ready: Terminal, *more: str, code: int = 0) -> list[str]:
    return [f"{one['level']} {one['text']}" for one in json.loads(ready("snapshot lint snapshot.json --json", *more, code=code))]


def test_lint_says_what_is_probably_wrong(ready: Terminal) -> None:
    assert any("carries no licence file" in one for one in findings(ready))
    ready("snapshot edit snapshot.json tiny:v1 --engine exllama --gpu-memory 900GiB")
    ready("snapshot lint snapshot.json --strict", code=1)


def test_lint_names_an_answer_that_compares_too_little(ready: Terminal) -> None:
    for tokens, sure, finds in ((31, 8, True), (32, 7, True), (32, 8, False)):
        answer = json.dumps({"tokens": [7] * tokens, "sure": [*range(sure)]})
        ready("snapshot edit snapshot.json tiny:v1", "--set", f"smoke.expect.answer={answer}")
        assert any("a broken device may agree" in one for one in findings(ready)) is finds


#: What lint finds: how the snapshot is made so, with which options it is seen, whether it is an error, and what is said.
FOUND = {
    "an engine that nodes have not by default": (["--engine exllama"], "", "warning", "no engine 'exllama' by default"),
    "no template for chat": (["add chat:v1 run.py --engine vllm --task chat"], "", "warning", "it has no chat template"),
    "a program in place of a GGUF file": (["add run:v1 run.py"], "", "error", "no GGUF file by its name"),
    "no licence": ([], "", "warning", "carries no licence file"),
    "more memory than any node has": (["--gpu-memory 900GiB"], "--node nodes", "warning", "no listed node has what it needs: 900"),
    "more bytes than any node's disk has": ([], "--node nodes", "warning", "no listed node has a disk of its size, 13 B"),
    "a secret in a URL": (["--url https://h.example.org/x?token=1"], "", "error", "a signature or a secret"),
    "a branch in a URL": (["--url https://h.example.org/o/r/resolve/main/x.gguf"], "", "warning", "names a branch"),
    "a test that any answer passes": ([], "", "warning", "accepts nearly any answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_lint_finds(ready: Terminal, name: str) -> None:
    edits, options, level, text = FOUND[name]
    (ready.folder / "nodes").mkdir()
    (ready.folder / "nodes" / "small.toml").write_text('memory = "8GiB"\ndisk = 10\n\n[[gpu]]\nmemory = "24GiB"\n')
    (ready.folder / "run.py").write_text("print('hello')")
    for line in edits:
        adds = line.startswith("add ")
        ready(line.replace("add ", "snapshot add snapshot.json ") if adds else f"snapshot edit snapshot.json tiny:v1 {line}")
    found = findings(ready, *options.split(), code=1 if level == "error" else 0)
    assert any(one.startswith(level) and text in one for one in found), found
    for who, code in (("carol", 1 if level == "error" else 0), ("dave", 1 if level == "error" else 0)):
        before = ready.bytes("snapshot.json")
        ready(f"snapshot sign snapshot.json --key {who}.key", code=code)
        assert (ready.bytes("snapshot.json") == before) is (level == "error")
        assert options or text in ready.err
    ready("snapshot sign snapshot.json --key carol.key --no-lint")


def test_lint_fits_a_model_that_a_node_can_hold(ready: Terminal) -> None:
    (ready.folder / "node.toml").write_text('memory = "8GiB"\n')
    ready("snapshot edit snapshot.json tiny:v1 --gpu-memory 0")
    assert not [one for one in findings(ready, "--node", "node.toml") if "no listed node" in one]


def test_lint_finds_a_replaced_model_that_is_not_retired(ready: Terminal) -> None:
    ready("snapshot add snapshot.json tiny:v2 tiny.gguf --url https://models.example.org/2 --replaces tiny:v1")
    ready("snapshot set-state snapshot.json tiny:v1 enabled")
    assert any("it replaces tiny:v1, which stays enabled" in one for one in findings(ready))
    ready("snapshot set-state snapshot.json tiny:v1 retired")
    assert not any("stays enabled" in one for one in findings(ready))
    ready("snapshot remove snapshot.json tiny:v2")
    assert any("no listed model replaces it" in one for one in findings(ready, code=1))


@pytest.mark.parametrize(("template", "task", "said"), [(None, "chat", True), ("{{ x }}", "chat", False), (None, "completion", False)])
def test_lint_reads_whether_a_model_has_a_template_for_chat(ready: Terminal, template: str | None, task: str, said: bool) -> None:
    data = gguf_files.whole(template=template).encode()
    (ready.folder / "chat.gguf").write_bytes(data)
    with HostileServer() as server:
        url = server.on("/chat.gguf", honest(data))
        ready(f"snapshot add snapshot.json chat:v1 chat.gguf --url {url} --task {task} --gpu-memory 0")
        assert ("it has no chat template" in ready.err) is said
        assert any("it has no chat template" in one for one in findings(ready, "--online", code=1)) is said
        ready("snapshot edit snapshot.json chat:v1 --set", 'artifacts[chat.gguf].role="template"')
        assert not any("it has no chat template" in one for one in findings(ready, "--online", code=1))


def test_a_program_is_not_added_for_a_model_without_a_word(ready: Terminal) -> None:
    (ready.folder / "run.py").write_text("print('hello')")
    ready("snapshot add snapshot.json evil:v1 run.py --url https://models.example.org/run.py")
    assert "run.py is no GGUF file, and the engine llama-cpp loads nothing else" in ready.err
    ready("snapshot sign snapshot.json --key carol.key", code=1)
    assert "--no-lint signs it all the same" in ready.err


def test_a_new_list_begins_with_what_an_old_one_has(ready: Terminal) -> None:
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    before = ready.bytes("snapshot.json")
    ready("snapshot new next.json --from snapshot.json")
    assert "snapshot 2 of testnet, 1 model from snapshot.json" in ready.out
    old, new = (snapshots.open_(ready.bytes(name)) for name in ("snapshot.json", "next.json"))
    assert (new.version, new.models, new.network) == (2, old.models, "testnet")
    assert new.expires_at - new.issued_at == old.expires_at - old.issued_at
    assert ready.json("snapshot inspect next.json")["signatures"] == []
    ready("snapshot new staging.json --from next.json --network staging --expires 7d --fallback https://m.example.org/{algorithm}/{hex}")
    staging = snapshots.open_(ready.bytes("staging.json"))
    assert (staging.network, staging.version, staging.models) == ("staging", 1, old.models)
    assert (staging.expires_at - staging.issued_at).days == 7
    assert staging.sources.fallback == ("https://m.example.org/{algorithm}/{hex}",)
    ready("snapshot new next.json --from snapshot.json", code=1)
    ready("snapshot new other.json", code=64)
    ready("snapshot new high.json --from snapshot.json --version 90")
    assert snapshots.open_(ready.bytes("high.json")).version == 90
    assert ready.bytes("snapshot.json") == before


def test_fields_that_this_version_does_not_know_are_in_the_new_list_too(ready: Terminal) -> None:
    outer = json.loads(ready.bytes("snapshot.json"))
    payload = json.loads(dsse.decode_base64(outer["payload"])) | {"terms": {"x": [1]}}
    (ready.folder / "snapshot.json").write_text(json.dumps(outer | {"payload": b64(json.dumps(payload).encode())}))
    ready("snapshot new next.json --from snapshot.json")
    assert json.loads(dsse.decode_base64(json.loads(ready.bytes("next.json"))["payload"]))["terms"] == {"x": [1]}


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Signature=1&X-Amz-Credential=2",
        "Signature=1&Key-Pair-Id=2",
        "sig=1&se=2",
        "X-Goog-Signature=1",
        "token=1",
        "access_token=1",
        "api_key=1",
    ],
)
def test_a_signature_in_a_url_is_neither_added_nor_passed_over(ready: Terminal, query: str) -> None:
    before = ready.bytes("snapshot.json")
    secret = f"https://h.example.org/x.gguf?{query}"
    for arguments in ((secret,), ("tiny.gguf", "--url", secret)):
        ready("snapshot add snapshot.json tiny:v2", *arguments, code=1)
        assert "a signature or a secret" in ready.err
        assert query not in ready.err
    assert ready.bytes("snapshot.json") == before
    ready("snapshot edit snapshot.json tiny:v1 --url", secret)
    assert any("a signature or a secret" in one for one in findings(ready, code=1))


def test_lint_asks_every_url(ready: Terminal, tmp_path: Path) -> None:
    with HostileServer() as server:
        good, gone, other = (
            server.on("/a", honest(b"a small model")),
            server.on("/b", status(404)),
            server.on("/c", honest(b"a SMALL model")),
        )
        ready("snapshot edit snapshot.json tiny:v1", *(word for url in (good, gone, other) for word in ("--url", url)))
        found = findings(ready, "--online", code=1)
        assert [one for one in found if "/b: " in one and "404" in one]
        assert not [one for one in found if "/a" in one or "/c" in one]
        found = findings(ready, "--digests", code=1)
        assert [one for one in found if "/c gives sha256:" in one]
        assert not [one for one in found if "/a" in one]


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_keeps_its_layout(ready: Terminal) -> None:
    folder = ready.folder / "embed"
    for name in ("model.gguf", "1_Pooling/config.json", "a b/ü.txt", ".git/HEAD", ".gitattributes", "empty"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "empty" else name.encode())
    ready("snapshot add snapshot.json embed:v1 embed --exclude *.txt --url https://h.example.org/e/{path} --task embedding")
    found = next(one for one in snapshots.open_(ready.bytes("snapshot.json")).models if one.name == "embed")
    assert {one.path: one.urls for one in found.artifacts} == {
        path: (f"https://h.example.org/e/{path}",) for path in ("model.gguf", "1_Pooling/config.json", "empty")
    }
    assert "left out: .git, .gitattributes" in ready.err
    ready("snapshot add snapshot.json embed:v2 embed --include a* --entrypoint", "a b/ü.txt", "--url", "https://h.example.org/e/{path}")
    assert 'urls: ["https://h.example.org/e/a%20b/%C3%BC.txt"]' in ready("snapshot inspect snapshot.json --full")


@pytest.mark.parametrize("kind", ["fifo", "folder link", "dangling link", "bad name", "empty folder"])
def test_what_nodes_would_refuse_of_a_folder_is_refused_here(ready: Terminal, kind: str) -> None:
    import os

    folder = ready.folder / "odd"
    folder.mkdir()
    match kind:
        case "fifo":
            os.mkfifo(folder / "pipe")
        case "folder link":
            (folder / "loop").symlink_to("..")
        case "dangling link":
            (folder / "gone").symlink_to("nowhere")
        case "bad name":
            (folder / "a\\b").write_bytes(b"x")
        case _:
            pass
    before = ready.bytes("snapshot.json")
    ready("snapshot add snapshot.json odd:v1 odd", code=1)
    assert ready.bytes("snapshot.json") == before
