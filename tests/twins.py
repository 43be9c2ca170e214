"""
Memory twins of the ports, and a whole node made of them: what ``apply`` promises, without a disk.

    node = MemoryNode()
    lock = node.lock(node.item("a:v1", {"a.gguf": b"bytes"}))
    node.run(lock)
    assert node.active() == {"a:v1": {"a.gguf": b"bytes"}}

``tests/contract`` runs one suite against each twin and the adapter that it stands for.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from reconciler.apply import run
from reconciler.core import digest, lock, plan
from reconciler.core.errors import BlobDamaged, HashMismatch, StoreError, UnpackRefused
from reconciler.core.lock import Lock, LockedArtifact
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import Plan
from reconciler.core.state import ActiveModel, BlobSeen, Generation, NodeState, Passed, Record, TreeSeen
from reconciler.ports import Event, Fetched, FetchFailed, Incident, Ports, Reporter, Swapped, TestJob, TestReport, Want
from reconciler.store.generations import path_of
from reconciler.store.ledger import Listing
from reconciler.store.trees import digest_of
from tests.network import Document, Network

Files = dict[str, bytes]

FACTS = NodeFacts(memory_bytes=64 << 30, disk_total_bytes=1 << 40, disk_free_bytes=1 << 40, engines={"llama-cpp": "0.3.36"})
POLICY = Policy(reserve_bytes=0, grace_seconds=0.0)


def name_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def url_of(data: bytes) -> str:
    return f"https://models.example.org/{hashlib.sha256(data).hexdigest()}"


def tar(files: Files) -> bytes:
    """Return a tar of *files* that is always the same."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


class Clock:
    """The time, which a test moves. It starts with the machine's: the store compares it with times of files."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def forward(self, **by: float) -> None:
        self.ahead += timedelta(**by)


class Heard:
    """A reporter that remembers; it may be called from any thread."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def kinds(self) -> list[str]:
        return [incident.kind for incident in self.of(Incident)]


# -- fetching and unpacking ------------------------------------------------------------------------


class Internet:
    """What all servers have, by URL; every request is counted."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []

    def add(self, data: bytes) -> None:
        self.pages[url_of(data)] = data

    def remove(self, data: bytes) -> None:
        self.pages.pop(url_of(data), None)


class StagingFetcher:
    """Writes into a staging folder what the *internet* has, and vouches for what it wrote."""

    def __init__(self, staging: Path, internet: Internet) -> None:
        self._staging = staging
        self._internet = internet
        self.closed = False

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        from reconciler.core.errors import FetchError

        for want in wants:
            self._internet.asked.append(want.digest)
            good = [url for url in want.sources if name_of(self._internet.pages.get(url, b"")) == want.digest]
            if not good:
                report(Incident(kind="source-failed", blob=want.digest, detail="nobody has it"))
                yield FetchFailed(digest=want.digest, error=FetchError(f"no source gave {want.digest}"))
                continue
            try:
                yield self._kept(want, self._internet.pages[good[0]], good[0])
            except OSError as error:
                yield FetchFailed(digest=want.digest, error=StoreError(f"cannot write: {error.strerror}"))

    def _kept(self, want: Want, data: bytes, url: str) -> Fetched:
        folder = self._staging / want.digest.replace(":", "-")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "data"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        return fetched_at(path, want.digest, url)

    def close(self) -> None:
        self.closed = True


def fetched_at(path: Path, name: str, source: str = "") -> Fetched:
    """Return what a fetcher says of the file at *path*."""
    seen = path.lstat()
    return Fetched(
        digest=name, size=seen.st_size, path=path, device=seen.st_dev, inode=seen.st_ino, mtime_ns=seen.st_mtime_ns, sources=(source,)
    )  # fmt: skip


def _artifact(path: str, data: bytes) -> Document:
    return {"path": path, "digest": name_of(data), "size": len(data), "urls": [url_of(data)]}


class TarUnpacker:
    """Takes a plain tar apart; refuses what is no file."""

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        assert kind == "tar"
        try:
            return tuple(sorted(_unpacked(archive.read_bytes(), into)))
        except tarfile.TarError as error:
            raise UnpackRefused(str(error)) from None
        except OSError as error:
            raise StoreError(f"cannot unpack: {error.strerror}") from error


def _unpacked(data: bytes, into: Path) -> Iterator[str]:
    for name, content in members(data).items():
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        yield name


def members(data: bytes) -> Files:
    """Return the files in a tar; refuse any other member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {}
        for member in archive.getmembers():
            if not member.isreg():
                raise UnpackRefused(f"{member.name} is no plain file")
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
        return found


# -- the store -------------------------------------------------------------------------------------


