"""
A download that needs a password, a token or a signature, killed in its middle: no secret is anywhere meanwhile, and the next run goes on.

The registry (CNCF distribution), its token service, and moto's S3 are real. What is looked through, while bytes arrive and after the kill:
each file below the node's folder, aria2's included, and the command lines of all processes.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from reconciler.demo.server import Server
from tests import registry
from tests.functional.test_add_from_a_bucket import KEY, SECRET, s3
from tests.functional.test_add_from_a_hub import CPU, publish
from tests.functional.test_add_from_a_registry import basic, login, push, work
from tests.node import Node, run, tiny
from tests.registry import PAIR

__all__ = ["s3", "work"]

pytest.importorskip("oras", reason="oras is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the pusher's own

TOP = Path(__file__).parents[2]
LARGE = random.Random(7).randbytes(24 << 20)
FILES = {"model.gguf": tiny("secret"), "padding.bin": LARGE}
#: Slow enough that a run can be stopped in its middle.
SLOWLY = '[download]\nlimit = "4MiB"\n'
#: The password itself is a short word; what is sent is this.
BASIC = base64.b64encode(":".join(PAIR).encode())


def leaks(node: Node, secrets: list[bytes]) -> list[str]:
    """Return where one of *secrets* is: files of the node, and command lines."""
    found = []
    for path in node.folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
                found.append(str(path.relative_to(node.folder)))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(secret.decode() in " ".join(process.cmdline()) for secret in secrets):
                found.append(f"command line of {process.name()}")
    return found


def arrived(node: Node) -> int:
    """Return how many bytes the download has put on the disk so far."""
    total = 0
    for path in node.store.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and "blobs" not in path.parts:
                total += path.stat().st_blocks * 512
    return total


def killed_and_resumed(node: Node, secrets: Callable[[], list[bytes]]) -> None:
    """Stop a run with SIGKILL while bytes arrive, look for *secrets* before and after, and let the next run finish."""
    own = (node.folder / "reconcile.toml").read_text().partition("[store]")[2].partition('reserve = "1MiB"\n')[2]
    node.configure(own + SLOWLY)
    command = [sys.executable, str(TOP / "cli.py"), "apply", "--yes", "--config", str(node.folder / "reconcile.toml")]
    log = node.folder.parent / "run.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ)) as process:
        deadline = time.monotonic() + 120
        looked = 0
        while arrived(node) < 10 << 20:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "nothing arrives"
            assert leaks(node, secrets()) == []
            looked += 1
            time.sleep(0.3)  # what arrives tells nobody
        children = psutil.Process(process.pid).children(recursive=True)
        downloaders = [child for child in children if "aria2c" in child.name()]
        assert downloaders, "it is aria2 that downloads"
        process.send_signal(signal.SIGKILL)
    assert looked > 0
    psutil.wait_procs(children, timeout=20)
    assert leaks(node, secrets()) == []
    assert not any(secret in log.read_bytes() for secret in secrets())
    node.configure(own)
    ran = node.run("apply", "--json", "--yes")
    assert ran.code == 0, ran
    progress = [one for one in ran.events if one.get("type") == "fetch-progress" or "resumed" in one]
    assert max(one.get("resumed", 0) for one in progress) > 1 << 20, "the next run goes on where the killed one was"
    assert node.active() == ["tiny:v1"]
    assert leaks(node, secrets()) == []
    for shown in ("status --json", "incidents --json", "history --json", "plan --json"):
        assert not any(secret.decode() in node.run(shown).out for secret in secrets())


def test_a_password_of_a_registry(work: Path, server: Server) -> None:
    with registry.running(work / "registry", "htpasswd") as served:
        push(served, "models/tiny:v1", FILES, work / "files", PAIR)
        login(work, served.address)
        assert run("snapshot", "add", "list.json", "tiny:v1", f"oci://{served.address}/models/tiny:v1", *CPU).code == 0
        node = Node(work / "node", server, basic(work, served.address))
        publish(node, work)
        killed_and_resumed(node, lambda: [BASIC])


def test_a_token_of_a_registrys_service(work: Path, server: Server) -> None:
    with registry.behind_tokens(work, PAIR, lambda unlocked: push(unlocked, "models/tiny:v1", FILES, work / "files")) as (served, service):
        login(work, service.host)
        assert run("snapshot", "add", "list.json", "tiny:v1", f"oci://{served.address}/models/tiny:v1", *CPU).code == 0
        node = Node(work / "node", server, basic(work, service.host))
        publish(node, work)
        killed_and_resumed(node, lambda: [BASIC, *(token.encode() for token in service.given)])
        assert service.given


@pytest.mark.usefixtures("s3")
def test_a_signature_of_a_bucket(tmp_path: Path, server: Server) -> None:
    from reconciler.fetch import bucket

    bucket.client().put_object(Bucket="models", Key="tiny/padding.bin", Body=LARGE)
    assert run("snapshot", "add", "list.json", "tiny:v1", "s3://models/tiny/", *CPU).code == 0
    node = Node(tmp_path / "node", server)
    publish(node, tmp_path)
    killed_and_resumed(node, lambda: [SECRET.encode(), b"X-Amz-Signature", KEY.encode()])
