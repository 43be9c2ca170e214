"""
Ports of 127.0.0.1: a free one, one that refuses whoever connects, and whose the one is that somebody listens at.

A free port may be taken by another program before it is used: any user of this machine may listen at it. Who sends a secret to it asks
``belongs_to`` first.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refusing_port() -> socket.socket:
    """Return a socket that holds a port and does not listen: whoever connects is refused, and nobody else can take it."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    return held


def belongs_to(pid: int, port: int) -> bool | None:
    """Whether the process *pid* is the one that listens at *port*; None, if nobody listens yet."""
    wanted = f"0100007F:{port:04X}"
    with contextlib.suppress(OSError):
        rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
        inodes = {f"socket:[{row[9]}]" for row in rows if row[1] == wanted and row[3] == "0A"}
        held = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()} if inodes else set()
        return inodes <= held if inodes else None
    return None
