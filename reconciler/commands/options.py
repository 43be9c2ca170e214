"""What the command line says about a run, and the clock that a run reads."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from msgspec import Struct

Clock = Callable[[], datetime]


def wall_clock() -> datetime:
    """Return the instant; read once a run wherever an instant decides."""
    return datetime.now(UTC)


class Options(Struct, frozen=True, kw_only=True):
    """What the command line says about a run."""

    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    #: The lock must be what the snapshot compiles to; a new one is never fetched.
    locked: bool = False
    #: No network at all.
    offline: bool = False
    lock_timeout_seconds: float = 0.0
