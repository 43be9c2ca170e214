"""
The operator's commands after the last swap of a run: ``activated`` is told of it, ``healthy`` then checks the node.

``activated`` runs once for each generation, and again in each run until it succeeded; what it was told of last is remembered.

Both get the new generation's index on standard input, and run in the settings' folder, so that relative paths among their arguments
are relative to the settings' file and not to wherever the caller is. Neither can stop the run: a failure of ``activated`` is a warning,
and ``healthy`` is killed with its whole process group when its time is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from reconciler.core.events import Incident, Notice
from reconciler.core.state import Generation
from reconciler.ports import Reporter

if TYPE_CHECKING:
    import subprocess

_ACTIVATED_SECONDS = 60.0
#: How many characters of a failing command's standard error are reported.
_ERROR_CHARACTERS = 300


class Told(Struct, frozen=True, kw_only=True):
    """What the command ``activated`` was told of last, and how that ended."""

    generation: int
    at: datetime
    #: How it failed; empty: it succeeded.
    error: str = ""
    #: How often it has failed in a row, for this generation or those before it.
    failures: int = 0
    #: The last generation for which it succeeded; 0: none yet.
    succeeded: int = 0


class Memory(Protocol):
    """Where facts are remembered between runs: the ledger."""

    def fact(self, key: str, kind: Any) -> Any:
        """Return what is remembered under *key*, or None."""
        ...

    def set_fact(self, key: str, value: object) -> None:
        """Remember *value* under *key*."""
        ...


TOLD = "activated"


class CommandHooks:
    """Runs the operator's commands; an empty command succeeds."""

    def __init__(
        self,
        *,
        activated: tuple[str, ...],
        healthy: tuple[str, ...],
        healthy_seconds: float,
        folder: Path,
        index: Callable[[Generation], Path],
        memory: Memory,
        now: Callable[[], datetime],
        report: Reporter,
    ) -> None:
        self._activated = activated
        self._healthy = healthy
        self._healthy_seconds = healthy_seconds
        self._folder = folder
        self._index = index
        self._memory = memory
        self._now = now
        self._report = report

    def activated(self, generation: Generation) -> None:
        """Run the command ``activated`` unless it has succeeded for *generation*; a failure is a warning, and the first one an incident."""
        if not self._activated or not generation.number:
            return
        before: Told | None = self._memory.fact(TOLD, Told)
        if before is not None and before.generation == generation.number and not before.error:
            return
        failure = self._run(self._activated, generation, _ACTIVATED_SECONDS)
        failures = (before.failures if before else 0) + 1 if failure else 0
        succeeded = generation.number if not failure else before.succeeded if before else 0
        told = Told(generation=generation.number, at=self._now(), error=failure, failures=failures, succeeded=succeeded)
        self._memory.set_fact(TOLD, told)
        if failure:
            self._report(Notice(level="warning", text=f"the activated hook {failure}; it is run again in the next run"))
        if failures == 1:
            self._report(Incident(kind="hook-failed", detail=f"the activated hook {failure}"))

    def healthy(self, generation: Generation) -> str:
        """Run the command ``healthy``; return why the node is not healthy, or an empty text if it is or no command is set."""
        return self._run(self._healthy, generation, self._healthy_seconds) if self._healthy else ""

    def _run(self, argv: tuple[str, ...], generation: Generation, seconds: float) -> str:
        try:
            given = self._index(generation).open("rb")
        except OSError as error:
            return f"could not be started: {error}"
        with given:
            return run(argv, given, self._folder, seconds)


def run(argv: tuple[str, ...], given: IO[bytes], folder: Path, seconds: float) -> str:
    """Run *argv* in *folder* with the file *given* on standard input; return how it failed, or an empty text."""
    import subprocess  # with all that starts processes: a status, and a run without hooks, start none
    import tempfile

    # Standard error goes to a file and not through a pipe: a process that the command leaves running may hold a pipe open for ever.
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(argv, stdin=given, stdout=subprocess.DEVNULL, stderr=errors, cwd=folder, start_new_session=True)
        except OSError as error:
            return f"could not be started: {error}"
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end_group(child)
            return f"did not answer within {seconds:g} seconds"
        if child.returncode == 0:
            return ""
        text = _end_of(errors)
        return f"exited with {child.returncode}{': ' + text if text else ''}"


def _end_of(file: IO[bytes]) -> str:
    """Return the last characters of *file*."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * _ERROR_CHARACTERS))
    return file.read(4 * _ERROR_CHARACTERS).decode(errors="replace").strip()[-_ERROR_CHARACTERS:]


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
