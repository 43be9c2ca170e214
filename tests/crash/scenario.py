"""
One run with everything in it, and ways to interrupt it at any of its effects.

The run takes a node from one snapshot to the next: two models that share a blob and one from an archive are installed, a version
takes over from the one before it, which goes to cold storage, another from one that is retired, one model is disabled, one is removed
without a grace period, one stays.

An *effect* is a call that changes the disk: of the ``os`` functions that the store uses, or a statement of the ledger.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from reconciler.core.errors import ReconcileError
from reconciler.core.lock import Lock
from reconciler.serve.content import Server
from reconciler.store import generations, ledger_database, serving
from tests.network import Network
from tests.storenode import StoreNode
from tests.twins.content import Files
from tests.twins.fetch import Internet

SHARED = b"S" * 9000
V1: Files = {"chat.gguf": b"first" * 700, "vocab.txt": b"words" * 90}
V2: Files = {"chat.gguf": b"second" * 700, "vocab.txt": b"words" * 90}
OLD: Files = {"old.gguf": b"old" * 999}
REST: Files = {"rest.gguf": b"rest" * 999}
TINY_1: Files = {"tiny.gguf": b"tiny" * 500}
TINY_2: Files = {"tiny.gguf": b"newer" * 500}
STAY: Files = {"stay.gguf": b"stay" * 999}
PAIR_A: Files = {"a.gguf": b"A" * 5000, "shared.bin": SHARED}
PAIR_B: Files = {"b.gguf": b"B" * 5000, "shared.bin": SHARED}
BOXED: Files = {"box/model.gguf": b"boxed" * 800, "box/note.txt": b"note"}

#: What each model may serve.
APPROVED: dict[str, list[Files]] = {
    "chat:v1": [V1], "chat:v2": [V2], "old:v1": [OLD], "rest:v1": [REST], "stay:v1": [STAY], "pair-a:v1": [PAIR_A], "pair-b:v1": [PAIR_B],
    "boxed:v1": [BOXED], "tiny:v1": [TINY_1], "tiny:v2": [TINY_2],
}  # fmt: skip


class Scene:
    """A node at *root*, and the two locks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node = StoreNode(root, Internet(), Network())
        self.node.configured = (
            Server(name="main", kind="llama-server", path=root / "serve" / "models.ini"),
            Server(name="python", kind="llama-cpp-python", path=root / "serve" / "models.json"),
            Server(name="hub", kind="hf-cache", path=root / "serve" / "hub"),
        )
        item, lock = self.node.item, self.node.lock
        self.first: Lock = lock(
            item("chat:v1", V1), item("old:v1", OLD), item("rest:v1", REST), item("stay:v1", STAY), item("tiny:v1", TINY_1)
        )
        self.second: Lock = lock(
            item("chat:v1", V1, state="archived"), item("chat:v2", V2), item("rest:v1", REST, state="disabled"), item("stay:v1", STAY),
            item("pair-a:v1", PAIR_A), item("pair-b:v1", PAIR_B), item("boxed:v1", {}, boxed=BOXED),
            item("tiny:v1", TINY_1, state="retired"), item("tiny:v2", TINY_2, replaces=["tiny:v1"]),
        )  # fmt: skip

    def prepare(self) -> None:
        """Bring the node to the first snapshot."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.node.run(self.first)

    def run(self) -> None:
        self.node.run(self.second)

    def faults(self) -> list[str]:
        """Return what is wrong at any instant after ``prepare``."""
        active = set(self.node.active())
        found = self.node.faults(APPROVED)
        if "stay:v1" not in active:
            found.append("active: the model that stays is gone")
        for name in ("chat", "tiny"):
            if len(active & {f"{name}:v1", f"{name}:v2"}) != 1:
                found.append(f"active: {active} has not exactly one version of {name}")
        if self.node.trust_state() < self.first.snapshot.version:
            found.append("trust: the floor went back")
        return [*found, *self._serving_faults()]

    def _serving_faults(self) -> Iterator[str]:
        """Yield what a server would trip over that reads its file now, and a router that reads ``serving.json``."""
        for path, text in self._served().items():
            for named in re.findall(rf"{re.escape(str(self.root))}[^\s\"]+", text):
                if not Path(named).exists():
                    yield f"{path}: {named} is not there"
        told = serving.read(self.node.layout)
        newest = max([0, *generations.numbers(self.node.layout)])
        for server in told.servers:
            if server.generation > newest:
                yield f"serving.json: {server.name} has {server.generation}, and there is none"

    def _served(self) -> dict[str, str]:
        """Return what servers read now: the text of files, and where links lead."""
        found = [path for server in self.node.configured if server.path for path in (server.path, *server.path.rglob("*"))]
        links = {path.name: str(path.readlink()) for path in found if path.is_symlink()}
        return links | {path.name: path.read_text() for path in found if path.is_file()}

    def end(self) -> dict[str, object]:
        active = generations.current(self.node.layout).number
        lagging = [server.name for server in serving.read(self.node.layout).servers if server.generation != active or server.error]
        store = self.node.layout.root  # a server is given where the bytes truly are
        served = {
            name: text.replace(os.path.realpath(store), "store").replace(str(store), "store") for name, text in self._served().items()
        }
        return self.node.contents(self.second) | {"served": served, "lagging": lagging}


# -- effects ---------------------------------------------------------------------------------------

_OS = ("rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "write", "fsync", "chmod", "fchmod")
#: Called besides for every failure: reading and opening may be refused too.
_OPENING = ("open", "close", "stat", "lstat", "scandir", "readlink", "fstat")


class Effects:
    """Counts effects, and calls *at* before each, with its number and its name; for the time of a ``with``."""

    def __init__(self, at: Callable[[int, str], None], *, opening: bool = False, root: Path | None = None) -> None:
        self._at = at
        self._names = _OS + (_OPENING if opening else ())
        self._root = str(root) if root else ""
        self._guard = threading.RLock()
        self.count = 0

    def __enter__(self) -> Self:
        self._real = {name: getattr(os, name) for name in self._names}
        for name, real in self._real.items():
            setattr(os, name, self._counted(name, real))
        self._connect = ledger_database.open_writable
        ledger_database.open_writable = lambda path: _Connection(self._connect(path), self)  # type: ignore[assignment,return-value]
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)
        ledger_database.open_writable = self._connect

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*args: Any, **kwargs: Any) -> Any:
            if self._is_ours(name, args, kwargs):
                self.happen(name)
            return real(*args, **kwargs)

        return effect

    def _is_ours(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Leave out what Python does for itself: imports, the tests' own log."""
        if name in {"close", "fstat"} or not args or "dir_fd" in kwargs or isinstance(args[0], int):
            return True
        return self._root in os.fspath(args[1] if name == "symlink" else args[0])

    def happen(self, name: str) -> None:
        with self._guard:
            self.count += 1
            self._at(self.count, name)


