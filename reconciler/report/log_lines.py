"""
Events as lines of a log, for the agent: with time and level as text, as JSON, or with the priorities that systemd's journal reads.

Rules that hold here:

1. A run that changes nothing leaves no line, but for the first and one each day: a log that says "nothing to do" every five minutes hides
   what matters.
2. What fails is written each time.
3. One line is one record: text from outside is escaped (``core.text.printable``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import IO, Literal

import msgspec

from reconciler.core import units
from reconciler.core.events import Event, FetchProgress, HashProgress, Incident, ModelDone, ModelPhase, Notice, RunEnded, RunStarted
from reconciler.report.events import sentence

LogFormat = Literal["text", "json", "journald"]
Level = Literal["debug", "info", "warning", "error"]
#: sd-daemon(3): the priority of a line that begins so.
_PRIORITIES: dict[Level, str] = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}
_QUIET_SECONDS = 86400.0


class LogLines:
    """A reporter that writes a log. A failed write does not end the run; it is kept in ``failure``."""

    def __init__(
        self, stream: IO[str], form: LogFormat, now: Callable[[], datetime], *, quiet: bool = False, verbose: bool = False
    ) -> None:
        self._stream = stream
        self._form = form
        self._now = now
        self._quiet = quiet
        self._verbose = verbose
        self._begun: RunStarted | None = None
        self._idle_at: datetime | None = None
        self._guard = threading.Lock()
        #: The first failed write, after which nothing more is written.
        self.failure: OSError | None = None

    def __call__(self, event: Event, /) -> None:
        """Write one event, if it is important enough."""
        with self._guard:
            if isinstance(event, RunStarted):
                self._begun = event  # written with the first thing that the run does
            elif isinstance(event, RunEnded) and self._is_idle(event):
                self._begun = None
            elif self._wanted(event):
                if self._begun is not None and not isinstance(event, Notice | RunEnded):
                    self._write(self._begun)
                    self._begun = None
                self._write(event)

    def _is_idle(self, event: RunEnded) -> bool:
        """Whether nothing needs to be said of a run that ended so."""
        if event.changed or event.failed or event.unfetched:
            return False
        now = self._now()
        if self._idle_at is None or units.age_seconds(self._idle_at, now) >= _QUIET_SECONDS:
            self._idle_at = now
            return self._quiet
        return True

    def _wanted(self, event: Event) -> bool:
        match event:
            case FetchProgress() | HashProgress():
                return False
            case ModelPhase():
                return self._verbose
            case Notice():
                return event.level == "warning" or (not self._quiet and (event.level == "info" or self._verbose))
            case Incident():
                return True
            case ModelDone():
                return event.state == "failed" or (not self._quiet and not event.reason.startswith("up-to-date"))
            case _:
                return not self._quiet

    def _write(self, event: Event) -> None:
        if self.failure is not None:
            return
        try:
            self._stream.write(self._line(event) + "\n")
            self._stream.flush()
        except OSError as error:  # the reader has gone, or the disk is full: the run continues
            self.failure = error

    def _line(self, event: Event) -> str:
        level, text = level_of(event), sentence(event)
        match self._form:
            case "text":
                return f"{units.rfc3339(self._now())} {level:<7} {text}"
            case "journald":
                return f"{_PRIORITIES[level]}{text}"
            case "json":
                head = {"at": units.rfc3339(self._now()), "level": level, "message": text}
                return msgspec.json.encode(head | msgspec.to_builtins(event)).decode()


def level_of(event: Event) -> Level:
    """Return how grave *event* is."""
    match event:
        case Notice():
            return event.level
        case Incident():
            return "warning" if event.kind in {"incompatible", "removed-unlisted", "crash-recovered"} else "error"
        case ModelDone():
            return "error" if event.state == "failed" else "info"
        case RunEnded():
            return "warning" if event.failed or event.unfetched else "info"
        case _:
            return "info"