class MemoryBlobs:
    """Blobs in a dictionary, hot and cold. ``doubtful`` ones must be hashed again before they are used."""

    def __init__(self) -> None:
        self.hot: dict[str, bytes] = {}
        self.cold: dict[str, bytes] = {}
        self.doubtful: set[str] = set()

    def adopt(self, fetched: Fetched) -> None:
        seen = fetched.path.lstat()
        if (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns) != (
            fetched.device, fetched.inode, fetched.size, fetched.mtime_ns
        ) or seen.st_nlink != 1:  # fmt: skip
            raise HashMismatch("not the file that was hashed")
        self.keep(fetched.digest, fetched.path.read_bytes())
        fetched.path.unlink()

    def keep(self, name: str, data: bytes) -> None:
        """Name bytes whose digest was checked."""
        self.hot[name] = data
        self.doubtful.discard(name)

    def check(self, name: str) -> bool:
        good = name in self.hot and digest.of(self.hot[name], digest.parse(name)[0]) == name
        (self.doubtful.discard if good else self.doubtful.add)(name)
        return good

    def discard(self, name: str) -> None:
        digest.parse(name)
        self.hot.pop(name, None)

    def archive(self, name: str) -> None:
        if name not in self.hot:
            raise StoreError(f"{name} is not here")
        if digest.of(self.hot[name], digest.parse(name)[0]) != name:
            raise BlobDamaged(f"{name} has other bytes")
        self.cold[name] = self.hot.pop(name)

    def restore(self, name: str) -> None:
        if name not in self.cold:
            raise StoreError(f"{name} is not there")
        data = self.cold.pop(name)
        if digest.of(data, digest.parse(name)[0]) != name:
            raise BlobDamaged(f"{name} has other bytes")
        self.keep(name, data)


class MemoryTrees:
    """Trees as listings; a tree's bytes are its blobs'."""

    def __init__(self, blobs: MemoryBlobs) -> None:
        self._blobs = blobs
        self.seen: dict[str, TreeSeen] = {}
        self.listings: dict[str, tuple[Listing, ...]] = {}

    def assemble(self, recipe: str, artifacts: Sequence[LockedArtifact], entrypoint: str, *, standing: bool = False) -> TreeSeen:
        if standing and recipe in self.seen:
            entries = list(self.listings[self.seen[recipe].digest])
        else:
            entries = [entry for artifact in artifacts for entry in self._entries(artifact)]
        listing = tuple(sorted(entries, key=lambda entry: entry.path))
        if len({entry.path.casefold() for entry in listing}) != len(listing):
            raise UnpackRefused("two files have one path")
        if entrypoint not in {entry.path for entry in listing}:
            raise UnpackRefused(f"the entrypoint {entrypoint!r} is not among the files")
        seen = TreeSeen(
            digest=digest_of(listing),
            recipe=recipe,
            blobs=tuple(sorted({entry.digest for entry in listing})),
            bytes=sum(entry.size for entry in listing),
        )
        self.seen[recipe] = seen
        self.listings[seen.digest] = listing
        return seen

    def _entries(self, artifact: LockedArtifact) -> list[Listing]:
        if artifact.digest not in self._blobs.hot:
            raise StoreError(f"{artifact.digest} is not here")
        data = self._blobs.hot[artifact.digest]
        if not artifact.unpack:
            return [Listing(path=artifact.path, digest=artifact.digest, size=len(data))]
        try:
            files = members(data)
        except tarfile.TarError as error:
            raise UnpackRefused(str(error)) from None
        for content in files.values():
            self._blobs.keep(name_of(content), content)
        return [Listing(path=path, digest=name_of(content), size=len(content)) for path, content in files.items()]

    def relearned(self, name: str) -> TreeSeen:
        """Return the tree *name* as its links tell: a file that is no blob's is damage."""
        listing = self.listings.get(name, ())
        here = {entry.digest for entry in listing} & self._blobs.hot.keys()
        whole = bool(listing) and all(entry.digest in here for entry in listing)
        return TreeSeen(digest=name, recipe=name, blobs=tuple(sorted(here)), bytes=sum(entry.size for entry in listing), damaged=not whole)

    def remove(self, name: str) -> None:
        self.seen = {recipe: seen for recipe, seen in self.seen.items() if seen.digest != name}
        self.listings.pop(name, None)


class MemoryGenerations:
    """Generations in a list; the history of what was active is kept for tests to read."""

    def __init__(self) -> None:
        self.made: dict[int, Generation] = {}
        self.active = Generation()
        self.sequence: list[Generation] = []

    def current(self) -> Generation:
        return self.active

    def swap(self, entries: Mapping[str, ActiveModel]) -> Generation:
        number = max(self.made, default=0) + 1
        self.made[number] = Generation(number=number, entries={model: entries[model] for model in sorted(entries)})
        return self.reactivate(number)

    def reactivate(self, number: int) -> Generation:
        if number not in self.made:
            raise StoreError(f"there is no generation {number}")
        self.active = self.made[number]
        self.sequence.append(self.active)
        return self.active


