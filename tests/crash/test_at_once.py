"""Many commands at once on one node: who holds the store works, the others say so, and whoever reads ``active`` misses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from tests.node import Node, tiny

WRITERS = (("apply", "--yes"), ("sync",), ("gc",), ("verify",), ("rollback",))
READERS = (("status", "--json"), ("plan", "--json"), ("incidents",), ("history",))
BUSY = 5


class Router(threading.Thread):
    """Reads every model in the index, again and again, as a router does."""

    def __init__(self, active: Path) -> None:
        super().__init__()
        self._active = active
        self._over = threading.Event()
        self.passes = 0
        self.misses: list[str] = []

    def run(self) -> None:
        while not self._over.is_set():
            try:
                folder = self._active.resolve(strict=True)
                for model in json.loads((folder / "index.json").read_bytes())["models"]:
                    (folder / model["path"] / model["entrypoint"]).read_bytes()
            except (OSError, ValueError) as error:
                self.misses.append(repr(error))
            self.passes += 1

    def end(self) -> None:
        self._over.set()
        self.join()


def test_commands_at_once_take_turns_or_say_that_the_store_is_held(node: Node) -> None:
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v1", tiny("b")))
    assert node.run("apply").code == 0
    node.publish(node.item("a:v1", tiny("a")), node.item("b:v2", tiny("c")))
    router = Router(node.store / "active")
    router.start()
    try:
        commands = [*WRITERS, *READERS, *WRITERS]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "reconciler", *command, "--config", str(node.folder / "reconcile.toml")],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            )
            for command in commands
        ]  # fmt: skip
        said = [process.communicate(timeout=120)[1] for process in running]
        assert node.run("apply").code == 0
    finally:
        router.end()

    for command, words, code in zip(commands, said, [process.returncode for process in running], strict=True):
        assert "Traceback" not in words
        if command in READERS:
            assert code == 0, (command, words)
        elif code != 0:
            assert code == BUSY or command == ("rollback",), (command, words)  # which may be refused for what it would bring back
            assert code != BUSY or "error[store-busy]" in words
    assert router.misses == []
    assert router.passes > 0
    states = node.states()
    assert (states["a:v1"], states["b:v2"]) == ("active", "active")
    assert node.run("plan", "--detailed-exitcode").code == 0
    assert node.run("verify").code == 0
