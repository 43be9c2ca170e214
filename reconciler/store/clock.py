"""
Ages that a wrong clock does not change: what goes after a time goes neither before it, nor is it kept until a date that never was.

Rules that hold here:

1. Within one boot, time is counted by ``CLOCK_BOOTTIME`` (clock_gettime(2)), suspended time included. Setting the clock changes nothing.
2. From one boot to the next there is only the clock, which may have been wrong before or be wrong now. Of all readings that agree with
   what was seen, the shortest time counts, and at most half of the grace period: nothing vouches for the clock of a new boot.
3. Records keep times of the clock as it is set now. Whatever it moved by, other than by the time that passed, they are moved by too.
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
    #: The latest time that the clock can truly have had: its highest reading, and what has passed since.
    latest: float


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


def follow(layout: Layout, ledger: Ledger, now: datetime, grace_seconds: float, boot: BootTime) -> None:
    """
    Move the times that decide what goes by what the clock was moved by since the last run, which *now* begins anew.

    The caller holds the store, and deletes nothing before.
    """
    reading, moved = next_reading(ledger.fact("clock", ClockReading), now, boot, most_seconds=grace_seconds / 2)
    wall = reading.wall
    records = [record for record in ledger.records().values() if record.unlisted_since is not None]
    ledger.follow_clock([_moved(record, moved, now) for record in records], reading)
    for path in _entries(layout.generations):  # the next one's time is when a generation stopped serving
        _set_time(path, moved, wall)
    for path in _entries(layout.staging):
        _set_time(path, 0.0, wall)
    for path in _entries(layout.cold / "blobs", "*/*/.*.damaged"):
        with contextlib.suppress(OSError):
            if path.lstat().st_ctime > wall + _STEP_SECONDS and not path.is_symlink():
                path.chmod(path.lstat().st_mode & 0o7777)  # sets its ctime to now


def next_reading(before: ClockReading | None, now: datetime, boot: BootTime, *, most_seconds: float) -> tuple[ClockReading, float]:
    """Return the reading of *now*, and the seconds by which the clock was set since *before*; *most_seconds*: see ``elapsed_seconds``."""
    wall = now.timestamp()
    passed = elapsed_seconds(before, wall, boot, most_seconds=most_seconds) if before else 0.0
    moved = wall - before.wall - passed if before else 0.0
    latest = max(before.latest + passed if before else wall, wall)
    reading = ClockReading(boot=boot.boot, boot_seconds=boot.seconds, wall=wall, latest=latest)
    return reading, moved if abs(moved) >= _STEP_SECONDS else 0.0


def elapsed_seconds(before: ClockReading, wall: float, boot: BootTime, *, most_seconds: float) -> float:
    """Return the seconds that passed since *before*; across boots the fewest that the clock's readings allow, and *most_seconds*."""
    if boot.boot and boot.boot == before.boot and boot.seconds >= before.boot_seconds:
        return boot.seconds - before.boot_seconds
    since = before.latest if wall >= before.latest else before.wall
    return min(max(wall - since, 0.0), most_seconds)


def _moved(record: Record, seconds: float, now: datetime) -> Record:
    assert record.unlisted_since is not None
    at = min(record.unlisted_since.timestamp() + seconds, now.timestamp())
    return replace(record, unlisted_since=datetime.fromtimestamp(at, UTC)) if seconds or record.unlisted_since > now else record


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
