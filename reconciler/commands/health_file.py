"""``health.json``: how the agent is, for programs that watch it. Written whole or not at all, before and after each cycle."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from reconciler.commands import load_lock
from reconciler.settings import Settings
from reconciler.store import atomic

Word = Literal["done", "models-failed", "busy", "refused", "error"]
Phase = Literal["working", "waiting", "stopped"]


class Health(Struct, frozen=True, kw_only=True):
    """``<store>/health.json``: whether the agent works, for programs that watch it."""

    schema: int = 1
    phase: Phase
    #: How the last cycle ended; null before the first one has.
    outcome: Word | None = None
    message: str = ""
    started_at: datetime
    ended_at: datetime | None = None
    seconds: float = 0.0
    succeeded_at: datetime | None = None
    #: When the next cycle begins; null while one goes on, and once the agent stopped.
    next_at: datetime | None = None
    #: Cycles in a row that failed.
    failures: int = 0
    #: How many cycles ended how, over restarts.
    totals: dict[str, int] = {}


def path(settings: Settings) -> Path:
    """Return where the agent writes how it is."""
    return load_lock.store_layout(settings).root / "health.json"


def read(settings: Settings) -> Health | None:
    """Return what the last agent wrote, or None."""
    try:
        return msgspec.json.decode(path(settings).read_bytes(), type=Health)
    except (OSError, msgspec.DecodeError):
        return None


def write(settings: Settings, health: Health) -> None:
    """Say *health*; raises StoreError."""
    atomic.make_folder(settings.store_path)
    atomic.write(path(settings), msgspec.json.encode(health) + b"\n")
