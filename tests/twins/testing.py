"""Memory twins of what decides about a model and a set of models, and of what is told of a set: ``Tester``, ``Servers`` and ``Hooks``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from reconciler.core.state import Generation, ServerState
from reconciler.ports import TestJob, TestReport


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
        report = TestReport(verdict="passed", tokens=4, device="cpu", engine="llama-cpp", engine_version="0.3.36", compared=9)
        return report if verdict == "passed" else replace(report, verdict=verdict, reason=reason, compared=0)


class MemoryServers:
    """Servers that take every set at once, and record which."""

    def __init__(self) -> None:
        self.told: list[int] = []
        #: They take nothing new.
        self.lag = False

    def follow(self, generation: Generation) -> tuple[ServerState, ...]:
        if self.told[-1:] != [generation.number] and not self.lag:
            self.told.append(generation.number)
        return (ServerState(name="main", kind="command", generation=self.told[-1] if self.told else 0),)


class MemoryHooks:
    """Answers as *healthy* does about a set of models, and records which sets it was told of and asked about."""

    def __init__(self, healthy: Callable[[Generation], str] = lambda _: "") -> None:
        self.told: list[int] = []
        self.asked: list[int] = []
        self.verdict = healthy

    def activated(self, generation: Generation) -> None:
        if self.told[-1:] != [generation.number]:
            self.told.append(generation.number)

    def healthy(self, generation: Generation) -> str:
        self.asked.append(generation.number)
        return self.verdict(generation)
