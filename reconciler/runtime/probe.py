"""
The hostile probe: a child that tries what a hostile model would, and tells what it could do.

The sandbox is good only if every door was shut and the one window, the canary file that it may read, was open: a sandbox that lets
nothing run at all would otherwise pass for a perfect one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS = 1.0


def main() -> None:
    """Try everything, and write what succeeded."""
    job = json.loads(sys.stdin.buffer.read())
    tries: dict[str, Callable[[], object]] = {
        "tcp": lambda: socket.create_connection(("127.0.0.1", job["tcp"]), timeout=_SECONDS),
        "udp": lambda: _udp(job["udp"]),
        "dns": lambda: socket.getaddrinfo("example.org", 443),
        "unix-socket": lambda: _unix(job["unix"]),
        "abstract-socket": lambda: _unix("\0" + job["abstract"]),
        "read-outside": lambda: Path(job["secret"]).read_bytes(),
        "write-outside": lambda: Path(job["outside"], "probe").write_bytes(b"x"),
        "write-model": lambda: Path(job["canary"]).write_bytes(b"x"),
        "chmod-model": lambda: Path(job["canary"]).chmod(0o666),
        "truncate-model": lambda: os.truncate(job["canary"], 0),
        "signal-parent": lambda: os.kill(job["parent"], 0),
        "new-program": _exec,
        "environment": lambda: os.environ[job["variable"]],
    }
    open_doors = [name for name, attempt in tries.items() if _succeeds(attempt)]
    answer: dict[str, Any] = {"nonce": job["nonce"], "open": open_doors, "canary": _canary(job["canary"])}
    os.write(1, json.dumps(answer).encode())


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, KeyError):
        return False
    return True


def _udp(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", port))
        sender.connect(("127.0.0.1", port))
        sender.settimeout(_SECONDS)
        if sender.recv(1) != b"y":
            raise OSError


def _unix(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
        sender.connect(name)


def _exec() -> None:
    """Start another program in a child of our own: only its failure to start is a shut door."""
    child = os.fork()
    if child == 0:
        try:
            os.execv("/bin/true", ["true"])  # noqa: S606  that is what is tried
        except OSError:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise OSError


def _canary(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
