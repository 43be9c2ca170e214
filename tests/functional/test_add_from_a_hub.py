"""From a hub to ``active``: the hub's real client on the operator's side, a node with default settings on the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.publish import snapshots
from tests import model_files
from tests.hub import SIGNATURE, Hub, Repository
from tests.node import Node, run, tiny

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

TOP = Path(__file__).parents[2]
#: No GPU is needed: the header of a model makes an estimate otherwise.
CPU = ("--gpu-memory", "0")
TOKEN = "hf_SECRETofTheHub"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(TOKEN) as running:
        yield running


def operator(folder: Path, hub: Hub, *arguments: str, token: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one command of the operator in a process of its own: the hub's client reads its environment once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = clean | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HOME": str(folder)} | ({"HF_TOKEN": token} if token else {})
    ran = subprocess.run(
        [sys.executable, str(TOP / "cli.py"), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


def new(folder: Path, hub: Hub) -> None:
    folder.mkdir(exist_ok=True)
    operator(folder, hub, "snapshot", "new", "list.json", "--network", "testnet")


def publish(node: Node, folder: Path) -> None:
    """Sign what the operator made, and lock it on *node*."""
    data = (folder / "list.json").read_bytes()
    key = node.network.snapshot_keys[0].private
    from reconciler.commands.context import wall_clock

    (node.folder / "published.json").write_bytes(snapshots.sign(data, key, now=wall_clock()))
    ran = node.run("lock")
    assert ran.code == 0, ran


def files_of(count: int) -> dict[str, bytes]:
    """Return an embedding model of *count* files: weights in large-file storage, and small ones beside and in folders."""
    small = ["config.json", "tokenizer.json", "1_Pooling/config.json", "modules.json", "README.md", "vocab.txt", "2_Normalize/config.json"]
    names = [*small, *(f"extra/part {index}.json" for index in range(count))][: count - 1]
    return {name: json.dumps({"name": name}).encode() for name in names} | {"model.gguf": tiny("hub", "embedding")}


def test_a_model_of_13_files_goes_from_the_hub_to_active(tmp_path: Path, hub: Hub, server: Server) -> None:
    hub.repositories["org/embed"] = Repository(files_of(13))
    new(tmp_path / "work", hub)
    ran = operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "embed:v1", "hf://org/embed", *CPU)
    assert f"org/embed: its default branch is pinned to commit {'c' * 40}" in ran.stderr
    assert "licence apache-2.0" in ran.stderr
    assert "127.0.0.1 redirects, and nodes may follow: localhost" in ran.stderr
    found = snapshots.open_((tmp_path / "work" / "list.json").read_bytes())
    (model,) = found.models
    assert {one.path for one in model.artifacts} == set(files_of(13))
    assert all(f"/resolve/{'c' * 40}/" in one.urls[0] and "?" not in one.urls[0] for one in model.artifacts)
    node = Node(tmp_path / "node", server)
    publish(node, tmp_path / "work")
    assert node.run("apply").code == 0
    assert node.active() == ["embed:v1"]
    tree = node.store / "active" / "models" / "embed" / "v1"
    assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == set(files_of(13))
    for path in (node.folder / "models.lock", node.folder / "snapshot.json"):
        assert SIGNATURE.encode() not in path.read_bytes()


def test_a_split_model_goes_from_the_hub_to_active(tmp_path: Path, hub: Hub, server: Server) -> None:
    parts = model_files.split("hub-split")
    hub.repositories["org/big"] = Repository({f"Q4/{name}": data for name, data in parts.items()} | {"Q8/big.gguf": tiny("other")})
    new(tmp_path / "work", hub)
    refused = operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "big:v1", "hf://org/big/Q9/*", *CPU, code=1)
    assert "no file matches 'Q9/*'" in refused.stderr
    operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "big:v1", f"hf://org/big@{'c' * 40}/Q4/*", *CPU)
    node = Node(tmp_path / "node", server)
    publish(node, tmp_path / "work")
    assert node.run("apply").code == 0
    assert node.active() == ["big:v1"]


def test_a_gated_model_needs_the_token_and_the_token_never_reaches_the_cdn(tmp_path: Path, hub: Hub, server: Server) -> None:
    hub.repositories["org/gated"] = Repository({"model.gguf": tiny("gated"), "LICENSE": b"terms"}, gated=True)
    new(tmp_path / "work", hub)
    refused = operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "gated:v1", "hf://org/gated", *CPU, code=1)
    assert "401" in refused.stderr
    assert "its server wants a login: `hf auth login` or HF_TOKEN for hf://" in refused.stderr
    ran = operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "gated:v1", "hf://org/gated", *CPU, token=TOKEN)
    assert TOKEN not in ran.stdout + ran.stderr + (tmp_path / "work" / "list.json").read_text()
    node = Node(tmp_path / "node", server)
    publish(node, tmp_path / "work")
    assert node.run("apply").code == 3
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    node.configure(f'[download.credentials."127.0.0.1"]\ntoken_file = "{tmp_path / "token"}"\n')
    assert node.run("apply").code == 0
    assert node.active() == ["gated:v1"]
    assert hub.requests("cdn")
    assert all("authorization" not in one.headers for one in hub.requests("cdn"))
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "token"]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]


def test_a_hub_that_shows_nothing_of_a_gated_model_is_told_from_one_that_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    monkeypatch.chdir(tmp_path)
    assert run("snapshot", "new", "list.json", "--network", "testnet").code == 0
    ran = run("snapshot", "add", "list.json", "x:v1", "hf://org/gated")
    assert ran.code == 1
    assert "hint: accept its terms on the hub, and sign in: `hf auth login`, or HF_TOKEN" in ran.err


def test_what_the_hub_says_is_checked_where_it_can_be(tmp_path: Path, hub: Hub) -> None:
    hub.repositories["org/two"] = Repository({"a.gguf": tiny("a"), "b.gguf": tiny("b")})
    new(tmp_path / "work", hub)
    refused = operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "two:v1", "hf://org/two", *CPU, code=1)
    assert "has 2 GGUF models" in refused.stderr
    assert "name one: hf://org/two/a.gguf" in refused.stderr
    for source, said in (
        ("hf://org/none", "the hub has no org/none"),
        ("hf://org/none", "`hf auth login` signs in, or HF_TOKEN"),
        ("hf://org/two@v9/a.gguf", "no revision 'v9'"),
        ("hf://two", "not of the form"),
        ("hf://org/two/c.gguf", "no file matches"),
    ):
        assert said in operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "x:v1", source, *CPU, code=1).stderr
    operator(tmp_path / "work", hub, "snapshot", "add", "list.json", "a:v1", "hf://org/two@main/a.gguf", "--hash", *CPU)
