"""
The hostile probe: a child that tries what a hostile model would, and reports which attempts succeeded.

A sandbox works only if no attempt succeeded and the canary, the one file that it is given, could be read: otherwise a sandbox in which
nothing runs at all would pass for a perfect one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS = 1.0
_NEW_USER = 0x10000000  # CLONE_NEWUSER


def main() -> None:
    """Make every attempt, and write which succeeded."""
    job = json.loads(sys.stdin.buffer.read())
    attempts: dict[str, Callable[[], object]] = {
        "tcp": lambda: socket.create_connection(("127.0.0.1", job["tcp"]), timeout=_SECONDS),
        "udp": lambda: _udp(job["udp"]),
        "dns": lambda: socket.getaddrinfo("example.org", 443),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        "unix-socket": lambda: _unix(job["unix"]),
        "abstract-socket": lambda: _unix("\0" + job["abstract"]),
        "read-outside": lambda: Path(job["secret"]).read_bytes(),
        "write-outside": lambda: Path(job["outside"], "probe").write_bytes(b"x"),
        "write-model": lambda: Path(job["canary"]).write_bytes(b"x"),
        "chmod-model": lambda: Path(job["canary"]).chmod(0o666),
        "truncate-model": lambda: os.truncate(job["canary"], 0),
        "signal-parent": lambda: os.kill(_parent(job), 0),
        "signal-parent-thread": lambda: _raw("tgkill", _parent(job), _parent(job), 0),
        "limit-parent": lambda: resource.prlimit(_parent(job), resource.RLIMIT_NOFILE),
        "parent-environment": lambda: Path(f"/proc/{_parent(job)}/environ").read_bytes(),
        "descriptor": lambda: _inherited(job["descriptor"]),
        "shared-memory": lambda: _raw("shmget", 0, 4096, 0o1600),
        "new-namespace": lambda: _raw("unshare", _NEW_USER),
        "new-process": _fork,
        "new-program": _exec,
        "environment": lambda: os.environ[job["variable"]],
    }
    succeeded = [name for name, attempt in attempts.items() if _succeeds(attempt)]
    answer: dict[str, Any] = {
        "nonce": job["nonce"], "succeeded": succeeded, "canary": _canary(job["canary"]),
        "loopback": _succeeds(lambda: _loopback(job.get("port", 0))),
    }  # fmt: skip
    os.write(1, json.dumps(answer).encode())


def _raw(name: str, *arguments: int) -> None:
    """Call the C library's function *name*, without the checks that Python makes."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _parent(job: dict[str, Any]) -> int:
    """Return the parent's process id, unless in a namespace of our own it is that of another process."""
    number = int(job["parent"])
    if job["namespaces"] and number in {1, os.getpid()}:
        raise OSError
    return number


def _inherited(descriptor: int) -> None:
    if os.pread(descriptor, 6, 0) != b"secret":
        raise OSError


def _loopback(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(server.getsockname(), timeout=_SECONDS):
        pass


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, KeyError):
        return False
    return True


def _udp(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", port))
        sender.settimeout(_SECONDS)
        sender.send(b"x")
        if sender.recv(1) != b"y":
            raise OSError


def _unix(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
        sender.connect(name)


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _exec() -> None:
    """Start a program that does not exist: any answer but a refusal shows that an existing one would start."""
    with contextlib.suppress(FileNotFoundError):
        os.execv("/nothing-is-here", ["nothing"])  # noqa: S606  that is what is tried


def _canary(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
