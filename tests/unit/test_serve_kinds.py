"""What each kind of server is given to read, read back by a parser of its format."""

from __future__ import annotations

import configparser
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reconciler.serve import drain, llama_server
from reconciler.serve.content import Content, Server
from reconciler.serve.kinds import KINDS
from reconciler.serve.served_model import ServedModel
from reconciler.store.index import IndexFile

TREE = "sha256:" + "ab" * 32


def file(path: str, role: str = "model", name: str = "sha256:" + "cd" * 32) -> IndexFile:
    return IndexFile(path=path, role=role, digest=name, size=7, tested=True)


def model(name: str = "tiny:v1", *files: IndexFile, current: bool = True, tasks: tuple[str, ...] = ("chat",)) -> ServedModel:
    bare, _, version = name.partition(":")
    files = files or (file("tiny.gguf"),)
    return ServedModel(
        id=name, name=bare, version=version, current=current, tasks=tasks, folder=f"/store/trees/{bare}-{version}", tree=TREE,
        entrypoint=files[0].path, files=files, architecture="llama", quantization="Q4_K_M", parameters=1_500_000,
    )  # fmt: skip


def made(kind: str, *models: ServedModel, **options: Any) -> Content:
    assert KINDS[kind].check_options(options) == ""
    return KINDS[kind].content(Server(name="main", kind=kind, path=Path("/x"), options=options), models)


def only(content: Content) -> str:
    (entry,) = content.entries
    return entry.data.decode()


def presets(content: Content) -> configparser.RawConfigParser:
    found = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=(";",))
    found.read_string(only(content))
    return found


# -- llama-server


def test_presets_name_the_tree_and_never_active() -> None:
    found = presets(made("llama-server", model()))

    assert found.sections() == ["tiny"]
    assert dict(found["tiny"]) == {"alias": "tiny:v1", "model": "/store/trees/tiny-v1/tiny.gguf", "tags": "tiny:v1"}


def test_no_section_has_a_colon_which_llama_server_would_change() -> None:
    content = made("llama-server", model("tiny:v1", current=False), model("tiny:v2"))

    assert presets(content).sections() == ["tiny@v1", "tiny"]
    assert content.names == ("tiny@v1", "tiny")


def test_each_file_is_passed_on_by_its_role() -> None:
    whole = model(
        "tiny:v1", file("m-00001-of-00002.gguf"), file("m-00002-of-00002.gguf", "split"), file("mmproj.gguf", "mmproj"),
        file("a.gguf", "lora"), file("b.gguf", "lora"), file("draft.gguf", "draft"), file("chat.jinja", "template"),
        file("LICENSE", "licence"),
    )  # fmt: skip
    found = dict(presets(made("llama-server", whole))["tiny"])

    assert found["model"].endswith("/m-00001-of-00002.gguf")
    assert found["mmproj"].endswith("/mmproj.gguf")
    assert found["lora"] == "/store/trees/tiny-v1/a.gguf,/store/trees/tiny-v1/b.gguf"
    assert found["model-draft"].endswith("/draft.gguf")
    assert found["chat-template-file"].endswith("/chat.jinja")
    assert "LICENSE" not in str(found)


def test_an_embedding_model_is_served_as_one() -> None:
    assert presets(made("llama-server", model(tasks=("embedding",))))["tiny"]["embeddings"] == "true"


def test_options_are_for_all_models_or_for_the_one_that_they_name() -> None:
    found = presets(made("llama-server", model(), model("other:v1"), **{"ctx-size": 4096, "jinja": True, "tiny": {"n-gpu-layers": 9}}))

    assert dict(found["*"]) == {"ctx-size": "4096", "jinja": "true"}
    assert found["tiny"]["n-gpu-layers"] == "9"
    assert "n-gpu-layers" not in found["other"]


