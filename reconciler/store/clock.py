"""
Ages that a wrong clock does not change: what goes after a time goes neither before it, nor is it kept until a date that never was.

Rules that hold here:

1. The grace period is counted in seconds in which this machine ran, by ``CLOCK_BOOTTIME`` (clock_gettime(2)), suspended time included.
   Setting the clock changes nothing, within one boot or across boots.
2. Of the time between the last run of one boot and the first of the next, only what has passed since the machine started counts. For the
   rest there is nothing but the clock, which may have been wrong before or be wrong now. So bytes never go early; those of a machine that
   was off stay longer by the time that it was off, and by the time from its last run until it was switched off.
3. Records keep times of the clock as it is set now. Whatever it moved by, other than by the time that was counted, they are moved by too.
4. A time in the future counts as now, and is written so: it is no reason to keep anything longer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.state import Record
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: A clock that was moved by less than this was not set, only read a moment later.
_STEP_SECONDS = 1.0


class BootTime(NamedTuple):
    """Which boot this is (empty: not known, so that it equals no other), and the seconds since it began."""

    boot: str
    seconds: float


class ClockReading(Struct, frozen=True, kw_only=True):
    """What the clocks said at the beginning of a run; seconds since 1970 where nothing else is said."""

    boot: str
    #: Seconds since this boot began.
    boot_seconds: float
    wall: float


def boot_time() -> BootTime:
    """Return which boot this is, and how long it has lasted."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = _BOOT_ID.read_text().strip()
    return BootTime(boot, since_boot())


def since_boot() -> float:
    """Return seconds that nobody can set, and that a suspended machine counts too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def run_clock(clock: Callable[[], datetime], timer: Callable[[], float] = since_boot) -> Callable[[], datetime]:
    """Return the clock of one run: *clock* is read once and goes on by *timer*, so that setting the clock meanwhile moves nothing."""
    began, at = clock(), timer()
    return lambda: began + timedelta(seconds=timer() - at)


def follow(layout: Layout, ledger: Ledger, now: datetime, boot: BootTime) -> None:
    """
    Move the times that decide what goes by what the clock was moved by since the last run, which *now* begins anew.

    The caller holds the store, and deletes nothing before.
    """
    reading, moved = next_reading(ledger.fact("clock", ClockReading), now, boot)
    wall = reading.wall
    records = [record for record in ledger.records().values() if record.unlisted_since or record.unhealthy_at]
    ledger.follow_clock([_moved(record, moved, now) for record in records], reading)
    for path in _entries(layout.generations):  # the next one's time is when a generation stopped serving
        _set_time(path, moved, wall)
    for path in _entries(layout.staging):
        _set_time(path, 0.0, wall)
    for path in _entries(layout.cold / "blobs", "*/*/.*.damaged"):
        with contextlib.suppress(OSError):
            if path.lstat().st_ctime > wall + _STEP_SECONDS and not path.is_symlink():
                path.chmod(path.lstat().st_mode & 0o7777)  # sets its ctime to now


def next_reading(before: ClockReading | None, now: datetime, boot: BootTime) -> tuple[ClockReading, float]:
    """Return the reading of *now*, and the seconds by which the clock was set since *before*."""
    wall = now.timestamp()
    moved = wall - before.wall - counted_seconds(before, boot) if before else 0.0
    reading = ClockReading(boot=boot.boot, boot_seconds=boot.seconds, wall=wall)
    return reading, moved if abs(moved) >= _STEP_SECONDS else 0.0


def counted_seconds(before: ClockReading, boot: BootTime) -> float:
    """Return how many seconds the machine certainly ran between *before* and *boot*, which is now (rules 1 and 2)."""
    if boot.boot and boot.boot == before.boot:
        return max(boot.seconds - before.boot_seconds, 0.0)
    return boot.seconds if boot.boot and before.boot else 0.0


def _moved(record: Record, seconds: float, now: datetime) -> Record:
    def move(at: datetime | None) -> datetime | None:
        if at is None or (not seconds and at <= now):
            return at
        return datetime.fromtimestamp(min(at.timestamp() + seconds, now.timestamp()), UTC)

    return replace(record, unlisted_since=move(record.unlisted_since), unhealthy_at=move(record.unhealthy_at))


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what there is; nothing where the system refuses, since a time that is not moved costs no more than a delay."""
    with contextlib.suppress(OSError):
        return list(folder.glob(pattern))
    return []


def _set_time(path: Path, moved: float, wall: float) -> None:
    """Move the time of *path*, and let one in the future be now. It is no more than a hint: what refuses stays as it is."""
    with contextlib.suppress(OSError):
        before = path.lstat().st_mtime
        after = min(before + moved, wall)
        if abs(after - before) >= _STEP_SECONDS:
            os.utime(path, (after, after), follow_symlinks=False)
