"""
The queue of statuses that are still to be sent: a folder in the store.

Rules that hold here:

1. The queue is bounded (``MOST``); where it is full, the oldest goes. The newest always finds room.
2. A status is made where the content differs from that of the last one, and once an hour.
3. After a failure nothing is sent until a time that is drawn at random from a span that doubles, up to an hour. Where the receiver asks
   for a longer one it is obeyed, up to ``LONGEST_SECONDS``. The time is on disk: a new process does not forget it.
4. One process at a time works on the queue. Another one leaves it alone, and so does a run that finds it damaged or the disk full:
   nothing here ever fails a run.
5. The queue is not the record of anything: to lose it costs the statuses in it, and no number is given twice (``statement``, rule 5).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from reconciler.store import atomic

#: Statuses that wait at most.
MOST = 64
#: The longest time between two statuses.
EVERY_SECONDS = 3600.0
#: The part of that time by which a status may come earlier, drawn anew each time: nodes that started together do not stay together.
EARLIER = 0.25
#: The span from which the wait after the first failure is drawn, and the longest wait.
FIRST_SECONDS = 30.0
LONGEST_SECONDS = 3600.0


class State(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is remembered beside the statuses."""

    sequence: int = 0  #: Of the last status.
    content: str = ""  #: Digest of what it said.
    due_at: datetime | None = None  #: When the next one is made, whatever it says.
    failures: int = 0  #: Attempts to send that failed in a row.
    retry_at: datetime | None = None  #: Nothing is sent before.


class Outbox:
    """The queue in *folder*; the caller holds ``lock_file``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def lock_file(self) -> Path:
        """The file whose lock keeps it to one process."""
        return self._folder / ".lock"

    def state(self) -> State:
        """Return what is remembered; a missing or damaged file is as a new queue's."""
        try:
            return msgspec.json.decode(atomic.read(self._folder / "state.json"), type=State)
        except (OSError, msgspec.DecodeError):
            return State()

    def waiting(self) -> list[Path]:
        """Return the statuses that are to be sent, the oldest first."""
        return sorted(path for path in self._folder.glob("*.status.json") if path.is_file())

    def add(self, content: str, make: Callable[[int], bytes], now: datetime, *, draw: Callable[[], float] = random.random) -> bool:
        """
        Add the status that *make* returns for its sequence number, where *content* is new or it is time; return whether it was added.

        Raises:
            StoreError: the disk refused.
        """
        state = self.state()
        if content == state.content and not _is_over(state.due_at, now, EVERY_SECONDS):
            return False
        number = max(state.sequence + 1, int(now.timestamp() * 1000))
        data = make(number)
        due = now + timedelta(seconds=EVERY_SECONDS * (1 - EARLIER * draw()))
        # The number first: whatever happens between the two writes, no later status has the same.
        self._keep(replace(state, sequence=number, content="", due_at=due))
        for oldest in self.waiting()[: max(0, len(self.waiting()) + 1 - MOST)]:
            oldest.unlink(missing_ok=True)
        atomic.write(self._folder / f"{number:016d}.status.json", data)
        self._keep(replace(state, sequence=number, content=content, due_at=due))
        return True

    def may_send(self, now: datetime) -> bool:
        """Return whether the wait after the last failure is over."""
        return _is_over(self.state().retry_at, now, LONGEST_SECONDS)

    def sent(self, paths: list[Path]) -> None:
        """Take *paths*, which were sent or will never be, out of the queue."""
        for path in paths:
            path.unlink(missing_ok=True)
        state = self.state()
        if state.failures:
            self._keep(replace(state, failures=0, retry_at=None))

    def failed(self, now: datetime, *, asked_seconds: float = 0.0, draw: Callable[[], float] = random.random) -> None:
        """Remember that sending failed, and when it may be tried again; *asked_seconds* is what the receiver asked for."""
        state = self.state()
        span = min(FIRST_SECONDS * 2.0 ** min(state.failures, 20), LONGEST_SECONDS)
        wait = max(draw() * span, min(asked_seconds, LONGEST_SECONDS))
        self._keep(replace(state, failures=state.failures + 1, retry_at=now + timedelta(seconds=wait)))

    def _keep(self, state: State) -> None:
        atomic.write(self._folder / "state.json", msgspec.json.encode(state))


def _is_over(until: datetime | None, now: datetime, longest_seconds: float) -> bool:
    """Return whether *until* is over; a time that lies further ahead than it can is of a clock that was wrong."""
    return until is None or until.tzinfo is None or now >= until or until > now + timedelta(seconds=longest_seconds)