@pytest.mark.parametrize("path", ["a;b.gguf", "a#b.gguf"])
def test_a_path_that_presets_cannot_say_leaves_out_that_model_alone(path: str) -> None:
    content = made("llama-server", model("odd:v1", file(path)), model())

    assert presets(content).sections() == ["tiny"]
    assert len(content.left_out) == 1
    assert content.left_out[0].startswith("odd:v1: ")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model": "x"}, "'model' is written by reconcile"),
        ({"tiny": {"hf-repo": "x"}}, "'hf-repo' is written by reconcile"),
        ({"a b": 1}, "'a b' is no argument"),
        ({"c": "x\n[evil]"}, "'c' is neither"),
        ({"c": "x # y"}, "'c' is neither"),
        ({"c": [1]}, "'c' is neither"),
    ],
)
def test_options_that_would_break_out_of_the_file_are_refused(options: dict[str, Any], fault: str) -> None:
    assert KINDS["llama-server"].check_options(options).startswith(fault)


def test_only_sections_that_differ_count_as_changed() -> None:
    before = llama_server.sections(only(made("llama-server", model(), model("other:v1"), model("gone:v1"))))
    after = llama_server.sections(only(made("llama-server", model(), model("other:v2"), model("new:v1"))))
    changed = drain.changed_sections(before, after, is_known=True)

    assert [name for name in ("tiny", "other", "gone", "new", "cached") if changed(name)] == ["other", "gone", "new"]
    assert all(map(drain.changed_sections(before, after, is_known=False), ("tiny", "other", "cached")))


def test_another_option_for_all_models_changes_every_section() -> None:
    before = llama_server.sections(only(made("llama-server", model(), c=1)))
    after = llama_server.sections(only(made("llama-server", model(), c=2)))

    assert drain.changed_sections(before, after, is_known=True)("tiny")


def test_another_id_with_the_same_files_changes_the_section_since_aliases_of_what_runs_are_not_read_again() -> None:
    first, second = model(), model("tiny:v2")
    texts = [only(made("llama-server", one)).replace(one.folder, "/same") for one in (first, second)]
    before, after = map(llama_server.sections, texts)

    assert drain.changed_sections(before, after, is_known=True)("tiny")


# -- llama-swap


def test_llama_swap_gets_a_command_line_for_each_model() -> None:
    found = yaml.safe_load(only(made("llama-swap", model(), model("tiny:v0", current=False), healthCheckTimeout=60)))

    assert found["healthCheckTimeout"] == 60
    assert found["models"]["tiny:v1"] == {
        "cmd": "llama-server --host 127.0.0.1 --port ${PORT} --model /store/trees/tiny-v1/tiny.gguf",
        "aliases": ["tiny"],
    }
    assert "aliases" not in found["models"]["tiny:v0"]


def test_a_command_line_is_quoted_and_each_models_own_options_are_merged() -> None:
    spaced = model("tiny:v1", file("a b'c.gguf"))
    found = yaml.safe_load(only(made("llama-swap", spaced, cmd="serve {model} as {id} in {folder}", tiny={"ttl": 60})))

    assert found["models"]["tiny:v1"]["cmd"] == "serve '/store/trees/tiny-v1/a b'\"'\"'c.gguf' as tiny:v1 in /store/trees/tiny-v1"
    assert found["models"]["tiny:v1"]["ttl"] == 60


def test_what_llama_swap_would_read_as_a_macro_is_left_out() -> None:
    content = made("llama-swap", model("odd:v1", file("${env.HOME}.gguf")), model())

    assert content.names == ("tiny:v1",)
    assert content.left_out[0].startswith("odd:v1: ")
    assert KINDS["llama-swap"].check_options({"cmd": "serve nothing"}) != ""


# -- llama-cpp-python


