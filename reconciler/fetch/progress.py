"""
How far transfers have come: whether one is slow, stuck or further than ever, and when the downloader is worth asking again.

Bytes and seconds; the clock is the caller's, and so is what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from reconciler.fetch import aria2_protocol
from reconciler.fetch.settings import FetchSettings

POLL_SECONDS = 0.25
_SHORTEST_POLL_SECONDS = 0.01
#: A download that is young may end before its speed is known: it is asked about again after so much of its age.
_OF_ITS_AGE = 0.25


class Progress:
    """The progress of one file of *size* bytes: *done* of them are in staging, and come in at *speed* bytes a second."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.done = self.speed = 0
        self._resumed = self._furthest = 0
        self._watched_at, self._watched_done = 0.0, 0
        self.started_at = 0.0

    def restart(self, resumed: int) -> None:
        """Begin an attempt with *resumed* bytes that are there already."""
        self.done = self._resumed = resumed

    def update(self, done: int, speed: int) -> None:
        """Take what the downloader says: until it has opened the file it says 0, and what an earlier run left is there all the same."""
        self.done, self.speed = done or self._resumed, speed

    def start(self, now: float) -> None:
        """Begin to download."""
        self.started_at = now
        self.watch(now)

    def watch(self, now: float) -> None:
        """Measure from here on whether it is slow."""
        self._watched_at, self._watched_done = now, self.done

    def is_slow(self, now: float, settings: FetchSettings) -> bool:
        """Whether it was slower than the settings permit, for as long as they permit that; it is measured anew then."""
        seconds, gained = now - self._watched_at, self.done - self._watched_done
        if seconds < settings.slow_seconds:
            return False
        self.watch(now)
        return gained < aria2_protocol.least_rate(settings) * seconds

    def is_stuck(self) -> bool:
        """Whether this attempt brought nothing to what was there before."""
        return self.done <= self._resumed

    def is_further(self) -> bool:
        """Whether this attempt came clearly further than any before it; from now on it counts as one before."""
        if self.is_stuck() or self.done <= self._furthest + max(self.size // 64, 1):
            return False
        self._furthest = self.done
        return True


def poll_interval(files: Sequence[Progress], polled_at: float) -> float:
    """Return for how many seconds after *polled_at* to wait: half of the time until the next of *files* should end, within limits."""
    left = [(file.size - file.done) / file.speed / 2 for file in files if file.speed > 0]
    young = [_OF_ITS_AGE * (polled_at - file.started_at) for file in files]
    return min(max(min(left + young), _SHORTEST_POLL_SECONDS), POLL_SECONDS)
