"""From a real registry to ``active``: pushed with ORAS, added by tag, fetched by nodes with a password, a token, or neither."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reconciler.commands.context import wall_clock
from reconciler.demo.server import Server
from reconciler.publish import snapshots
from tests import registry
from tests.functional.test_add_from_a_hub import CPU, publish
from tests.node import Node, run, tiny
from tests.registry import PAIR, Registry

pytest.importorskip("oras", reason="oras is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the pusher's own


def push(served: Registry, target: str, files: dict[str, bytes], folder: Path, pair: tuple[str, str] | None = None) -> None:
    """Push *files* with ORAS, each with its title."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    script = """
import sys, os, json
sys.modules["rfc3987_syntax"] = None  # jsonschema builds a grammar with it for a second, of which a push has no use
import oras.client
host, target, names, pair = json.loads(sys.argv[1])
client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="basic" if pair else "token")
if pair:
    client.auth.set_basic_auth(*pair)
client.push(target=f"{host}/{target}", files=names, disable_path_validation=True)
"""
    arguments = json.dumps([served.address, target, [f"{name}:application/vnd.test.model" for name in files], pair])
    ran = subprocess.run([sys.executable, "-c", script, arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    assert run("snapshot", "new", "list.json", "--network", "testnet").code == 0
    return tmp_path


def login(work: Path, host: str) -> None:
    """Keep a login as ``docker login`` and ``oras login`` do without a helper."""
    entry = {"auths": {host: {"auth": base64.b64encode(":".join(PAIR).encode()).decode()}}}
    (work / "docker" / "config.json").write_text(json.dumps(entry))


def basic(work: Path, host: str) -> str:
    """Return the settings with which a node has the password of *host*."""
    (work / "pair").write_text(":".join(PAIR))
    (work / "pair").chmod(0o600)
    return f'[download.credentials."{host}"]\nbasic_file = "{work / "pair"}"\n'


MODEL = {"model.gguf": tiny("registry"), "LICENSE": b"terms"}


def test_a_tag_is_pinned_and_goes_to_active(work: Path, server: Server) -> None:
    with registry.running(work / "registry") as served:
        push(served, "models/tiny:v1", MODEL, work / "files")
        ran = run("snapshot", "add", "list.json", "tiny:v1", f"oci://{served.address}/models/tiny:v1", *CPU)
        assert ran.code == 0, ran
        assert "tag v1 is pinned to sha256:" in ran.err
        (model,) = snapshots.open_((work / "list.json").read_bytes()).models
        assert {one.path for one in model.artifacts} == set(MODEL)
        assert all(one.urls == (f"http://{served.address}/v2/models/tiny/blobs/{one.digest}",) for one in model.artifacts)
        node = Node(work / "node", server)
        publish(node, work)
        assert node.run("apply").code == 0
        assert node.active() == ["tiny:v1"]


def test_a_registry_with_passwords(work: Path, server: Server) -> None:
    with registry.running(work / "registry", "htpasswd") as served:
        push(served, "models/tiny:v1", MODEL, work / "files", PAIR)
        source = f"oci://{served.address}/models/tiny:v1"
        assert "401" in run("snapshot", "add", "list.json", "tiny:v1", source, *CPU).err
        login(work, served.address)
        assert run("snapshot", "add", "list.json", "tiny:v1", source, *CPU).code == 0
        node = Node(work / "node", server)
        publish(node, work)
        assert node.run("apply").code == 3
        node.configure(basic(work, served.address))
        assert node.run("apply").code == 0
        assert node.active() == ["tiny:v1"]
        secret = base64.b64encode(":".join(PAIR).encode())
        assert not [path for path in (work / "node").rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.parametrize("pair", [None, PAIR], ids=["anybody", "password"])
def test_a_registry_with_a_token_service(work: Path, server: Server, pair: tuple[str, str] | None) -> None:
    with registry.behind_tokens(work, pair, lambda unlocked: push(unlocked, "models/tiny:v1", MODEL, work / "files")) as (served, service):
        if pair:
            login(work, service.host)
        ran = run("snapshot", "add", "list.json", "tiny:v1", f"oci://{served.address}/models/tiny:v1", *CPU)
        assert ran.code == 0, ran
        node = Node(work / "node", server, basic(work, service.host) if pair else "")
        publish(node, work)
        assert node.run("apply").code == 0
        assert node.active() == ["tiny:v1"]
        assert service.given
        everything = [path.read_bytes() for path in (work / "node").rglob("*") if path.is_file()]
        assert not [token for token in service.given if any(token.encode() in data for data in everything)]


def test_what_changes_in_the_registry_is_refused_by_its_digest(work: Path, server: Server) -> None:
    with registry.running(work / "registry") as served:
        push(served, "models/tiny:v1", MODEL, work / "files")
        assert run("snapshot", "add", "list.json", "tiny:v1", f"oci://{served.address}/models/tiny:v1", *CPU).code == 0
        push(served, "models/tiny:v1", {"model.gguf": tiny("another")}, work / "others")
        node = Node(work / "node", server)
        publish(node, work)
        assert node.run("apply").code == 0
        assert (node.store / "active/models/tiny/v1/model.gguf").read_bytes() == MODEL["model.gguf"]


# -- layouts, from a registry that answers from a table ------------------------------------------


def listing(layers: list[dict[str, Any]], **changes: Any) -> Any:
    from reconciler.publish.sources import registry as source

    document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "layers": layers} | changes
    return source.list_files("oci://r.example/a/b:v1", lambda _url, _headers: json.dumps(document).encode())


def layer(kind: str, title: str = "", digit: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = {"mediaType": kind, "digest": "sha256:" + digit * 64, "size": 7}
    return found | ({"annotations": {"org.opencontainers.image.title": title}} if title else {})


@pytest.mark.parametrize(
    ("made", "path", "unpack"),
    [
        (layer("application/vnd.docker.ai.gguf.v3"), "model.gguf", None),
        (layer("application/vnd.test", "dir/x.gguf"), "dir/x.gguf", None),
        (layer("application/vnd.kitops.modelkit.model.v1.tar+gzip"), "layer-01.tar.gz", "tar.gz"),
        (layer("application/vnd.cncf.model.weight.v1.tar", "w"), "layer-01.tar", "tar"),
        (layer("application/vnd.oci.image.layer.v1.tar+zstd"), "layer-01.tar.zst", "tar.zst"),
        (layer("application/vnd.docker.image.rootfs.diff.tar.gzip"), "layer-01.tar.gz", "tar.gz"),
    ],
)
def test_layouts_of_artifacts(made: dict[str, Any], path: str, unpack: str | None) -> None:
    (file,) = listing([made]).files
    assert (file.path, file.unpack, file.size, file.urls) == (path, unpack, 7, (f"https://r.example/v2/a/b/blobs/{made['digest']}",))


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: listing([]), "no files"),
        (lambda: listing([layer("a", "x"), layer("a", "x", "b")]), "two files of one name"),
        (lambda: listing([layer("a", "x") | {"digest": "sha256:../../x"}]), "no digest"),
        (lambda: listing([layer("a", "x") | {"size": -1}]), "no digest and size"),
        (lambda: listing([], manifests=[layer("a"), layer("a", digit="b")]), "2 manifests"),
        (lambda: listing(1), "no manifest"),  # type: ignore[arg-type]
    ],
)
def test_a_manifest_that_is_none_is_refused(read: Callable[[], Any], said: str) -> None:
    from reconciler.core.errors import PublishError

    with pytest.raises(PublishError, match=said):
        read()


@pytest.mark.parametrize(
    "source",
    [
        "oci://",
        "oci://r.example",
        "oci://r.example/",
        "oci://r.example/A:v1",
        "oci://r.example/a:v 1",
        "oci://u:p@r.example/a:v1",
        "oci://r.example/a@sha256:1",
    ],
)
def test_a_reference_that_is_none_is_refused(source: str) -> None:
    from reconciler.core.errors import PublishError
    from reconciler.publish.sources import registry as source_module

    with pytest.raises(PublishError, match="not of the form"):
        source_module.parse(source)


# -- the snapshot itself -------------------------------------------------------------------------


def test_a_network_needs_nothing_but_a_registry(work: Path, server: Server) -> None:
    (work / "models").mkdir()
    (work / "models" / "model.gguf").write_bytes(tiny("pushed"))
    with registry.running(work / "registry", "htpasswd") as served:
        login(work, served.address)
        target = f"oci://{served.address}/net/models:stable"
        node = Node(work / "node", server, basic(work, served.address))
        text = (node.folder / "reconcile.toml").read_text()
        (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', f'"{target}"'))
        template = f"http://{served.address}/v2/net/models/blobs/{{algorithm}}:{{hex}}"
        assert run("snapshot", "set", "list.json", "--fallback", template).code == 0
        assert run("snapshot", "add", "list.json", "tiny:v1", "models/model.gguf", *CPU).code == 0
        ran = run("snapshot", "push", "list.json", target)
        assert "not signed by enough keys" in ran.err
        for version in (1, 2):
            data = snapshots.sign((work / "list.json").read_bytes(), node.network.snapshot_keys[0].private, now=wall_clock())
            (work / "list.json").write_bytes(data)
            ran = run("snapshot", "push", "list.json", target, "--files", "models")
            assert ran.code == 0, ran
            assert f"pushed snapshot {version} and 1 file" in ran.out
            assert f"--fallback '{template}'" in ran.out
            assert node.run("sync").code == 0
            assert node.run("sync").code == 0
            assert node.active() == ["tiny:v1"]
            assert f'"version": {version}' in node.run("status", "--json").out
            assert run("snapshot", "set", "list.json", "--expires", "60d").code == 0


def test_a_registry_without_a_snapshot_is_a_network_that_does_not_answer(work: Path, server: Server) -> None:
    with registry.running(work / "registry") as served:
        push(served, "net/models:stable", MODEL, work / "files")
        node = Node(work / "node", server)
        text = (node.folder / "reconcile.toml").read_text()
        for tag, said in (("stable", "no file matches 'snapshot.json'"), ("none", "404")):
            (node.folder / "reconcile.toml").write_text(text.replace('"published.json"', f'"oci://{served.address}/net/models:{tag}"'))
            ran = node.run("lock")
            assert ran.code == 1
            assert said in ran.err
