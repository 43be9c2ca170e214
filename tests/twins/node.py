"""
A whole node made of memory twins: what ``apply`` promises, without a disk.

    node = MemoryNode()
    lock = node.lock(node.item("a:v1", {"a.gguf": b"bytes"}))
    node.run(lock)
    assert node.active() == {"a:v1": {"a.gguf": b"bytes"}}
"""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.apply import run
from reconciler.core import digest, lock, plan
from reconciler.core.events import Announced, Event, Incident
from reconciler.core.lock import Lock
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import Plan
from reconciler.core.state import BlobSeen, Generation, NodeState, TreeSeen
from reconciler.ports import Ports
from reconciler.store.clock import BootTime
from reconciler.store.generations import path_of
from tests.network import Document, Network
from tests.twins.content import Files, name_of, tar, url_of
from tests.twins.fetch import Internet, MemoryFetcher
from tests.twins.store import MemoryBlobs, MemoryGenerations, MemoryHousekeeping, MemoryLedger, MemoryTrees
from tests.twins.testing import MemoryHooks, MemoryServers, MemoryTester

FACTS = NodeFacts(memory_bytes=64 << 30, disk_total_bytes=1 << 40, disk_free_bytes=1 << 40, engines={"llama-cpp": "0.3.36"})


POLICY = Policy(reserve_bytes=0, grace_seconds=0.0)


class Clock:
    """A machine's clocks, as a test moves them. They start at the machine's time, which the store compares with times of files."""

    def __init__(self) -> None:
        self.ahead = timedelta()
        self._passed = timedelta()
        self._boots = 1
        self._started = time.monotonic()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def forward(self, **by: float) -> None:
        """Let time pass."""
        self.ahead += timedelta(**by)
        self._passed += timedelta(**by)

    def move(self, by: timedelta) -> None:
        """Set the clock forward or back; no time passes."""
        self.ahead += by

    def restart(self) -> None:
        """Start the machine anew."""
        self._boots += 1
        self._passed = timedelta()
        self._started = time.monotonic()

    def boot_time(self) -> BootTime:
        """Return which boot this is, and how long it has lasted."""
        return BootTime(f"boot {self._boots}", time.monotonic() - self._started + self._passed.total_seconds())


class EventLog:
    """A reporter that keeps every event, from any thread."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def kinds(self) -> list[str]:
        return [incident.kind for incident in self.of(Incident)]


class SnapshotAuthor:
    """Lists models in snapshots and compiles these to locks; *internet* serves their bytes."""

    def __init__(self, network: Network, internet: Internet) -> None:
        self.network = network
        self.internet = internet

    def item(self, name: str, files: Files, *, boxed: Files | None = None, serve: bool = True, **changes: Any) -> Document:
        """Return a model of *files*, and of the files of an archive; its entrypoint is the first of all."""
        artifacts = [_artifact(path, data) for path, data in files.items()]
        if boxed is not None:
            artifacts.append(_artifact("box.tar", tar(boxed)) | {"unpack": "tar"})
        if serve:
            for data in (*files.values(), *([tar(boxed)] if boxed else [])):
                self.internet.add(data)
        changes.setdefault("entrypoint", next(iter({**files, **(boxed or {})})))
        return self.network.model(name, b"x", **changes) | {"artifacts": artifacts}

    def lock(self, *items: Document, **changes: Any) -> Lock:
        """Return the next lock."""
        return lock.compile(self.network.verified(*items, **changes))


def _artifact(path: str, data: bytes) -> Document:
    return {"path": path, "digest": name_of(data), "size": len(data), "urls": [url_of(data)]}


class MemoryNode(SnapshotAuthor):
    """A node made of twins, with its own network."""

    def __init__(self) -> None:
        super().__init__(Network(), Internet())
        self.clock = Clock()
        self.heard = EventLog()
        self.blobs = MemoryBlobs()
        self.trees = MemoryTrees(self.blobs)
        self.generations = MemoryGenerations()
        self.ledger = MemoryLedger()
        self.housekeeping = MemoryHousekeeping()
        self.hooks = MemoryHooks()
        self.servers = MemoryServers()
        self.tester = MemoryTester()
        self.facts = FACTS
        self.policy = POLICY
        self.damaged: set[str] = set()
        #: The last generation in the history.
        self.announced = 0

    def state(self) -> NodeState:
        """Return what would be observed."""
        return NodeState(
            active=self.generations.active,
            blobs={name: self._seen(name, data) for name, data in self.blobs.hot.items()},
            trees=self._relearned() | self.trees.seen,
            archived={name: BlobSeen(size=len(data)) for name, data in self.blobs.cold.items()},
            records=dict(self.ledger.records),
            passed=dict(self.ledger.passes),
            unfinished=self.ledger.running,
            announced=self._announced(),
        )

    def _relearned(self) -> dict[str, TreeSeen]:
        """Return what serves and the ledger forgot, as its links tell."""
        forgotten = {entry.tree for entry in self.generations.active.entries.values()} - {tree.digest for tree in self.trees.seen.values()}
        return {tree: self.trees.relearned(tree) for tree in forgotten}

    def _announced(self) -> Generation | None:
        number = self.announced
        return None if number == self.generations.active.number else self.generations.made.get(number, Generation())

    def _report(self, event: Event) -> None:
        if isinstance(event, Announced):
            self.announced = event.generation
        self.heard(event)

    def _seen(self, name: str, data: bytes) -> BlobSeen:
        damaged = name in self.damaged and digest.of(data) != name
        known = None if damaged or name in self.blobs.doubtful else self.clock()
        return BlobSeen(size=len(data), verified_at=known, damaged=damaged)

    def plan(self, wanted: Lock) -> Plan:
        """Return what would be done."""
        return plan.diff(wanted, lock.digest_of(lock.encode(wanted)), self.state(), self.facts, self.policy, now=self.clock())

    def run(self, wanted: Lock) -> run.Outcome:
        """Plan and apply."""
        with tempfile.TemporaryDirectory() as folder:
            return run.execute(self.plan(wanted), wanted, self.state(), self.facts, self.policy, self.ports(Path(folder)))

    def ports(self, staging: Path) -> Ports:
        return Ports(
            blobs=self.blobs,
            trees=self.trees,
            generations=self.generations,
            ledger=self.ledger,
            housekeeping=self.housekeeping,
            servers=self.servers,
            hooks=self.hooks,
            fetcher=MemoryFetcher(staging, self.internet),
            tester=self.tester,
            report=self._report,
            now=self.clock,
            tree_path=Path,
            active_path=path_of,
        )

    def ops(self, wanted: Lock) -> dict[str, str]:
        """Return the planned op of each model that would change."""
        return {change.id: change.op for change in self.plan(wanted).models if change.changes}

    def active(self) -> dict[str, Files]:
        """Return the files of each active model."""
        return {
            model: {entry.path: self.blobs.hot.get(entry.digest, b"gone") for entry in self.trees.listings[found.tree]}
            for model, found in self.generations.active.entries.items()
        }

    def lose_ledger(self) -> None:
        """Forget everything that the file system does not say."""
        self.ledger.__init__()  # type: ignore[misc]  # as new
        self.trees.seen = {}
        self.blobs.doubtful = set(self.blobs.hot)

    def damage(self, data: bytes, *, known: bool = True) -> None:
        """Change the bytes of the blob of *data*; *known*: the plan sees it, otherwise only a hash does."""
        name = name_of(data)
        self.blobs.hot[name] = b"rot" + data[3:]
        self.damaged.add(name)
        if not known:
            self.damaged.discard(name)
            self.blobs.doubtful.add(name)
