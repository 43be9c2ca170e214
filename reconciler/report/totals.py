"""
The downloads of a run as a whole: how much of all has arrived, at which rate, and how long the rest takes.

A terminal shows it as a bar; a log gets a line at times. What an earlier run left counts as arrived, and is named.
"""

from __future__ import annotations

from msgspec import Struct

from reconciler.core import units
from reconciler.core.events import BlobReady, Event, FetchProgress, RunEnded, RunStarted

#: A line in a log comes after so many seconds, or sooner when so large a share more has arrived, at most each ``_LEAST_SECONDS``.
LINE_SECONDS = 10.0
LINE_SHARE = 0.05
_LEAST_SECONDS = 1.0


class _File(Struct):
    done: int = 0
    resumed: int = 0
    rate: int = 0


class Totals:
    """The sum of a run's downloads, from its events."""

    def __init__(self) -> None:
        self._planned = 0
        self._files: dict[str, _File] = {}

    def update(self, event: Event) -> None:
        """Take *event* into account."""
        match event:
            case RunStarted():
                self._planned, self._files = event.download_bytes, {}
            case FetchProgress():
                self._files[event.digest] = _File(event.done, event.resumed, event.rate if event.done < event.total else 0)
            case BlobReady():
                before = self._files.get(event.digest, _File())
                self._files[event.digest] = _File(event.size, before.resumed, 0)
            case RunEnded():
                self._planned, self._files = 0, {}
            case _:
                pass

    @property
    def total(self) -> int:
        """Bytes of all downloads; 0 outside of a run."""
        return max(self._planned, self.done)

    @property
    def done(self) -> int:
        """Bytes that have arrived."""
        return sum(file.done for file in self._files.values())

    @property
    def rate(self) -> int:
        """Bytes a second."""
        return sum(file.rate for file in self._files.values())

    @property
    def text(self) -> str:
        """``1.2 of 9.8 GiB, 12 %, 45.0 MiB/s, 3m 12s left, 1.0 GiB of it from an earlier run``."""
        left, rate = self.total - self.done, self.rate
        words = [f"{units.human_size(self.done)} of {units.human_size(self.total)}", f"{100 * self.done // max(self.total, 1)} %"]
        words += [f"{units.human_size(rate)}/s", f"{units.human_time(left / rate)} left"] if rate and left else []
        resumed = sum(file.resumed for file in self._files.values())
        words += [f"{units.human_size(resumed)} of it from an earlier run"] if resumed else []
        return ", ".join(words)


class LineTimer:
    """Says when a log gets a line about downloads; *now* are seconds of a clock that only goes forward."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._share = 0.0

    def is_due(self, totals: Totals, now: float) -> bool:
        """Whether a line is due; the first one after ``LINE_SECONDS``, since a short download needs none."""
        share = totals.done / max(totals.total, 1)
        if self._at is None:
            self._at, self._share = now, share
            return False
        waited = now - self._at
        if waited < _LEAST_SECONDS or (waited < LINE_SECONDS and share - self._share < LINE_SHARE):
            return False
        self._at, self._share = now, share
        return True

    def restart(self) -> None:
        """Forget what was: another run begins."""
        self._at = None
