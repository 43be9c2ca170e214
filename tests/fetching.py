"""What the tests of fetching share: settings that do not wait, wants made from bytes, and a run that always ends."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import random
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from reconciler.core.events import Event, FetchProgress, Incident
from reconciler.fetch.settings import FetchSettings
from reconciler.ports import Fetched, Fetcher, FetchFailed, Want

#: A run of these tests that takes longer is hung.
HUNG_SECONDS = 90.0

#: Short limits; small blobs go through aria2 too.
FAST = FetchSettings(
    connections=4, concurrent=4, timeout_seconds=1.5, slow_seconds=1.5, attempts=2, backoff_seconds=0.02, backoff_cap_seconds=0.5,
    rpc_seconds=2.0, direct_bytes=0,
)  # fmt: skip

#: As for small blobs, which come with the answer that resolves their source.
DIRECT = msgspec.structs.replace(FAST, direct_bytes=1 << 30)

LARGE = 5 * (1 << 20) + 12345
SMALL = 40_000


def some(size: int, seed: int = 0) -> bytes:
    """Return *size* bytes that are always the same for the same *seed*."""
    return random.Random(seed).randbytes(size)


def name_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def want(data: bytes, *urls: str) -> Want:
    return Want(digest=name_of(data), size=len(data), sources=urls)


class EventRecorder:
    """A reporter that records all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event, /) -> None:
        self.events.append(event)

    @property
    def incidents(self) -> list[Incident]:
        return [event for event in self.events if isinstance(event, Incident)]

    @property
    def progress(self) -> list[FetchProgress]:
        return [event for event in self.events if isinstance(event, FetchProgress)]

    def kinds(self) -> set[str]:
        return {incident.kind for incident in self.incidents}


def collect(fetcher: Fetcher, wants: Sequence[Want], recorder: EventRecorder | None = None) -> dict[str, Fetched | FetchFailed]:
    """Fetch *wants* to the end and return the outcomes by digest; a run that does not end fails the test and shows where it hangs."""
    outcomes: dict[str, Fetched | FetchFailed] = {}
    raised: list[BaseException] = []

    def run() -> None:
        try:
            for outcome in fetcher.fetch(wants, recorder or EventRecorder()):
                assert outcome.digest not in outcomes
                outcomes[outcome.digest] = outcome
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HUNG_SECONDS)
    if thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
        pytest.fail("the fetch does not end")
    if raised:
        raise raised[0]
    assert set(outcomes) == {it.digest for it in wants}
    return outcomes


def good(outcome: Fetched | FetchFailed, data: bytes) -> Fetched:
    """Check that *outcome* is ``Fetched``, and that its file and numbers are those of *data*."""
    assert isinstance(outcome, Fetched), outcome
    seen = outcome.path.lstat()
    assert outcome.path.read_bytes() == data
    assert (outcome.size, outcome.device, outcome.inode, outcome.mtime_ns) == (len(data), seen.st_dev, seen.st_ino, seen.st_mtime_ns)
    assert outcome.digest == name_of(data)
    return outcome


def files_under(root: Path) -> list[Path]:
    """Return what lies under *root*, without the lock."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".fetch.lock")


def children_of(pid: int) -> set[int]:
    """Return the processes whose parent is *pid*."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(entry.name))
    return found


def named(pids: Iterable[int], name: str) -> list[int]:
    """Return those of *pids* that run *name*."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                found.append(pid)
    return found


def my_aria2() -> list[int]:
    return named(children_of(os.getpid()), "aria2c")
