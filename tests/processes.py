"""Processes seen from outside, until they have ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def outliving(pids: Iterable[int], *, within: float = 20.0) -> list[int]:
    """Return those of *pids* that still run *within* seconds from now: what was killed takes a moment to be gone."""
    seen = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(seen, timeout=within)
    return [process.pid for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
