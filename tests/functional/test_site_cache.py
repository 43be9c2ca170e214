"""The site cache of ``deploy/cache``: a real nginx between nodes and their origin, cold, warm, lying, dead, and dying in the middle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.demo.server import Server
from tests.hostile_server import HostileServer, honest
from tests.llama_server import free_port
from tests.node import Node, tiny

pytestmark = pytest.mark.slow

SITE = Path(__file__).resolve().parents[2] / "deploy/cache/nginx.conf"
BIG = tiny("big", width=1024)
NAME = f"/sha256/{hashlib.sha256(BIG).hexdigest()}"
PATIENCE = 60.0


class Cache:
    """nginx with the configuration of ``deploy/cache``, at another port, before another origin, and with its files in *folder*."""

    def __init__(self, folder: Path, origin: str) -> None:
        self.files = folder / "files"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        site = SITE.read_text()
        for old, new in (
            ("listen 8081;", f"listen 127.0.0.1:{self.port};"),
            ("https://models.example.org", origin),
            ("/var/cache/nginx/reconcile", str(self.files)),
        ):
            assert old in site, old
            site = site.replace(old, new)
        user = "user root;\n" if os.getuid() == 0 else ""
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(
            f"{user}pid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}{site}}}\n"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Cache]:
        """Run it, and end it."""
        command = ["nginx", "-p", str(self.folder), "-e", str(self.folder / "start.log"), "-c", str(self.folder / "nginx.conf")]
        with subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.PIPE) as self.process:
            try:
                self._wait()
                yield self
            finally:
                self.stop()

    def stop(self) -> None:
        """End it at once."""
        self.process.terminate()
        self.process.wait(timeout=PATIENCE)

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ConnectionError, urllib.error.URLError):
                self.status("/")
                return
            assert self.process.poll() is None, (self.folder / "start.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)

    def status(self, path: str, method: str = "GET", **headers: str) -> int:
        """Return the status of an answer."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.address + path, method=method, headers=headers), timeout=30) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@pytest.fixture
def origin() -> Iterator[HostileServer]:
    with HostileServer() as running:
        running.on(NAME, honest(BIG))
        yield running


@pytest.fixture
def cache(tmp_path: Path, origin: HostileServer) -> Iterator[Cache]:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path / "cache"
    folder.mkdir()
    with Cache(folder, origin.url("")).running() as running:
        yield running


def new_node(folder: Path, server: Server, cache: Cache, source: str) -> Node:
    """Return a node that asks *cache* first, for a model whose source is *source*."""
    node = Node(folder, server, f'[download]\nmirrors = ["{cache.address}/{{algorithm}}/{{hex}}"]\ntimeout = "5s"\n')
    node.publish(node.item("big:v1", BIG, serve=False, urls=[source]))
    return node


def applying(node: Node) -> subprocess.Popen[str]:
    """Begin an update of *node* in a process of its own."""
    command = [sys.executable, "-m", "reconciler", "apply", "--config", str(node.folder / "reconcile.toml")]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_of_four_nodes_at_once_one_copy_leaves_the_origin(tmp_path: Path, server: Server, cache: Cache, origin: HostileServer) -> None:
    nodes = [new_node(tmp_path / f"node-{number}", server, cache, "http://127.0.0.1:9/nowhere") for number in range(4)]

    for running in [applying(node) for node in nodes]:
        out, _ = running.communicate(timeout=PATIENCE)
        assert running.returncode == 0, out

    assert [node.states() for node in nodes] == [{"big:v1": "active"}] * 4
    assert origin.sent(NAME) <= 1.1 * len(BIG)


def test_a_warm_cache_serves_while_its_origin_is_gone(tmp_path: Path, server: Server, cache: Cache, origin: HostileServer) -> None:
    assert new_node(tmp_path / "first", server, cache, "http://127.0.0.1:9/nowhere").run("apply").code == 0
    sent = origin.sent(NAME)
    origin.on(NAME, lambda it: it.head(503))

    assert new_node(tmp_path / "second", server, cache, "http://127.0.0.1:9/nowhere").run("apply").code == 0
    assert origin.sent(NAME) == sent


def test_nodes_finish_when_the_cache_dies_in_the_middle(tmp_path: Path, server: Server, cache: Cache, origin: HostileServer) -> None:
    origin.on(NAME, honest(BIG, rate=len(BIG) / 4))
    origin.on("/direct", honest(BIG))
    nodes = [new_node(tmp_path / f"node-{number}", server, cache, origin.url("/direct")) for number in range(3)]
    begun = [applying(node) for node in nodes]
    end = time.monotonic() + PATIENCE
    while origin.sent(NAME) < len(BIG) / 4:
        assert time.monotonic() < end
        time.sleep(0.02)
    cache.stop()

    for running in begun:
        out, _ = running.communicate(timeout=PATIENCE)
        assert running.returncode == 0, out
    assert [node.states() for node in nodes] == [{"big:v1": "active"}] * 3
    assert [node.records() for node in nodes] == [[]] * 3


def test_a_cache_that_is_down_or_empty_is_passed_over(tmp_path: Path, server: Server, cache: Cache, origin: HostileServer) -> None:
    origin.on("/direct", honest(BIG))
    origin.on(NAME, lambda it: it.head(404, ("Content-Length", 0)))
    assert new_node(tmp_path / "empty", server, cache, origin.url("/direct")).run("apply").code == 0
    cache.stop()

    assert new_node(tmp_path / "down", server, cache, origin.url("/direct")).run("apply").code == 0


def test_a_damaged_cache_is_named_and_nothing_of_it_is_kept(tmp_path: Path, server: Server, cache: Cache, origin: HostileServer) -> None:
    assert new_node(tmp_path / "first", server, cache, "http://127.0.0.1:9/nowhere").run("apply").code == 0
    for path in (path for path in cache.files.rglob("*") if path.is_file()):
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    origin.on("/direct", honest(BIG))

    node = new_node(tmp_path / "second", server, cache, origin.url("/direct"))

    assert node.run("apply").code == 0
    incidents = node.run("incidents", "--json").json
    assert any(cache.address in str(one) for one in incidents), incidents
    assert (node.store / "active/models/big/v1/big.gguf").read_bytes() == BIG


def test_only_digests_are_asked_for_and_nobodys_credentials_go_further(cache: Cache, origin: HostileServer) -> None:
    for path in ("/", "/index.html", NAME[:-1], f"{NAME}/..", NAME.upper(), "/sha256/../etc/passwd"):
        assert cache.status(path) in {400, 404}, path
    assert cache.status(NAME, method="POST") == 403
    assert not origin.requests

    assert cache.status(f"{NAME}?token=secret", Authorization="Bearer secret", Cookie="a=secret") == 200
    assert origin.requests
    assert "secret" not in re.sub(r"\s", "", str([(exchange.path, exchange.headers) for exchange in origin.requests]))
    before = len(origin.requests)
    assert cache.status(NAME) == 200
    assert len(origin.requests) == before, "a query makes no second copy"
