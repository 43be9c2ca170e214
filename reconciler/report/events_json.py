"""Events as JSON, one a line, for programs: each with its time, a sentence for people, and the lock that it speaks of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any

import msgspec

from reconciler.core import units
from reconciler.ports import Event, FetchProgress, RunStarted
from reconciler.report import text


class JsonLines:
    """A reporter that writes to a stream. A reader that went away, or a full disk behind it, ends nothing, and is remembered."""

    def __init__(self, stream: IO[str], now: Callable[[], datetime]) -> None:
        self._stream = stream
        #: Why nothing more is written.
        self.failure: OSError | None = None
        self._now = now
        self._lock = ""
        self._guard = threading.Lock()

    def __call__(self, event: Event, /) -> None:
        """Write one event."""
        with self._guard:
            if isinstance(event, RunStarted):
                self._lock = event.lock
            self._write(event)

    def _write(self, event: Event) -> None:
        tree: dict[str, Any] = msgspec.to_builtins(event)
        head = {"type": tree.pop("type"), "at": units.rfc3339(self._now()), "lock": self._lock}
        if not isinstance(event, FetchProgress):
            head["message"] = text.sentence(event)
        line = msgspec.json.encode(head | tree).decode()
        if self.failure is None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError as error:  # nobody reads any more: the run goes on
                self.failure = error
