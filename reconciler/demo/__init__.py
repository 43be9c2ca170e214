"""
The demo: a network, a real HTTP server, real models and the real commands, all on this machine.

Each step prints the command that a person would type and runs it, in a folder of its own. First from the committed lock, as a node
that was cloned from git; then on a network that is made on the spot (``network``), through a new snapshot version.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import msgspec

from reconciler.core import units
from reconciler.core.errors import ReconcileError
from reconciler.core.snapshot import Model
from reconciler.core.vocabulary import KnownState
from reconciler.demo import network
from reconciler.demo.network import Network
from reconciler.demo.server import Server, serving

#: Runs one command line with the settings in a folder and returns its exit code.
RunCommand = Callable[[Sequence[str]], int]

_LIFETIME = timedelta(days=30)


class DemoFailed(ReconcileError):
    """A step of the demo ended otherwise than it should."""

    name = "demo-failed"


class Demo:
    """The demo in *folder*: *run_command* runs its command lines, *out* is where its text goes."""

    def __init__(self, folder: Path, run_command: RunCommand, out: IO[str]) -> None:
        self._folder = folder
        self._run_command = run_command
        self._out = out

    def run(self) -> None:
        """
        Run every step.

        Raises:
            DemoFailed: a step ended otherwise than it should.
        """
        began = time.monotonic()
        with serving() as server:
            for item in network.all_models():
                if item.data is not None:
                    server.add(item.data)
            self._from_committed_lock(server)
            self._through_a_new_version(server)
        self._print(f"\nThat was the whole life of a model, in {units.human_time(time.monotonic() - began)}.")

    def _from_committed_lock(self, server: Server) -> None:
        self._title("A node from git: the committed root, snapshot and lock, and a mirror of the operator's own")
        node = self._node("from-git", server, fallback=True)
        for name in network.FILES:
            shutil.copy(network.committed_folder() / name, node / name)
        self._reconcile(node, 0, "lock", "--check")
        self._reconcile(node, 2, "plan", "--detailed-exitcode")
        self._comment("the server of weathercock lies for now")
        server.lies = {server.path_of(network.weathercock().model.artifacts[0].digest)}
        self._reconcile(node, 3, "apply", "--yes")
        self._reconcile(node, 0, "status")
        self._reconcile(node, 0, "incidents")
        self._comment("the server tells the truth again: the next run heals the node")
        server.lies = set()
        self._reconcile(node, 0, "apply", "--yes")
        self._reconcile(node, 0, "status", "chatter:v1")
        self._reconcile(node, 0, "plan", "--detailed-exitcode")

    def _through_a_new_version(self, server: Server) -> None:
        self._title("A network made on the spot: three keys, two of which must sign every snapshot")
        node = self._node("made-here", server, fallback=False)
        now = datetime.now(UTC) - timedelta(minutes=1)
        made = network.new_network("resultity-here", now, _LIFETIME)
        (node / "root.json").write_bytes(made.root)
        items = (network.parrot("v1"), network.parrot("v2"), network.weathercock(), network.compass())
        for item in items:
            server.add(item.data or b"")
        old, new, bird, compass = (_with_urls(item.model, server) for item in items)
        self._publish(node, made, (old, compass, bird), 1, now)
        self._reconcile(node, 0, "lock")
        self._reconcile(node, 0, "apply", "--yes")
        self._reconcile(node, 0, "status")
        self._reconcile(node, 0, "plan", "--detailed-exitcode")
        self._comment("the network updates parrot to v2, disables compass, and does not list weathercock any more")
        self._publish(node, made, (_in_state(old, "archived"), new, _in_state(compass, "disabled")), 2, now)
        self._reconcile(node, 0, "sync")
        self._reconcile(node, 0, "status")
        self._reconcile(node, 0, "history")
        self._reconcile(node, 0, "plan", "--detailed-exitcode")

    def _publish(self, node: Path, made: Network, models: tuple[Model, ...], version: int, now: datetime) -> None:
        (node / "published.json").write_bytes(network.signed_snapshot(made, models, version, now, _LIFETIME))
        self._print(f"  (the network's operators sign snapshot {version})")

    def _node(self, name: str, server: Server, *, fallback: bool) -> Path:
        node = self._folder / name
        node.mkdir(parents=True)
        mirrors = f'fallback = ["{server.address}/{{algorithm}}/{{hex}}"]' if fallback else ""
        source = "snapshot.json" if fallback else "published.json"
        text = f'[network]\nsnapshot = "{source}"\n\n[store]\nreserve = "64MiB"\n\n[download]\n{mirrors}\n'
        (node / "reconcile.toml").write_text(text)
        return node

    # -- output ------------------------------------------------------------------------------------

    def _reconcile(self, node: Path, expected: int, *arguments: str) -> None:
        self._print(f"\n$ reconcile {' '.join(arguments)}")
        code = self._run_command([arguments[0], "--config", str(node / "reconcile.toml"), *arguments[1:]])
        self._print(f"  (exit {code})")
        if code != expected:
            raise DemoFailed(f"`reconcile {' '.join(arguments)}` in {node} ended with {code} and not with {expected}")

    def _title(self, text: str) -> None:
        self._print(f"\n=== {text} ===")

    def _comment(self, text: str) -> None:
        self._print(f"\n# {text}")

    def _print(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def _with_urls(model: Model, server: Server) -> Model:
    artifacts = tuple(msgspec.structs.replace(one, urls=(f"{server.address}{server.path_of(one.digest)}",)) for one in model.artifacts)
    return msgspec.structs.replace(model, artifacts=artifacts)


def _in_state(model: Model, state: KnownState) -> Model:
    return msgspec.structs.replace(model, state=state)
