"""From an S3 bucket to ``active``: moto's server answers, botocore signs, and no signature and no secret is kept anywhere."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from reconciler.fetch import bucket, sources
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Want
from reconciler.publish import snapshots
from tests.functional.test_add_from_a_hub import CPU, publish
from tests.node import Node, run, tiny

moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")
pytest.importorskip("botocore", reason="the extra s3 is not installed")

SECRET = "wJalrXUtnFEMI-SECRET"
KEY = "AKIDEXAMPLE"


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint with the bucket ``models``, in the environment as AWS tools read it."""
    served = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()
    client = bucket.client()
    client.create_bucket(Bucket="models")
    for key, data in {"tiny/model.gguf": tiny("s3"), "tiny/conf/a b.json": b"{}", "tiny/empty": b""}.items():
        client.put_object(Bucket="models", Key=key, Body=data)
    monkeypatch.chdir(tmp_path)
    assert run("snapshot", "new", "list.json", "--network", "testnet").code == 0
    yield served.get_host_and_port()[0]
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST"))  # else the next server has it all
    served.stop()
    bucket._client.cache_clear()


@pytest.mark.usefixtures("s3")
def test_a_prefix_of_a_bucket_goes_to_active_and_nothing_secret_is_kept(tmp_path: Path, server: Server) -> None:
    ran = run("snapshot", "add", "list.json", "tiny:v1", "s3://models/tiny/", *CPU)
    assert ran.code == 0, ran
    (model,) = snapshots.open_((tmp_path / "list.json").read_bytes()).models
    assert {one.path: one.urls for one in model.artifacts} == {
        "model.gguf": ("s3://models/tiny/model.gguf",), "conf/a b.json": ("s3://models/tiny/conf/a%20b.json",), "empty": ("s3://models/tiny/empty",),
    }  # fmt: skip
    node = Node(tmp_path / "node", server)
    publish(node, tmp_path)
    assert node.run("apply").code == 0
    assert node.active() == ["tiny:v1"]
    kept = [path.read_bytes() for path in (tmp_path / "node").rglob("*") if path.is_file()]
    assert not [data for data in kept if SECRET.encode() in data or b"X-Amz-Signature" in data or KEY.encode() in data]


@pytest.mark.usefixtures("s3")
def test_a_bucket_with_more_objects_than_a_model_has_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reconciler.publish.sources.bucket._MOST_OBJECTS", 2)
    ran = run("snapshot", "add", "list.json", "x:v1", "s3://models/")
    assert ran.code == 1
    assert "hint: name a longer prefix, or objects" in ran.err
    assert run("snapshot", "add", "list.json", "x:v1", "s3://models/tiny/model.gguf", *CPU).code == 0


@pytest.mark.usefixtures("s3")
def test_one_object(tmp_path: Path) -> None:
    assert run("snapshot", "add", "list.json", "tiny:v1", "s3://models/tiny/model.gguf", *CPU).code == 0
    assert run("snapshot", "lint", "list.json", "--online", "--digests").code == 0
    for source, said in (("s3://models/none/", "no file is left"), ("s3://missing/x/", "cannot be listed"), ("s3://models/gone", "404")):
        ran = run("snapshot", "add", "list.json", "x:v1", source)
        assert ran.code == 1
        assert said in ran.err
        assert SECRET not in ran.err


def test_a_node_without_credentials_says_so(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket._client.cache_clear()
    node = Node(tmp_path / "node", server)
    node.publish(node.item("a:v1", tiny("a"), urls=["s3://models/a.gguf"]))
    ran = node.run("apply")
    assert ran.code == 3
    assert "no signed URL can be made for it" in ran.out
    bucket._client.cache_clear()


def test_a_bucket_is_no_host_and_allowed_hosts_hold_for_its_endpoint() -> None:
    want = Want(digest="sha256:" + "ab" * 32, size=1, sources=("s3://169.254.169.254/latest",))
    rules = sources.rules([want], FetchSettings())
    assert rules.hosts == frozenset()
    assert "s3.example" in (rules.naming("https://s3.example/x").hosts or ())
    assert sources.rules([want], FetchSettings(allowed_hosts=("a.example",))).naming("https://s3.example/x").hosts == frozenset(
        {"a.example"}
    )
