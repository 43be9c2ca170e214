"""
What the agent hears while it works and waits: stop, or read the settings again.

Rules that hold here:

1. The first SIGTERM or SIGINT is raised in the main thread, wherever that is, so that every ``finally`` between there and the agent
   runs: children end, the store is let go. A second SIGTERM changes nothing; a second SIGINT is a person who insists.
2. SIGHUP interrupts nothing but a wait.
3. A wait ends at once: the kernel's handler writes to a socket on which the wait selects, so no signal falls between a look at a flag
   and the sleep after it, and nothing locks (``threading.Event`` may be set by a handler that interrupted its own wait).
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(SystemExit):
    """The agent was asked to end; its exit code is 0."""


class Wakeup:
    """Takes SIGTERM, SIGINT and SIGHUP over from whoever had them, and gives them back."""

    def __init__(self) -> None:
        self._stopping = False
        self._reload = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number, heard in ((signal.SIGHUP, self._hup), (signal.SIGTERM, self._stop), (signal.SIGINT, self._stop)):
            self._before[number] = signal.signal(number, heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._fd_before)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> None:
        """Wait, or be woken by a signal."""
        select.select([self._reader], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(64):
                pass

    def stops(self) -> bool:
        """Whether SIGTERM or SIGINT came."""
        return self._stopping

    def reloads(self) -> bool:
        """Whether SIGHUP came since ``reloaded``."""
        return self._reload

    def reloaded(self) -> None:
        """Forget the SIGHUP that is answered now."""
        self._reload = False

    def _hup(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._reload = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._stopping and number == signal.SIGTERM:
            return
        self._stopping = True
        raise Stopped(0)