class MemoryLedger:
    """Records in dictionaries."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.passes: dict[str, Passed] = {}
        self.reports: dict[str, TestReport] = {}
        self.running = False

    def put(self, record: Record) -> None:
        self.records[record.id] = record

    def forget(self, model: str) -> None:
        self.records.pop(model, None)
        self.passes.pop(model, None)
        self.reports.pop(model, None)

    def tested(self, model: str, report: TestReport, passed: Passed | None, at: datetime) -> None:
        self.records.setdefault(model, Record(id=model, state="pending"))
        self.reports[model] = report
        self.passes.pop(model, None)
        if passed is not None:
            self.passes[model] = passed

    def set_running(self, *, running: bool) -> None:
        self.running = running


class MemoryKeeper:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.recovered = 0
        self.quarantined: list[tuple[str, str]] = []
        self.swept = 0

    def recover(self) -> None:
        self.recovered += 1

    def quarantine(self, model: str, report: TestReport | None, detail: str, tree: str) -> None:
        self.quarantined.append((model, detail))

    def collect_garbage(self) -> None:
        self.swept += 1


class MemoryGate:
    """Says what a test told it to say about a set of models."""

    def __init__(self, healthy: Callable[[Generation], str] = lambda _: "") -> None:
        self.told: list[int] = []
        self.asked: list[int] = []
        self.verdict = healthy

    def activated(self, generation: Generation) -> None:
        self.told.append(generation.number)

    def healthy(self, generation: Generation) -> str:
        self.asked.append(generation.number)
        return self.verdict(generation)


class MemoryTester:
    """Passes every model but those of which a test said otherwise: by id, with the verdict and the reason."""

    def __init__(self) -> None:
        self.verdicts: dict[str, tuple[str, str]] = {}
        self.crashes: set[str] = set()
        self.jobs: list[str] = []
        self.closed = False
        self._guard = threading.Lock()
        #: Every passed job is a line ``model tree`` of this file, which outlives the process.
        self.log: Path | None = None

    def engines(self) -> dict[str, str]:
        return {"llama-cpp": "0.3.36"}

    def close(self) -> None:
        self.closed = True

    def test(self, job: TestJob) -> TestReport:
        with self._guard:
            self.jobs.append(job.model)
        if job.model in self.crashes:
            raise RuntimeError("a bug")
        verdict, reason = self.verdicts.get(job.model, ("passed", ""))
        if verdict == "passed" and self.log is not None:
            with self.log.open("a") as log:
                log.write(f"{job.model} {job.tree.name}\n")
        return TestReport(verdict=verdict, reason=reason, tokens=4, device="cpu", engine="llama-cpp", engine_version="0.3.36")  # type: ignore[arg-type]  # a test says one of the three


# -- a node ----------------------------------------------------------------------------------------


class Word:
    """What a network says: items into locks."""

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


class MemoryNode(Word):
    """A node made of twins, with its own network."""

    def __init__(self) -> None:
        super().__init__(Network(), Internet())
        self.clock = Clock()
        self.heard = Heard()
        self.blobs = MemoryBlobs()
        self.trees = MemoryTrees(self.blobs)
        self.generations = MemoryGenerations()
        self.ledger = MemoryLedger()
        self.housekeeping = MemoryKeeper()
        self.hooks = MemoryGate()
        self.tester = MemoryTester()
        self.facts = FACTS
        self.policy = POLICY
        self.damaged: set[str] = set()

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
            heard=self._heard() if self.ledger.running else None,
        )

    def _relearned(self) -> dict[str, TreeSeen]:
        """Return what serves and the ledger forgot, as its links tell."""
        forgotten = {entry.tree for entry in self.generations.active.entries.values()} - {tree.digest for tree in self.trees.seen.values()}
        return {tree: self.trees.relearned(tree) for tree in forgotten}

    def _heard(self) -> Generation | None:
        swaps = [event for event in self.heard.events if isinstance(event, Swapped)]
        number = swaps[-1].generation if swaps else 0
        return None if number == self.generations.active.number else self.generations.made.get(number, Generation())

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
            hooks=self.hooks,
            fetcher=StagingFetcher(staging, self.internet),
            tester=self.tester,
            report=self.heard,
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


def changed(value: Any, **changes: Any) -> Any:
    """Return a struct with some fields changed."""
    return msgspec.structs.replace(value, **changes)
