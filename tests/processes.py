"""Processes seen from outside: until something holds, and until they have ended."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable

import psutil


def until(holds: Callable[[], bool], running: subprocess.Popen[str], *, within: float = 30.0) -> None:
    """Wait until something holds while *running* runs; its end before that, and no end of the wait, is a failure."""
    end = time.monotonic() + within
    while not holds():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)  # what is waited for is different for each caller, and nothing tells of all of it


def outliving(pids: Iterable[int], *, within: float = 20.0) -> list[int]:
    """Return those of *pids* that still run *within* seconds from now: what was killed takes a moment to be gone."""
    seen = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(seen, timeout=within)
    return [process.pid for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
