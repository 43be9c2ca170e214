"""
Sizes and times as people write them: ``1GiB``, ``50MB``, ``24h``, ``7d``.

A number without a unit is bytes, or seconds. Nothing is guessed: an unknown unit is an error.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

_SIZES = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{0,3})", re.ASCII)


def size(text: str | int) -> int:
    """
    Return the bytes that *text* names.

    Raises:
        ValueError: not a size.
    """
    if isinstance(text, int):
        return text
    number, unit = _split(text, "512MiB or 10GiB")
    if unit not in _SIZES:
        raise ValueError(f"not a size: {text!r}; write it like 512MiB or 10GiB")
    return int(number * _SIZES[unit])


def seconds(text: str | float) -> float:
    """
    Return the seconds that *text* names.

    Raises:
        ValueError: not a duration.
    """
    if isinstance(text, int | float):
        return float(text)
    number, unit = _split(text, "90s, 5m, 24h or 7d")
    if unit not in _TIMES:
        raise ValueError(f"not a duration: {text!r}; write it like 90s, 5m, 24h or 7d")
    return number * _TIMES[unit]


def _split(text: str, example: str) -> tuple[float, str]:
    found = _NUMBER.fullmatch(text.strip())
    if not found:
        raise ValueError(f"not a number with a unit: {text[:40]!r}; write it like {example}")
    return float(found[1]), found[2]


def human_size(count: float) -> str:
    """Return *count* bytes for people: ``4.1 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def count(number: int, noun: str) -> str:
    """Return how many there are of a regular *noun*, for people: ``1 model``, ``3 models``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def human_time(duration: float) -> str:
    """Return *duration* seconds for people: ``1h 12m``, ``0.3s``."""
    if duration < 60:
        return f"{duration:.1f}s" if duration < 10 else f"{duration:.0f}s"
    minutes, _ = divmod(int(duration), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {int(duration) % 60}s"


def age_seconds(then: datetime, now: datetime) -> float:
    """Return the seconds from *then* to *now*, never below 0: a time in the future, which a wrong clock wrote, counts as now."""
    return max((now - then).total_seconds(), 0.0)


def rfc3339(instant: datetime) -> str:
    """Return *instant* in UTC as ``2026-11-20T00:00:00Z`` (RFC 3339), whole seconds."""
    return f"{instant.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='seconds')}Z"  # strftime's %Y does not pad
