"""What is written for servers is read by the programs that it is written for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.llama_server import eventually, free_port
from tests.network import Document
from tests.node import Node, tiny

pytestmark = pytest.mark.slow


# -- llama-cpp-python


@contextmanager
def python_server(config: Path, port: int) -> Iterator[str]:
    words = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--config_file", str(config)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: urllib.request.urlopen(f"{address}/v1/models", timeout=5).status, "llama_cpp.server answers")
        yield address
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: Document | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        return json.loads(answer.read())


def test_the_server_of_llama_cpp_python_serves_the_active_set(node: Node) -> None:
    port = free_port()
    options = f'options = {{ host = "127.0.0.1", port = {port}, n_ctx = 256, "b" = {{ seed = 7 }} }}'
    node.configure(f'[[serve]]\nkind = "llama-cpp-python"\nname = "python"\npath = "serve/models.json"\n{options}\n')
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0

    with python_server(node.folder / "serve" / "models.json", port) as address:
        assert sorted(model["id"] for model in ask(f"{address}/v1/models")["data"]) == ["a", "a:v1", "b", "b:v1"]
        texts = {}
        for name in ("a", "a:v1", "b"):
            answer = ask(f"{address}/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 4, "temperature": 0})
            texts[name] = answer["choices"][0]["text"]
        assert texts["a"] == texts["a:v1"] != texts["b"]


# -- libraries of Hugging Face


def hub_python() -> Path:
    """Return a Python that has transformers: ``$HUB_PYTHON``, else this one; skip where neither has."""
    for found in (os.environ.get("HUB_PYTHON"), sys.executable):
        if found and subprocess.run([found, "-c", "import transformers, huggingface_hub"], capture_output=True).returncode == 0:
            return Path(found)
    pytest.skip("transformers is not installed: name a Python that has it as $HUB_PYTHON")


_TOKENIZER: Document = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"hello": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}  # fmt: skip


def hub_folder(node: Node, name: str, width: int) -> Document:
    """Return a model in the layout of the hub whose files are real, beside one that the engine can test."""
    config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    made = node.item(name, tiny(name))
    for path, content in (
        ("config.json", config),
        ("tokenizer.json", _TOKENIZER),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        data = json.dumps(content).encode()
        extra = node.item(name, data, path=path)["artifacts"]
        made["artifacts"] += extra
    return made


_FROM_PRETRAINED = """
import json, sys
from huggingface_hub import scan_cache_dir, snapshot_download
from transformers import AutoConfig, AutoTokenizer
found = {}
for repository, revision in (("net/a", None), ("net/a", "v1"), ("net/a", "v2")):
    try:
        config = AutoConfig.from_pretrained(repository, revision=revision)
        tokens = AutoTokenizer.from_pretrained(repository, revision=revision)("hello hello")["input_ids"]
        found[str(revision)] = [config.hidden_size, tokens, snapshot_download(repository, revision=revision)]
    except Exception as error:
        found[str(revision)] = type(error).__name__
cache = scan_cache_dir()
found["repositories"] = sorted(repository.repo_id for repository in cache.repos)
found["warnings"] = [str(warning) for warning in cache.warnings]
print(json.dumps(found))
"""


def from_pretrained(python: Path, cache: Path) -> Any:
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache / "home"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    ran = subprocess.run([python, "-W", "ignore", "-c", _FROM_PRETRAINED], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(cache / "home", ignore_errors=True)
    return json.loads(ran.stdout)


def test_from_pretrained_finds_the_active_versions_offline_and_no_other(node: Node) -> None:
    python = hub_python()
    node.configure('[[serve]]\nkind = "hf-cache"\nname = "hub"\npath = "serve/hub"\noptions = { namespace = "net" }\n')
    node.publish(hub_folder(node, "a:v1", 32))
    assert node.run("apply").code == 0
    found = from_pretrained(python, node.folder / "serve" / "hub")
    assert found["None"][:2] == found["v1"][:2] == [32, [0, 0]]
    assert found["v2"] != found["v1"]
    assert isinstance(found["v2"], str)
    assert (found["repositories"], found["warnings"]) == (["net/a"], [])

    node.publish(hub_folder(node, "a:v2", 64))
    assert node.run("apply").code == 0
    found = from_pretrained(python, node.folder / "serve" / "hub")
    assert found["None"][:2] == found["v2"][:2] == [64, [0, 0]]
    assert isinstance(found["v1"], str)
    (model,) = node.index()["models"]
    assert Path(found["v2"][2]).resolve() == (node.store / model["resolved"]).resolve()
