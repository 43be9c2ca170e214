"""Waiting for what other programs do: a server that listens, a namespace, the last of many processes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path


def until(holds: Callable[[], object], what: Callable[[], str], seconds: float = 5.0) -> None:
    """
    Wait until *holds*.

    Raises:
        TimeoutError: it does not within *seconds*; it says *what* was waited for.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(what())
        time.sleep(0.01)  # programs of others, which announce nothing: nginx, aria2c, ip, unshare


def wait_until_it_listens(address: str, log: Path) -> None:
    """
    Wait until somebody listens at *address*, a host and a port.

    Raises:
        TimeoutError: nobody does within seconds; it holds what *log* says.
    """
    host, _, port = address.rpartition(":")
    until(lambda: listens(host, int(port)), lambda: f"nobody listens at {address}: {log.read_text() if log.exists() else ''}")


def listens(host: str, port: int) -> bool:
    """Return whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
