"""
A node with a real store and twins around it: what holds on a disk, whatever is pulled.

    node = StoreNode(tmp_path)
    node.run(node.lock(node.item("a:v1", {"a.gguf": b"bytes"})))
    assert node.faults({"a:v1": [{"a.gguf": b"bytes"}]}) == []
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from reconciler.apply import run
from reconciler.commands import wiring
from reconciler.core import digest, lock, plan
from reconciler.core.lock import Lock
from reconciler.core.node import Policy
from reconciler.core.plan import Plan
from reconciler.core.state import NodeState
from reconciler.core.trust import TrustState
from reconciler.ports import Ports
from reconciler.serve.content import Server
from reconciler.serve.follow import ServerFollower
from reconciler.store import atomic, clock, generations, observe, trust_state, writer_lock
from reconciler.store.blobs import Blobs
from reconciler.store.generations import Generations, path_of
from reconciler.store.housekeeping import StoreHousekeeping
from reconciler.store.index import Describer
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger
from reconciler.store.trees import Trees
from tests.network import Network
from tests.twins.content import Files
from tests.twins.fetch import Internet, MemoryFetcher, TarUnpacker
from tests.twins.node import FACTS, POLICY, Clock, EventLog, SnapshotAuthor
from tests.twins.testing import MemoryHooks, MemoryServers, MemoryTester

_TEMPORARY = re.compile(r"\.tmp$|^(unpack|tree|thaw|index|small)-")


def memory() -> str | None:
    """Return a folder in memory, where there is one: tests that make hundreds of stores would wait for a disk to sync them."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def hash_file(path: Path, algorithm: str) -> str:
    """Return the digest of a plain file, in this process."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("not a plain file")
        made = digest.hasher(algorithm)
        while data := file.read(1 << 20):
            made.update(data)
    return f"{algorithm}:{made.hexdigest()}"


class StoreNode(SnapshotAuthor):
    """A node whose store lies in *root*; another one at the same *root* is the same node after a restart."""

    def __init__(self, root: Path, internet: Internet | None = None, network: Network | None = None) -> None:
        super().__init__(network or Network(), internet or Internet())
        self.root = root
        self.layout = Layout(root / "store", root / "cold")
        self.clock = Clock()
        self.heard = EventLog()
        self.hooks = MemoryHooks()
        self.servers = MemoryServers()
        #: Servers whose files are really written.
        self.configured: tuple[Server, ...] = ()
        self.tester = MemoryTester()
        self.tester.log = root / "tested.log"
        self.facts = FACTS
        self.policy: Policy = POLICY

    def run(self, wanted: Lock) -> run.Outcome:
        """Plan and apply as the engine does, without its trust: hold the store, record the snapshot, observe, plan, execute."""
        atomic.make_folder(self.layout.root)
        with writer_lock.hold(self.layout.lock_file), Ledger.writing(self.layout.ledger) as ledger:
            trust_state.write(self.layout, ledger, TrustState(version=wanted.snapshot.version, digest=wanted.snapshot.digest))
            trust_state.keep_envelope(self.layout, wanted.snapshot.digest.encode())
            clock.follow(self.layout, ledger, self.clock(), self.clock.boot_time())
            ledger.limit_times(self.clock())
            state = observe.node_state(self.layout, ledger)
            made = self._diff(wanted, state)
            return run.execute(made, wanted, state, self.facts, self.policy, self.ports(wanted, ledger))

    def ports(self, wanted: Lock, ledger: Ledger) -> Ports:
        now = clock.run_clock(self.clock, lambda: self.clock.boot_time().seconds)
        blobs = Blobs(self.layout, ledger, hash_file, now)
        describer = Describer(self.layout, ledger, wanted, lock.digest_of(lock.encode(wanted)), now=now)
        follower = ServerFollower(self.layout, self.configured, ledger, report=self.heard, now=now, refresh=describer.refresh)
        return Ports(
            blobs=blobs,
            trees=Trees(self.layout, ledger, blobs, TarUnpacker()),
            generations=Generations(self.layout, describer),
            ledger=ledger,
            housekeeping=StoreHousekeeping(self.layout, ledger, wanted, self.policy, now),
            servers=follower if self.configured else self.servers,
            hooks=self.hooks,
            fetcher=MemoryFetcher(self.layout.staging, self.internet),
            tester=self.tester,
            report=wiring.with_history(self.heard, ledger, wanted.snapshot.digest, "apply", now),
            now=now,
            tree_path=self.layout.tree,
            active_path=path_of,
        )

    def _diff(self, wanted: Lock, state: NodeState) -> Plan:
        return plan.diff(wanted, lock.digest_of(lock.encode(wanted)), state, self.facts, self.policy, now=self.clock())

    def state(self) -> NodeState:
        """Return what is observed, as a plan does it."""
        with Ledger.reading(self.layout.ledger) as ledger:
            return observe.node_state(self.layout, ledger)

    def plan(self, wanted: Lock) -> Plan:
        return self._diff(wanted, self.state())

    def ops(self, wanted: Lock) -> dict[str, str]:
        """Return the planned op of each model that would change."""
        return {change.id: change.op for change in self.plan(wanted).models if change.changes}

    def states(self, wanted: Lock) -> dict[str, str]:
        """Return each model's state."""
        return {change.id: change.from_ for change in self.plan(wanted).models}

    # -- what a reader finds

    def active(self) -> dict[str, Files]:
        """Return what a router that reads ``active`` finds: the files of each model in the index."""
        folder = self.layout.active
        return {model: _files(folder / entry.path) for model, entry in generations.current(self.layout).entries.items()}

    def trust_state(self) -> int:
        """Return the version of the snapshot below which nothing is accepted."""
        with Ledger.reading(self.layout.ledger) as ledger:
            return trust_state.read(self.layout, ledger).version if self.layout.used else 0

    # -- the invariants

    def faults(self, approved: dict[str, list[Files]], doubted: Collection[str] = ()) -> list[str]:
        """
        Return every way in which the store breaks its promise; *approved*: the contents that each model may have.

        The blobs in *doubted* may have other bytes than their names say.
        """
        return [*self._active_faults(approved), *self._blob_faults(doubted), *self._tree_faults()]

    def doubted(self) -> set[str]:
        """Return the blobs that the store does not believe, and hashes before anybody is given them."""
        return {name for name, seen in self.state().blobs.items() if seen.verified_at is None}

    def _active_faults(self, approved: dict[str, list[Files]]) -> Iterator[str]:
        log = self.root / "tested.log"
        tested = {line.split()[-1] for line in log.read_text().splitlines()} if log.exists() else set()
        for model, entry in generations.current(self.layout).entries.items():
            found = _files(self.layout.active / entry.path)
            if found not in approved.get(model, []):
                yield f"active: {model} serves {sorted(found)}, which nobody approved"
            if entry.tree.partition(":")[2] not in tested:  # under whatever id: a pass counts for what was tested
                yield f"active: {model} was never tested"
            if entry.entrypoint not in found:
                yield f"active: {model} has no entrypoint"
        if self.layout.active.is_symlink():
            linked = {str(path.relative_to(self.layout.active)) for path in (self.layout.active / "models").glob("*/*")}
            listed = {entry.path for entry in generations.current(self.layout).entries.values()}
            if linked != listed:
                yield f"active: the index says {sorted(listed)}, the links say {sorted(linked)}"

    def _blob_faults(self, doubted: Collection[str]) -> Iterator[str]:
        for folder in (self.layout.blobs, self.layout.cold / "blobs"):
            for path in folder.glob("*/*/*"):
                if path.name.startswith(".") and folder != self.layout.blobs:
                    continue  # a copy on its way into cold storage has no blob's name yet
                if f"{path.parts[-3]}:{path.name}" in doubted and folder == self.layout.blobs:
                    continue
                seen = path.lstat()
                if not stat.S_ISREG(seen.st_mode) or hash_file(path, path.parts[-3]) != f"{path.parts[-3]}:{path.name}":
                    yield f"{path.relative_to(self.root)} is not what its name says"
                elif stat.S_IMODE(seen.st_mode) != 0o444:
                    yield f"{path.relative_to(self.root)} has the mode {stat.S_IMODE(seen.st_mode):o}"

    def _tree_faults(self) -> Iterator[str]:
        blobs = {(seen.st_dev, seen.st_ino) for seen in map(Path.lstat, self.layout.blobs.glob("*/*/*"))}
        for tree in {entry.tree for entry in generations.current(self.layout).entries.values()}:
            for path in self.layout.tree(tree).rglob("*"):
                seen = path.lstat()
                if stat.S_ISREG(seen.st_mode) and (seen.st_dev, seen.st_ino) not in blobs:
                    yield f"{path.relative_to(self.root)} is no link to a blob"

    # -- the end state

    def leftovers(self) -> list[str]:
        """Return what lies about under a name of something in the making."""
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if _TEMPORARY.search(path.name)]

    def contents(self, wanted: Lock) -> dict[str, object]:
        """Return what two nodes that did the same must have in common, however they got there."""
        return {
            "active": {model: _shorts(files) for model, files in self.active().items()},
            "blobs": _names(self.layout.blobs),
            "cold": _names(self.layout.cold / "blobs"),
            "trees": {path.name[:12]: _shorts(_files(path)) for path in self.layout.trees.glob("*/*/*")},
            "states": self.states(wanted),
            "records": {record.id: record.state for record in self.state().records.values()},
            "drift": self.plan(wanted).drift,
            "changes": self.plan(wanted).changes,
            "leftovers": self.leftovers(),
            "floor": self.trust_state(),
        }  # fmt: skip


def _files(folder: Path) -> Files:
    """Return the files under *folder*; what cannot be read is said to be gone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            try:
                found[str(path.relative_to(folder))] = path.read_bytes()
            except OSError:
                found[str(path.relative_to(folder))] = b"gone"
    return found


def _names(folder: Path) -> set[str]:
    return {path.name[:12] for path in folder.glob("*/*/*")}


def _shorts(files: Files) -> dict[str, str]:
    return {path: _short(data) for path, data in files.items()}


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def traces(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return names, modes, times of change and bytes of everything in *folder*."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        seen = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else _short(path.read_bytes()) if path.is_file() else ""
        found[str(path)] = (seen.st_mode, seen.st_mtime_ns, content)
    return found
