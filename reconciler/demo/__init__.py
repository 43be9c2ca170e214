"""
The whole main job on this machine: a network, a real HTTP server, real models, the real commands.

Each step prints the command that a person would type and runs it, in a folder of its own. First from the committed lock, as a node
that was cloned from git would; then on a network that is made on the spot, through a new snapshot version.
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
from reconciler.core.snapshot import Model, Wanted
from reconciler.demo import catalogue, committed, network
from reconciler.demo.network import Network
from reconciler.demo.server import Server, serving

#: Runs one command line with the settings in a folder and returns its exit code.
Run = Callable[[Sequence[str]], int]

_LIFETIME = timedelta(days=30)


class DemoFailed(ReconcileError):
    """A step of the demo ended otherwise than it should."""

    name = "demo-failed"


class Story:
    """The demo as it goes on: where it plays, who runs its commands and where it is told."""

    def __init__(self, folder: Path, run: Run, out: IO[str]) -> None:
        self._folder = folder
        self._run = run
        self._out = out

    def tell(self) -> None:
        """
        Play it all.

        Raises:
            DemoFailed: a step ended otherwise than it should.
        """
        began = time.monotonic()
        with serving() as server:
            for item in catalogue.everything():
                if item.data is not None:
                    server.add(item.data)
            self._from_committed_lock(server)
            self._through_a_new_version(server)
        self._say(f"\nThat was the whole life of a model, in {units.human_time(time.monotonic() - began)}.")

    def _from_committed_lock(self, server: Server) -> None:
        self._title("A node from git: the committed root, snapshot and lock, and a mirror of the operator's own")
        node = self._node("from-git", server, fallback=True)
        for name in committed.FILES:
            shutil.copy(committed.folder() / name, node / name)
        self._step(node, 0, "lock", "--check")
        self._step(node, 2, "plan", "--detailed-exitcode")
        self._note("the server of weathercock lies for now")
        server.lies = {server.path_of(catalogue.weathercock().model.artifacts[0].digest)}
        self._step(node, 3, "apply", "--yes")
        self._step(node, 0, "status")
        self._step(node, 0, "incidents")
        self._note("the server tells the truth again: the next run heals the node")
        server.lies = set()
        self._step(node, 0, "apply", "--yes")
        self._step(node, 0, "status", "chatter:v1")
        self._step(node, 0, "plan", "--detailed-exitcode")

    def _through_a_new_version(self, server: Server) -> None:
        self._title("A network made on the spot: three keys, two of which must sign every snapshot")
        node = self._node("made-here", server, fallback=False)
        now = datetime.now(UTC) - timedelta(minutes=1)
        made = network.make("resultity-here", now, _LIFETIME)
        (node / "root.json").write_bytes(made.root)
        items = (catalogue.completion("v1"), catalogue.completion("v2"), catalogue.weathercock(), catalogue.embedding())
        for item in items:
            server.add(item.data or b"")
        old, new, bird, compass = (_with_urls(item.model, server) for item in items)
        self._publish(node, made, (old, compass, bird), 1, now)
        self._step(node, 0, "lock")
        self._step(node, 0, "apply", "--yes")
        self._step(node, 0, "status")
        self._step(node, 0, "plan", "--detailed-exitcode")
        self._note("the network updates parrot to v2, disables compass, and does not list weathercock any more")
        self._publish(node, made, (_in_state(old, "archived"), new, _in_state(compass, "disabled")), 2, now)
        self._step(node, 0, "sync")
        self._step(node, 0, "status")
        self._step(node, 0, "history")
        self._step(node, 0, "plan", "--detailed-exitcode")

    def _publish(self, node: Path, made: Network, models: tuple[Model, ...], version: int, now: datetime) -> None:
        (node / "published.json").write_bytes(network.snapshot(made, models, version, now, _LIFETIME))
        self._say(f"  (the network's operators sign snapshot {version})")

    def _node(self, name: str, server: Server, *, fallback: bool) -> Path:
        node = self._folder / name
        node.mkdir(parents=True)
        mirrors = f'fallback = ["{server.address}/{{algorithm}}/{{hex}}"]' if fallback else ""
        source = "snapshot.json" if fallback else "published.json"
        text = f'[network]\nsnapshot = "{source}"\n\n[store]\nreserve = "64MiB"\n\n[download]\n{mirrors}\n'
        (node / "reconcile.toml").write_text(text)
        return node

    # -- telling -----------------------------------------------------------------------------------

    def _step(self, node: Path, expected: int, *arguments: str) -> None:
        self._say(f"\n$ reconcile {' '.join(arguments)}")
        code = self._run([arguments[0], "--config", str(node / "reconcile.toml"), *arguments[1:]])
        self._say(f"  (exit {code})")
        if code != expected:
            raise DemoFailed(f"`reconcile {' '.join(arguments)}` in {node} ended with {code} and not with {expected}")

    def _title(self, text: str) -> None:
        self._say(f"\n=== {text} ===")

    def _note(self, text: str) -> None:
        self._say(f"\n# {text}")

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def _with_urls(model: Model, server: Server) -> Model:
    artifacts = tuple(msgspec.structs.replace(one, urls=(f"{server.address}{server.path_of(one.digest)}",)) for one in model.artifacts)
    return msgspec.structs.replace(model, artifacts=artifacts)


def _in_state(model: Model, state: Wanted) -> Model:
    return msgspec.structs.replace(model, state=state)
