"""What ``doctor`` sees of a server's network, on real processes; and that one without a route cannot call out."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.commands import serve_check
from reconciler.serve.content import Server
from tests.demand import needs_bubblewrap
from tests.node import Node, tiny

_CALL_OUT = """
import socket, sys
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(error.errno)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def isolated() -> Iterator[subprocess.Popen[str]]:
    """A process in a network namespace of its own, which says what it met when it called out."""
    bwrap = needs_bubblewrap()
    words = [str(bwrap), "--unshare-net", "--ro-bind", "/", "/", "--dev", "/dev", "--", sys.executable, "-c", _CALL_OUT]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def test_a_process_in_a_namespace_of_its_own_cannot_call_out_and_doctor_sees_it(isolated: subprocess.Popen[str]) -> None:
    import errno

    import psutil

    assert isolated.stdout is not None
    assert [isolated.stdout.readline().strip() for _ in range(2)] == [str(errno.ENETUNREACH), "ready"]
    (child,) = psutil.Process(isolated.pid).children()
    assert not serve_check._has_route(child.pid)


def server_at(address: str) -> Server:
    return Server(name="main", kind="http", reload=address)


def test_doctor_finds_the_process_behind_an_address(tmp_path: Path) -> None:
    code = "import http.server as h, sys; h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.BaseHTTPRequestHandler).serve_forever()"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", code, str(port)])
    try:
        until = time.monotonic() + 30
        while serve_check._listener(port) is None and time.monotonic() < until:
            time.sleep(0.02)
        (finding,) = serve_check.network_access((server_at(f"http://127.0.0.1:{port}/"),))
    finally:
        process.kill()
        process.wait()

    assert f"process {process.pid}" in finding.text
    assert finding.level == ("warning" if serve_check._has_route(1) or serve_check._has_route(process.pid) else "ok")
    assert [finding.level for finding in serve_check.network_access((server_at(f"http://127.0.0.1:{port}/"),))] == ["ok"], (
        "nothing listens any more"
    )


def test_a_server_on_another_machine_is_not_looked_at() -> None:
    assert list(serve_check.network_access((server_at("http://192.0.2.1:80/"), server_at("http://router.example.org/")))) == []


def test_doctor_names_a_server_that_was_never_told(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
    node.configure('[[serve]]\nkind = "llama-swap"\nname = "swap"\npath = "serve/swap.yaml"\n')

    assert "server swap: has generation 0, active is 1: not reloaded yet" in node.run("doctor", "--offline").out
    assert "server swap has generation none: not reloaded yet" in node.run("status").out
