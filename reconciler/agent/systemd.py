"""
Telling systemd how the agent is: sd_notify(3) in one datagram, and the watchdog's pulse.

The pulse is given by a thread, but only while the main thread shows signs of life: a service that hangs is one that is restarted.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator


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
    """Say that settings are being read anew; ``Type=notify-reload`` asks for the monotonic time too."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds() -> float:
    """Return within how many seconds systemd wants to hear from this process again; 0: it does not."""
    pid, asked = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not asked.isdecimal() or pid not in {"", str(os.getpid())}:
        return 0.0
    return int(asked) / 1e6


class Watchdog:
    """
    Says ``WATCHDOG=1`` while the main thread's last sign of life lets it.

    ``beat`` is such a sign: from then on, *seconds* of silence are fine.
    """

    def __init__(self, silence_seconds: float, timer: Callable[[], float] = time.monotonic) -> None:
        self._silence = silence_seconds
        self._timer = timer
        self._alive_until = timer() + silence_seconds
        self._ended = threading.Event()

    def beat(self, ahead_seconds: float = 0.0) -> None:
        """Show a sign of life; *ahead_seconds* is how long the main thread means to wait now."""
        self._alive_until = self._timer() + ahead_seconds + self._silence

    @property
    def alive(self) -> bool:
        """Whether the silence is not too long yet."""
        return self._timer() < self._alive_until

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Give the pulse until the block ends, if systemd asks for one."""
        every = watchdog_seconds() / 2
        if not every:
            yield
            return
        thread = threading.Thread(target=self._give, args=(every,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _give(self, every: float) -> None:
        while not self._ended.wait(every):
            if self.alive:
                notify("WATCHDOG=1")
