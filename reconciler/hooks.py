"""
The operator's commands around a swap: ``activated`` is told of it, ``healthy`` is asked about it.

Both get the new generation's index on standard input. Neither can stop the engine: ``activated``'s failure is a warning, and
``healthy`` has its time and no more; its whole process group ends with it.
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

from reconciler.core.state import Generation
from reconciler.ports import Notice, Reporter

_TOLD_SECONDS = 60.0
#: How many characters of what a failing command said are passed on.
_WORDS = 300


class CommandHooks:
    """The gate that asks the operator's commands; an empty command agrees to everything."""

    def __init__(
        self,
        *,
        activated: tuple[str, ...],
        healthy: tuple[str, ...],
        healthy_seconds: float,
        index: Callable[[Generation], Path],
        report: Reporter,
    ) -> None:
        self._activated = activated
        self._healthy = healthy
        self._healthy_seconds = healthy_seconds
        self._index = index
        self._report = report

    def activated(self, generation: Generation) -> None:
        """Tell of a swap."""
        if self._activated:
            failure = _run(self._activated, self._index(generation), _TOLD_SECONDS)
            if failure:
                self._report(Notice(level="warning", text=f"the activated hook {failure}"))

    def healthy(self, generation: Generation) -> str:
        """Return why the node does not serve well; empty if it does, or if nobody is there to ask."""
        return _run(self._healthy, self._index(generation), self._healthy_seconds) if self._healthy else ""


def _run(argv: tuple[str, ...], index: Path, seconds: float) -> str:
    """Run *argv* with *index* on standard input; return how it failed, or nothing."""
    # What it says goes to a file and not through a pipe: what it leaves running may hold a pipe open, and would be waited for.
    with tempfile.TemporaryFile() as said:
        try:
            with index.open("rb") as told:
                child = subprocess.Popen(argv, stdin=told, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        except OSError as error:
            return f"could not be started: {error}"
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end_group(child)
            return f"did not answer within {seconds:g} seconds"
        if child.returncode == 0:
            return ""
        text = _last_words(said)
        return f"exited with {child.returncode}{': ' + text if text else ''}"


def _last_words(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4 * _WORDS))
    return said.read(4 * _WORDS).decode(errors="replace").strip()[-_WORDS:]


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
