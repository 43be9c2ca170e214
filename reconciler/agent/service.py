"""
The agent as a service: signals, systemd's notifications and watchdog, and the health file.

Rules that hold here:

1. The first SIGTERM or SIGINT is raised in the main thread, wherever that is, so that every ``finally`` between there and the agent
   runs: children end, the store is released. A second SIGTERM changes nothing; a second SIGINT interrupts the cleaning up.
2. SIGHUP interrupts nothing but a wait.
3. A wait ends at once: the kernel's handler writes to a socket on which the wait selects, so no signal is missed between a look at a
   flag and the sleep after it, and nothing locks (``threading.Event`` may be set by a handler that interrupted its own wait).
4. Notifications follow sd_notify(3), one datagram each. They never raise, and never block for longer than a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import msgspec

from reconciler.commands import status
from reconciler.commands.status import Health
from reconciler.store import atomic
from reconciler.store.layout import Layout

# -- signals ---------------------------------------------------------------------------------------


class Stopped(SystemExit):
    """The agent was asked to end; its exit code is 0."""


class Wakeup:
    """Handles SIGTERM, SIGINT and SIGHUP inside a ``with`` block, and restores the earlier handlers after it."""

    def __init__(self) -> None:
        self._stopping = False
        self._reload = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number, handler in ((signal.SIGHUP, self._hup), (signal.SIGTERM, self._stop), (signal.SIGINT, self._stop)):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._fd_before)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> None:
        """Wait, or return at once when a signal comes."""
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
        """Forget the SIGHUP that is handled now."""
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


# -- systemd ---------------------------------------------------------------------------------------


def notify(*lines: str) -> bool:
    """Send *lines* to the service manager; return whether one listens. Never raises and never blocks for long."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # a socket in the abstract namespace
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(1.0)
        sender.sendto("\n".join(lines).encode(), address)
        return True
    return False


def reloading() -> bool:
    """Tell the service manager that settings are read again; ``Type=notify-reload`` asks for the monotonic time too."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds() -> float:
    """Return the watchdog's timeout that systemd set for this process, in seconds; 0: it set none."""
    pid, asked = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not asked.isdecimal() or pid not in {"", str(os.getpid())}:
        return 0.0
    return int(asked) / 1e6


class Watchdog:
    """
    Sends ``WATCHDOG=1`` from a thread while the main thread makes progress: a service that hangs is restarted.

    The main thread calls ``beat`` whenever it makes progress; after *silence_seconds* without a call, nothing is sent any more.
    """

    def __init__(self, silence_seconds: float, timer: Callable[[], float] = time.monotonic) -> None:
        self._silence = silence_seconds
        self._timer = timer
        self._alive_until = timer() + silence_seconds
        self._ended = threading.Event()

    def beat(self, ahead_seconds: float = 0.0) -> None:
        """Record progress; *ahead_seconds* is how long the main thread waits now."""
        self._alive_until = self._timer() + ahead_seconds + self._silence

    @property
    def alive(self) -> bool:
        """Whether the main thread made progress recently enough."""
        return self._timer() < self._alive_until

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Send ``WATCHDOG=1`` twice in each timeout until the block ends, if systemd set one."""
        every = watchdog_seconds() / 2
        if not every:
            yield
            return
        thread = threading.Thread(target=self._send, args=(every,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _send(self, every: float) -> None:
        while not self._ended.wait(every):
            if self.alive:
                notify("WATCHDOG=1")


# -- the health file -------------------------------------------------------------------------------


def write_health(layout: Layout, health: Health) -> None:
    """Write ``health.json``, whole or not at all; raises StoreError."""
    atomic.make_folder(layout.root)
    atomic.write(status.health_path(layout), msgspec.json.encode(health) + b"\n")
