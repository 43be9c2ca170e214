"""
Ports of a run whose adapters are made at their first use.

Most runs have nothing to do. The downloader, hashing, the unpacker, the sandbox and the engines are half of the program, and such a run
imports and starts none of them. Each class here has the methods of one port and passes them on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from reconciler import ports
from reconciler.core.errors import ReconcileError
from reconciler.core.lock import LockedArtifact
from reconciler.core.state import TreeSeen
from reconciler.ports import Fetched, FetchFailed, Reporter, TestJob, TestReport, Want

T_co = TypeVar("T_co", covariant=True)


class AtFirstUse(Generic[T_co]):
    """What *make* returns, made when it is first asked for, once, from whichever thread."""

    def __init__(self, make: Callable[[], T_co]) -> None:
        self._make = make
        self._guard = threading.Lock()
        self._made: list[T_co] = []

    def __call__(self) -> T_co:
        """Return it."""
        with self._guard:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    @property
    def made(self) -> tuple[T_co, ...]:
        """Return it if it was made, else nothing."""
        with self._guard:
            return tuple(self._made)


class Blobs:
    """The port ``Blobs``."""

    def __init__(self, make: AtFirstUse[ports.Blobs]) -> None:
        self._port = make

    def adopt(self, fetched: Sequence[Fetched]) -> dict[str, ReconcileError]:
        """Give verified files in staging their names, and return by digest why one did not get it."""
        return self._port().adopt(fetched)

    def check(self, name: str) -> bool:
        """Hash the blob in full; return whether it is good."""
        return self._port().check(name)

    def discard(self, name: str) -> None:
        """Delete the blob."""
        self._port().discard(name)

    def archive(self, name: str) -> None:
        """Move the blob to cold storage."""
        self._port().archive(name)

    def restore(self, name: str) -> None:
        """Move the blob back from cold storage."""
        self._port().restore(name)


class Trees:
    """The port ``Trees``."""

    def __init__(self, make: AtFirstUse[ports.Trees]) -> None:
        self._port = make

    def assemble(self, recipe: str, artifacts: Sequence[LockedArtifact], entrypoint: str, *, standing: bool = False) -> TreeSeen:
        """Make, or mend, the tree of *artifacts*."""
        return self._port().assemble(recipe, artifacts, entrypoint, standing=standing)

    def remove(self, name: str) -> None:
        """Delete the tree."""
        self._port().remove(name)


class Fetcher:
    """The port ``Fetcher``."""

    def __init__(self, make: AtFirstUse[ports.Fetcher]) -> None:
        self._port = make

    def fetch(self, wants: Sequence[Want], report: Reporter) -> Iterator[Fetched | FetchFailed]:
        """Yield one outcome for each of *wants*."""
        return self._port().fetch(wants, report)

    def close(self) -> None:
        """End whatever was started, and what would begin later."""
        self._port().close()


class Tester:
    """The port ``Tester``."""

    def __init__(self, make: AtFirstUse[ports.Tester]) -> None:
        self._port = make

    def engines(self) -> dict[str, str]:
        """Return the installed engines with their versions."""
        return self._port().engines()

    def test(self, job: TestJob) -> TestReport:
        """Run *job* and return its report."""
        return self._port().test(job)

    def close(self) -> None:
        """End the job that runs, and each that would begin later."""
        self._port().close()
