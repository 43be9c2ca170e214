"""
A whole node in a folder: a network that the test controls, a real HTTP server, and the real command line.

    node = Node(folder, server)
    node.publish(node.item("a:v1", tiny("a")))
    assert node.run("apply").code == 0
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from reconciler import cli, settings_file
from reconciler.commands.context import Clock, NodeContext, from_settings, wall_clock
from reconciler.core.events import Event
from reconciler.demo import models
from reconciler.demo.server import Server
from reconciler.store import clock
from tests.network import Document, Network


class Ran(Struct, frozen=True):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)

    @property
    def events(self) -> list[Document]:
        """Standard output as JSON, one document a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Node:
    """A node in *folder*, whose blobs *server* has."""

    def __init__(self, folder: Path, server: Server, extra: str = "") -> None:
        self.folder = folder
        self.server = server
        self.network = Network()
        self.network.now = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.configure(extra)
        (self.folder / "root.json").write_bytes(self.network.root())

    def configure(self, extra: str) -> None:
        """Write the settings: the defaults of a test, and *extra* after them."""
        text = '[network]\nsnapshot = "published.json"\n\n[store]\nreserve = "1MiB"\n'
        (self.folder / "reconcile.toml").write_text(text + extra)

    @property
    def store(self) -> Path:
        """The node's store."""
        return self.folder / "store"

    def item(self, name: str, data: bytes, *, serve: bool = True, **changes: Any) -> Document:
        """Return a model of *data*, which the server has."""
        digits = hashlib.sha256(data).hexdigest()
        if serve:
            self.server.add(data)
        changes.setdefault("urls", [f"{self.server.address}/sha256/{digits}"])
        changes.setdefault("smoke", {"prompt": "Hello", "max_tokens": 4, "timeout": "60s"})
        return self.network.model(name, data, **changes)

    def publish(self, *items: Document, **changes: Any) -> None:
        """Sign the next snapshot and put it where the node hears it, and lock it."""
        (self.folder / "published.json").write_bytes(self.network.snapshot(*items, **changes))
        ran = self.run("lock")
        assert ran.code == 0, ran

    def run(self, command: str, *arguments: str) -> Ran:
        """Run one command, such as ``serve list``, with this node's settings, in this process."""
        return run(*command.split(), "--config", str(self.folder / "reconcile.toml"), *arguments)

    def states(self) -> dict[str, str]:
        """Return every model's state."""
        return {model["id"]: model["state"] for model in self.run("status", "--json").json["models"]}

    def index(self) -> Document:
        """Return what ``active/index.json`` says."""
        found: Document = json.loads((self.store / "active" / "index.json").read_bytes())
        return found

    def active(self) -> list[str]:
        """Return the models that ``active/index.json`` lists."""
        return sorted(model["id"] for model in self.index()["models"])

    def blobs(self) -> list[Path]:
        """Return every file in the blob store."""
        return sorted(path for path in (self.store / "blobs").rglob("*") if path.is_file())

    def kinds(self) -> list[str]:
        """Return the kind of each incident, the newest first."""
        return [one["kind"] for one in self.run("incidents", "--json").json]

    def records(self) -> list[Document]:
        """Return what is written of everything in quarantine."""
        return [json.loads(path.read_bytes()) for path in sorted((self.store / "quarantine").glob("*/record.json"))]

    def context(self, clock: Clock = wall_clock) -> NodeContext:
        """Return the settings as the commands get them."""
        return from_settings(settings_file.decode((self.folder / "reconcile.toml").read_bytes(), self.folder), clock=clock)


class Prototype:
    """A node that was made once, for tests that begin with one like it: a copy needs no download and no test job."""

    def __init__(self, folder: Path, server: Server, **served: bytes) -> None:
        """Make a node in *folder* that serves *served*, the version v1 of each."""
        server.files.clear()  # of the test before
        self._node = Node(folder, server)
        self._node.publish(*(self._node.item(f"{name}:v1", data) for name, data in served.items()))
        assert self._node.run("apply").code == 0
        self._served = dict(server.files)

    def copy_to(self, node: Node) -> None:
        """Make *node*, which has done nothing yet, and which keeps its settings, a copy of this one. Both have the same server."""
        assert node.server is self._node.server
        _copy(self._node.folder, node.folder, "reconcile.toml")
        node.network = copy.copy(self._node.network)
        node.server.files |= self._served
        layout = node.context().layout
        with contextlib.closing(sqlite3.connect(layout.ledger)) as ledger, ledger:
            found = [(layout.blob(name).stat().st_ino, name) for (name,) in ledger.execute("SELECT digest FROM blobs")]
            ledger.executemany("UPDATE blobs SET inode = ? WHERE digest = ?", found)


def _copy(source: Path, target: Path, but: str) -> None:
    """Copy what is in *source*, with modes, times and links, and what is one file by two names; leave out the file *but*."""
    copies: dict[int, str] = {}

    def copy_file(one: str, to: str) -> None:
        inode = Path(one).stat().st_ino
        if inode in copies:
            Path(to).hardlink_to(copies[inode])
        else:
            copies[inode] = shutil.copy2(one, to)

    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(but), copy_function=copy_file, dirs_exist_ok=True)


def run(*arguments: str) -> Ran:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(arguments))
    return Ran(code, out.getvalue(), err.getvalue())


def deaf(event: Event) -> None:
    """Hear nothing: for runs whose events do not matter."""
    del event


def flip(path: Path) -> None:
    """Change one byte of a read-only file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)


@functools.cache
def tiny(seed: str, kind: str = "completion", width: int = 32, **shape: int) -> bytes:
    """Return a real GGUF model that follows from its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        models.write(models.Shape(seed=seed, kind=kind, width=width, **shape), path)  # type: ignore[arg-type]  # a test may ask for nonsense
        return path.read_bytes()


def traces(folder: Path, *, ledger: bool = True) -> dict[str, tuple[int, int, str]]:
    """Return what is in *folder*: for each path its kind, time of change, and a digest of its bytes or its target."""
    return {str(path.relative_to(folder)): _trace(path) for path in _everything(folder) if ledger or "ledger.db" not in path.name}


def _everything(folder: Path) -> Iterator[Path]:
    if folder.exists():
        yield folder
        yield from sorted(folder.rglob("*"))


def _trace(path: Path) -> tuple[int, int, str]:
    seen = path.lstat()
    if path.is_symlink():
        return seen.st_mode, seen.st_mtime_ns, str(path.readlink())
    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return seen.st_mode, seen.st_mtime_ns, content


@contextlib.contextmanager
def later(**span: float) -> Iterator[Callable[[], datetime]]:
    """Give the clock of a time to come, at which every clock of this machine says so."""
    passed, before = timedelta(**span), clock.boot_time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "boot_time", lambda: before()._replace(seconds=before().seconds + passed.total_seconds()))
        yield lambda: datetime.now(UTC) + passed