class _Connection:
    """A database whose every writing statement is an effect."""

    def __init__(self, real: sqlite3.Connection, effects: Effects) -> None:
        self._real = real
        self._effects = effects

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        if not statement.startswith("SELECT"):
            try:
                self._effects.happen("ledger")
            except OSError as error:
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                raise sqlite3.OperationalError("database or disk is full" if full else "disk I/O error") from None
        return self._real.execute(statement, values)

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def close(self) -> None:
        self._real.close()


# -- children --------------------------------------------------------------------------------------

KILLED = 137
UNTOUCHED = 0
REFUSED = 1
WRONG = 70


def child(work: Callable[[], None]) -> int:
    """Run *work* in a child of this process; return how it ended: ``UNTOUCHED``, ``REFUSED`` or ``WRONG``, or what it exited with."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = WRONG
        try:
            signal.alarm(60)
            work()
            code = UNTOUCHED
        except ReconcileError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(number: int) -> Callable[[int, str], None]:
    """Return what ends this process at its *number*-th effect, as ``kill -9`` does: nothing is cleaned up."""

    def at(count: int, _name: str) -> None:
        if count == number:
            os._exit(KILLED)

    return at


def failing_at(number: int, code: int, *, once: bool) -> Callable[[int, str], None]:
    """Return what refuses the *number*-th effect, and all after it if not *once*."""

    def at(count: int, name: str) -> None:
        if count == number or (count > number and not once):
            raise OSError(code, os.strerror(code), name)

    return at


def interrupted_run(root: Path, at: Callable[[int, str], None], *, opening: bool = False) -> int:
    """Prepare a node in a child, let *at* interrupt its run, and return how the child ended."""

    def work() -> None:
        scene = Scene(root)
        scene.prepare()
        with Effects(at, opening=opening, root=root):
            scene.run()

    return child(work)


def interrupted_again(root: Path, at: Callable[[int, str], None]) -> int:
    """Run once more in a child, interrupted by *at*; the store is as the last one left it."""

    def work() -> None:
        scene = Scene(root)
        with Effects(at, root=root):
            scene.run()

    return child(work)


def untouched_end(root: Path) -> dict[str, object]:
    """Return how an untouched run of a node at *root* ends."""
    scene = Scene(root)
    scene.prepare()
    scene.run()
    return scene.end()


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """Return where a run's end is not the expected one."""
    return [f"{key} is {found[key]}, expected {expected[key]}" for key in expected if found[key] != expected[key]]


def effects_of_a_run(root: Path, *, opening: bool = False) -> list[str]:
    """Return the names of the effects of an untouched run."""
    names: list[str] = []
    scene = Scene(root)
    scene.prepare()
    with Effects(lambda _count, name: names.append(name), opening=opening, root=root):
        scene.run()
    return names
