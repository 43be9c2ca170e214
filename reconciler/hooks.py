"""
The operator's commands around a swap: ``activated`` runs after it, ``healthy`` checks the node after it.

Both get the new generation's index on standard input, and run in the settings' folder, so that relative paths among their arguments
are relative to the settings' file and not to wherever the caller is. Neither can stop the run: a failure of ``activated`` is a warning,
and ``healthy`` is killed with its whole process group when its time is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from reconciler.core.events import Notice
from reconciler.core.state import Generation
from reconciler.ports import Reporter

_ACTIVATED_SECONDS = 60.0
#: How many characters of a failing command's standard error are reported.
_ERROR_CHARACTERS = 300


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
        report: Reporter,
    ) -> None:
        self._activated = activated
        self._healthy = healthy
        self._healthy_seconds = healthy_seconds
        self._folder = folder
        self._index = index
        self._report = report

    def activated(self, generation: Generation) -> None:
        """Run the command ``activated``; report a warning if it fails."""
        if self._activated:
            failure = self._run(self._activated, generation, _ACTIVATED_SECONDS)
            if failure:
                self._report(Notice(level="warning", text=f"the activated hook {failure}"))

    def healthy(self, generation: Generation) -> str:
        """Run the command ``healthy``; return why the node is not healthy, or an empty text if it is or no command is set."""
        return self._run(self._healthy, generation, self._healthy_seconds) if self._healthy else ""

    def _run(self, argv: tuple[str, ...], generation: Generation, seconds: float) -> str:
        return _run(argv, self._index(generation), self._folder, seconds)


def _run(argv: tuple[str, ...], index: Path, folder: Path, seconds: float) -> str:
    """Run *argv* in *folder* with *index* on standard input; return how it failed, or an empty text."""
    # Standard error goes to a file and not through a pipe: a process that the command leaves running may hold a pipe open for ever.
    with tempfile.TemporaryFile() as errors:
        try:
            with index.open("rb") as given:
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
