"""Waiting for a server that was started."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path


def wait_until_it_listens(address: str, log: Path) -> None:
    """
    Wait until somebody listens at *address*, a host and a port.

    Raises:
        TimeoutError: nobody does within seconds; it holds what *log* says.
    """
    host, _, port = address.rpartition(":")
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.01)  # nginx tells nobody that it listens
    raise TimeoutError(log.read_text())
