"""
The image of ``deploy/Containerfile``, run as its head says: another user, a read-only root, no capability.

``make container`` builds it and names it as ``$RECONCILE_IMAGE``. What stands before the image in ``podman run`` can be added to with
``$RECONCILE_CONTAINER_OPTIONS``. Containers share the network of this machine, whose loopback has the network and its sources. It runs as
an ordinary user, too (rootless): what the image's user owns is then looked at in podman's user namespace.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
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
from tests.processes import until

pytestmark = pytest.mark.slow

PATIENCE = 60.0
USER = 65532
SLOW = tiny("slow", width=512)


def podman(*arguments: str) -> list[str]:
    """Return the command line of podman with *arguments*."""
    return ["podman", *shlex.split(os.environ.get("RECONCILE_CONTAINER_OPTIONS", "")), *arguments]


def as_containers_see(*command: str) -> subprocess.CompletedProcess[str]:
    """Run *command* where users have the numbers that they have in a container."""
    return subprocess.run([*([] if os.geteuid() == 0 else podman("unshare")), *command], capture_output=True, text=True, check=False)


class Contained(Node):
    """A node whose program runs in the image: its settings come in read-only, its state is a folder of the image's user."""

    port: int

    def prepare(self) -> None:
        """Write the settings as the container sees them, and give the state to its user."""
        self.port = free_port()
        self.state = self.folder / "state"
        self.etc = self.folder / "etc"
        self.etc.mkdir()
        self.state.mkdir()
        assert as_containers_see("chown", f"{USER}:{USER}", str(self.state)).returncode == 0
        self.published = self.etc / "snapshot.json"
        (self.etc / "root.json").write_bytes(self.network.root())
        (self.etc / "reconcile.toml").write_text(
            '[network]\nsnapshot = "snapshot.json"\nlockfile = "/var/lib/reconcile/models.lock"\n'
            '[store]\npath = "/var/lib/reconcile/store"\nreserve = "1MiB"\n'
            f'[agent]\ninterval = "10s"\njitter = "0s"\nmetrics_address = "127.0.0.1:{self.port}"\n'
        )

    def list_models(self, *items: dict[str, object]) -> None:
        """Sign the next snapshot where the container finds it."""
        self.published.write_bytes(self.network.snapshot(*items))

    def command(self, *arguments: str, name: str = "") -> list[str]:
        """Return the command that runs *arguments* in the image."""
        named = ["--name", name] if name else []
        return [
            *podman("run", "--rm", "--network", "host", "--read-only", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "all"),
            *("--security-opt", "no-new-privileges", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", *named),
            *("-v", f"{self.etc}:/etc/reconcile:ro", "-v", f"{self.state}:/var/lib/reconcile", os.environ["RECONCILE_IMAGE"]),
            *arguments,
        ]

    def ran(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command in the image."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=300, check=False)

    def active_models(self) -> list[str]:
        """Return the names that serve."""
        return sorted(as_containers_see("ls", str(self.state / "store/active/models")).stdout.split())

    def owners(self) -> set[str]:
        """Return the numbers of the users who own what is in the store."""
        return set(as_containers_see("find", str(self.state / "store"), "!", "-type", "l", "-printf", "%U\n").stdout.split())

    def give_back(self) -> None:
        """Give the state to who runs the tests, who deletes it."""
        as_containers_see("chown", "-R", "0:0", str(self.state))


@pytest.fixture
def contained(tmp_path: Path, server: Server) -> Iterator[Contained]:
    if "RECONCILE_IMAGE" not in os.environ or shutil.which("podman") is None:
        pytest.skip("no image is named: `make container` builds it with podman, and runs this")
    node = Contained(tmp_path / "node", server)
    node.prepare()
    yield node
    node.give_back()


@pytest.fixture
def source() -> Iterator[HostileServer]:
    """A source that would take a minute to send the slow model."""
    with HostileServer() as running:
        running.on("/slow", honest(SLOW, rate=len(SLOW) / 60))
        yield running


def answers(address: str) -> int:
    """Return the status of *address*; 0 where nothing listens yet."""
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def stopped(running: subprocess.Popen[str], name: str) -> tuple[float, int, str]:
    """Send SIGTERM to the container *name*; return the seconds until its end, its exit code and what it said."""
    began = time.monotonic()
    subprocess.run(podman("kill", "--signal", "TERM", name), check=True, capture_output=True, timeout=PATIENCE)
    out, err = running.communicate(timeout=PATIENCE)
    return time.monotonic() - began, running.returncode, out + err


def test_the_image_syncs_to_active_as_a_user_with_a_number(contained: Contained) -> None:
    contained.list_models(contained.item("tiny:v1", tiny("one")))

    first = contained.ran("sync")

    assert first.returncode == 0, first
    assert contained.active_models() == ["tiny"]
    assert contained.owners() == {str(USER)}
    assert '"state":"active"' in contained.ran("status", "--json").stdout.replace(" ", "")
    assert contained.ran("verify").returncode == 0
    again = contained.ran("sync")
    assert again.returncode == 0, again


def test_the_agent_answers_its_probes(contained: Contained) -> None:
    contained.list_models(contained.item("tiny:v1", tiny("one")))
    with subprocess.Popen(
        contained.command("agent", name=contained_name(contained)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        until(lambda: contained.active_models() == ["tiny"], running)
        until(lambda: answers(f"http://127.0.0.1:{contained.port}/-/healthy") == 200, running)
        assert answers(f"http://127.0.0.1:{contained.port}/metrics") == 200
        seconds, code, said = stopped(running, contained_name(contained))
    assert "Traceback" not in said
    assert (code, seconds < 10) == (0, True), (code, seconds, said)


def contained_name(node: Contained) -> str:
    """Return a name for the container of *node* that no other has."""
    return f"reconcile-{node.port}"


@pytest.mark.parametrize("command", ["sync", "agent"])
def test_a_stop_in_the_middle_of_a_download_leaves_a_whole_store(contained: Contained, source: HostileServer, command: str) -> None:
    stay = contained.item("stay:v1", tiny("stay"))
    contained.list_models(stay)
    assert contained.ran("sync").returncode == 0
    contained.list_models(stay, contained.item("slow:v1", SLOW, serve=False, urls=[source.url("/slow")]))

    with subprocess.Popen(
        contained.command(command, name=contained_name(contained)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        until(lambda: source.sent("/slow") > len(SLOW) // 60, running)
        seconds, _, said = stopped(running, contained_name(contained))

    assert "Traceback" not in said
    assert seconds < 10
    assert contained.active_models() == ["stay"]
    assert contained.ran("verify").returncode == 0
    source.on("/slow", honest(SLOW))
    assert contained.ran("sync").returncode == 0
    assert contained.active_models() == ["slow", "stay"]


def test_a_stop_in_the_middle_of_a_test_job_leaves_a_whole_store(contained: Contained) -> None:
    endless = {"prompt": "Hello", "max_tokens": 4096, "timeout": "600s"}
    stay = contained.item("stay:v1", tiny("stay"))
    contained.list_models(stay)
    assert contained.ran("sync").returncode == 0
    contained.list_models(stay, contained.item("long:v1", tiny("long", width=512), smoke=endless))

    with subprocess.Popen(
        contained.command("sync", name=contained_name(contained)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        until(a_test_job_runs, running)
        seconds, _, said = stopped(running, contained_name(contained))

    assert "Traceback" not in said
    assert seconds < 10
    assert contained.active_models() == ["stay"]
    assert contained.ran("verify").returncode == 0
    contained.list_models(stay, contained.item("long:v1", tiny("long", width=512)))
    assert contained.ran("sync").returncode == 0
    assert contained.active_models() == ["long", "stay"]


def a_test_job_runs() -> bool:
    """Whether a process of the image's user runs a test job."""
    return as_containers_see("pgrep", "-u", str(USER), "-f", "llama_cpp_worker").returncode == 0