def test_llama_cpp_python_gets_an_entry_for_each_name_that_clients_use() -> None:
    content = made(
        "llama-cpp-python", model(), model("e:v1", current=False, tasks=("embedding",)), host="127.0.0.1", n_ctx=512, tiny={"seed": 1}
    )
    found = json.loads(only(content))

    assert found["host"] == "127.0.0.1"
    assert [entry["model_alias"] for entry in found["models"]] == ["tiny", "tiny:v1", "e:v1"]
    assert found["models"][0] == {"n_ctx": 512, "model": "/store/trees/tiny-v1/tiny.gguf", "model_alias": "tiny", "seed": 1}
    assert found["models"][2]["embedding"] is True


@pytest.mark.parametrize("options", [{"models": []}, {"model": "x"}, {"tiny": {"model_alias": "x"}}])
def test_options_that_would_replace_a_tested_file_are_refused(options: dict[str, Any]) -> None:
    assert KINDS["llama-cpp-python"].check_options(options) != ""


# -- hf-cache


def test_a_hub_cache_is_one_link_to_the_tree_and_references_to_it() -> None:
    content = made("hf-cache", model("tiny:v1", current=False), model("tiny:v2"), namespace="net")
    entries = {entry.path: entry.target or entry.data.decode() for entry in content.entries}
    commit = TREE[7:47]

    assert entries == {
        f"models--net--tiny/snapshots/{commit}": "/store/trees/tiny-v2",
        "models--net--tiny/refs/v1": commit,
        "models--net--tiny/refs/v2": commit,
        "models--net--tiny/refs/main": commit,
    }
    assert [bool(entry.target) for entry in content.entries] == [True, False, False, False], "references come last"


@pytest.mark.parametrize("options", [{"namespace": "../x"}, {"namespace": "a--b"}, {"namespace": 1}, {"name": "x"}])
def test_a_namespace_that_is_none_is_refused(options: dict[str, Any]) -> None:
    assert KINDS["hf-cache"].check_options(options) != ""


# -- ollama


def test_ollama_gets_manifests_whose_blobs_are_there() -> None:
    content = made("ollama", model("tiny:v1", file("tiny.gguf"), file("p.gguf", "mmproj", "sha256:" + "ef" * 32)), tiny={"num_ctx": 64})
    entries = {entry.path: entry for entry in content.entries}
    manifest = json.loads(entries["manifests/registry.ollama.ai/library/tiny/latest"].data)

    assert entries["manifests/registry.ollama.ai/library/tiny/v1"].data == entries["manifests/registry.ollama.ai/library/tiny/latest"].data
    assert [layer["mediaType"].rpartition(".")[2] for layer in manifest["layers"]] == ["model", "projector", "params"]
    for layer in (manifest["config"], *manifest["layers"]):
        blob = entries[f"blobs/{layer['digest'].replace(':', '-')}"]
        if blob.data:
            assert layer == layer | {"digest": f"sha256:{hashlib.sha256(blob.data).hexdigest()}", "size": len(blob.data)}
        else:
            assert blob.target.startswith("/store/trees/tiny-v1/")
    assert json.loads(entries[f"blobs/{manifest['config']['digest'].replace(':', '-')}"].data)["model_type"] == "1.50M"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((file("tiny.gguf", name="blake3:" + "ab" * 32),), "SHA-256"),
        ((file("config.json"),), "no GGUF"),
        ((file("m-00001-of-00002.gguf"), file("m-00002-of-00002.gguf", "split")), "split"),
    ],
)
def test_what_ollama_cannot_serve_is_left_out_with_the_reason(files: tuple[IndexFile, ...], why: str) -> None:
    content = made("ollama", model("odd:v1", *files), model())

    assert why in content.left_out[0]
    assert not any("/odd/" in entry.path for entry in content.entries)
    assert any("/tiny/" in entry.path for entry in content.entries)


# -- all


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_same_models_give_the_same_bytes_and_none_give_something_readable(kind: str) -> None:
    assert made(kind, model(), model("b:v1")) == made(kind, model(), model("b:v1"))
    assert made(kind).left_out == ()
