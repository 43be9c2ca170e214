"""Memory twins of the store: blobs, trees, generations, the ledger and housekeeping."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from datetime import datetime

from reconciler.core import digest
from reconciler.core.errors import BlobDamaged, HashMismatch, InternalError, ReconcileError, StoreError, UnpackRefused
from reconciler.core.lock import LockedArtifact
from reconciler.core.state import ActiveModel, Generation, Passed, Record, TreeSeen
from reconciler.ports import Fetched, TestReport
from reconciler.store.ledger import Listing
from reconciler.store.trees import digest_of
from tests.twins.content import name_of, tar_members


class MemoryBlobs:
    """Blobs in a dictionary, hot and cold. ``doubtful`` ones must be hashed again before they are used."""

    def __init__(self) -> None:
        self.hot: dict[str, bytes] = {}
        self.cold: dict[str, bytes] = {}
        self.doubtful: set[str] = set()

    def adopt(self, fetched: Sequence[Fetched]) -> dict[str, ReconcileError]:
        failures: dict[str, ReconcileError] = {}
        for one in fetched:
            try:
                self._adopt(one)
            except ReconcileError as error:
                failures[one.digest] = error
        return failures

    def _adopt(self, fetched: Fetched) -> None:
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
            files = tar_members(data)
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
        if report.verdict == "unable":  # what was tested before still counts
            return
        self.records.setdefault(model, Record(id=model, state="pending"))
        self.reports[model] = report
        self.passes.pop(model, None)
        if passed is not None:
            self.passes[model] = passed

    def set_running(self, *, running: bool) -> None:
        self.running = running


class MemoryHousekeeping:
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

    def report_bug(self, error: Exception, model: str) -> InternalError:
        return InternalError(f"{type(error).__name__}: {error}")
