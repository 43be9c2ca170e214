"""
Events as sentences for people, and as JSON lines for programs.

Text from a server is escaped (``core.text.printable``), so that it cannot forge a line or a colour.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any

import msgspec

from reconciler.core import units
from reconciler.core.events import (
    Announced,
    BlobReady,
    Event,
    FetchProgress,
    Incident,
    ModelDone,
    ModelPhase,
    Notice,
    RunEnded,
    RunStarted,
    Swapped,
)
from reconciler.core.text import printable


def short(name: str) -> str:
    """Return a digest shortened to 12 digits, for people."""
    algorithm, _, digits = name.partition(":")
    return f"{algorithm}:{digits[:12]}…" if digits else name


def sentence(event: Event) -> str:
    """Return *event* as one line of text."""
    match event:
        case RunStarted():
            models = units.count(event.models, "model")
            return f"applying lock {short(event.lock)}: {models}, {units.human_size(event.download_bytes)} to download"
        case FetchProgress():
            return f"{short(event.digest)}: {units.human_size(event.done)} of {units.human_size(event.total)}"
        case BlobReady():
            return f"verified {short(event.digest)}, {units.human_size(event.size)}{_from(event.sources)}"
        case ModelPhase():
            return f"{event.model}: {event.phase}{': ' + printable(event.detail) if event.detail else ''}"
        case ModelDone():
            return f"{event.model}: {event.state}{_why(event)}"
        case Swapped() | Announced():
            what = "generation" if isinstance(event, Swapped) else "servers and hooks were notified of generation"
            return f"{what} {event.generation}:{_signed('+', event.added)}{_signed('-', event.removed)} ({printable(event.what)})"
        case Incident():
            about = " ".join(part for part in (event.model, short(event.blob), event.source) if part)
            return f"incident {event.kind}: {printable(about)}{': ' if about else ''}{printable(event.detail)}"
        case Notice():
            return printable(event.text)
        case RunEnded():
            failed = f", {event.failed} failed" if event.failed else ""
            unfetched = f", {event.unfetched} not fetched" if event.unfetched else ""
            done = "done" if event.changed else "nothing to do"
            return f"{done}: {event.active} active{failed}{unfetched}, generation {event.generation}, {units.human_time(event.seconds)}"
        case _:
            raise AssertionError(event)


def _why(event: ModelDone) -> str:
    """Return the reason of a model's state; that nothing is to be done says nothing of a run that has just installed it."""
    is_new = event.state == "active" and event.reason.startswith("up-to-date")
    return ", verified and tested" if is_new else f" ({printable(event.reason)})"


def _from(sources: tuple[str, ...]) -> str:
    return f" from {', '.join(printable(source) for source in sources)}" if sources else ""


def _signed(sign: str, models: tuple[str, ...]) -> str:
    return "".join(f" {sign}{model}" for model in models)


class JsonLines:
    """A reporter that writes to a stream. A failed write does not end the run; it is kept in ``failure``."""

    def __init__(self, stream: IO[str], now: Callable[[], datetime]) -> None:
        self._stream = stream
        #: The first failed write, after which nothing more is written.
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
            head["message"] = sentence(event)
        line = msgspec.json.encode(head | tree).decode()
        if self.failure is None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError as error:  # the reader has gone, or the disk is full: the run continues
                self.failure = error
