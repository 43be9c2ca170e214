"""
A whole node and the whole program, to be interrupted from outside: what holds at any instant, and where every run must end.

The update of the node has everything small in it: a version takes over from the one before it, a model from an archive is installed,
one is removed, one stays; the downloads are real, and so is the test job in its sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from reconciler.demo import models
from reconciler.demo.server import Server
from tests.network import Document
from tests.node import Node, tiny
from tests.processes import outliving

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


class Life:
    """A node that is about to be updated, again and again from the beginning."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self._server = server
        self.node = self.fresh()
        assert self.node.run("apply").code == 0
        self.end = self.contents()

    def fresh(self) -> Node:
        """Return the node as it is before the update, whose snapshot is locked."""
        shutil.rmtree(self._folder, ignore_errors=True)
        node = self.node = Node(self._folder, self._server)
        old, stay = node.item("a:v1", tiny("a")), node.item("stay:v1", tiny("stay"))
        node.publish(old, stay, node.item("gone:v1", tiny("gone")))
        ran = node.run("apply")
        assert ran.code == 0, ran
        boxed = node.item("boxed:v1", models.tar({"m.gguf": tiny("boxed"), "note": b"n"}), path="boxed.tar", entrypoint="m.gguf")
        boxed["artifacts"][0]["unpack"] = "tar"
        node.publish(old | {"state": "archived"}, node.item("a:v2", tiny("a2")), stay, boxed)
        self.trust_state = self._floor()
        return node

    @property
    def command(self) -> list[str]:
        """The update as a process of its own."""
        return [sys.executable, "-m", "reconciler", "apply", "--config", str(self._folder / "reconcile.toml")]

    def faults(self) -> list[str]:
        """Return what is wrong at any instant of the update."""
        return [
            *self._active_faults(),
            *self._blob_faults(),
            *([] if self._floor() >= self.trust_state else ["trust: the floor went back"]),
        ]

    def _active_faults(self) -> Iterator[str]:
        served = {model["id"]: _files(self.node.store / "active" / model["path"]) for model in self.node.index()["models"]}
        for model, files in served.items():
            if files != APPROVED[model]:
                yield f"active: {model} serves {sorted(files)}, which nobody approved"
        if "stay:v1" not in served or len(served.keys() & {"a:v1", "a:v2"}) != 1:
            yield f"active: {sorted(served)}"
        linked = {f"{path.parent.name}:{path.name}" for path in (self.node.store / "active/models").glob("*/*")}
        if linked != served.keys():
            yield f"active: the index says {sorted(served)}, the links say {sorted(linked)}"

    def _blob_faults(self) -> Iterator[str]:
        for path in (self.node.store / "blobs").glob("*/*/*"):
            if not path.name.startswith(".") and hashlib.new(path.parts[-3], path.read_bytes()).hexdigest() != path.name:
                yield f"{path.name} is not what its name says"

    def _floor(self) -> int:
        found: Document = json.loads((self.node.store / "trust/floor.json").read_bytes())
        return int(found["version"])

    def contents(self) -> dict[str, Any]:
        """Return what two nodes that went through the same must have in common."""
        return {
            "states": self.node.states(),
            "active": {model["id"]: model["tree"] for model in self.node.index()["models"]},
            "changes": self.node.run("plan", "--json").json["changes"],
            "floor": self._floor(),
            "files": {str(path.relative_to(self.node.store)) for room in _ROOMS for path in (self.node.store / room).rglob("*")},
        }

    def after(self) -> list[str]:
        """Return what is wrong now, and after the next run."""
        found = self.faults()
        ran = self.node.run("apply")
        found += [] if ran.code == 0 else [f"the next run exits with {ran.code}: {ran.err}"]
        end = self.contents()
        found += [f"{key} is {end[key]}, expected {self.end[key]}" for key in end if end[key] != self.end[key] and key != "files"]
        return found + self.faults() + [f"{path} is there or not" for path in sorted(self.end["files"] ^ end["files"])]


_ROOMS = ("blobs", "trees", "staging", "quarantine", "cold")
#: What each model may serve.
APPROVED = {
    "a:v1": {"a.gguf": tiny("a")}, "a:v2": {"a.gguf": tiny("a2")}, "stay:v1": {"stay.gguf": tiny("stay")},
    "gone:v1": {"gone.gguf": tiny("gone")}, "boxed:v1": {"m.gguf": tiny("boxed"), "note": b"n"},
}  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def adopting() -> Iterator[Callable[[], list[str]]]:
    """Inherit the children that a child leaves behind; give what waits for their end and names those that go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    known = {child.pid for child in psutil.Process().children()}
    try:
        yield lambda: _outliving(known)
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _outliving(known: set[int]) -> list[str]:
    left = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in known]
    alive = outliving(left)
    for child in psutil.Process().children():
        if child.pid not in known and child.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(child.pid, 0)
    return [f"{pid}: {' '.join(psutil.Process(pid).cmdline())[:200]}" for pid in alive]
