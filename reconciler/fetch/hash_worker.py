"""
The hashing process: ``python -m reconciler.fetch.hash_worker``. Its messages are JSON objects, one a line, over its standard streams.

Rules that hold here:

1. The file is hashed through a memory map, or through a buffer that ``read`` fills, whichever costs this machine less: the map took half
   of the time on one processor and a fifth more on another. Both are measured on the first windows. A file that shrinks, or a disk that
   fails, may kill the process that maps it (SIGBUS). That is why this is a process of its own: its death means "not verified".
2. A window is unmapped before the next is mapped: memory stays flat whatever the file's size.
3. It holds one file at a time and ends when its standard input ends, also in the middle of a file.
4. It imports only the standard library (and blake3 where needed), so that it starts in a few milliseconds.

Input: ``{"path", "algorithm", "size", "threads", "upto"}``, then ``{"upto"}`` as more of the file is there, or ``{"stop": true}``.
Output: ``{"hashed"}`` now and then; at the end ``{"hex", "size", "device", "inode", "mtime_ns"}``, ``{"error"}`` or ``{"stopped": true}``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

WINDOW = 16 << 20
#: ``madvise(2)``, Linux 5.14; Python 3.11 has no name for it.
_MADV_POPULATE_READ = 22
#: blake3 splits what it is given at once between its threads.
WINDOW_PARALLEL = 64 << 20
#: Following byte by byte would map each page a hundred times.
FOLLOW_LEAST = 1 << 20
#: How much is read at once: it stays in the processor's cache until it is hashed.
BUFFER = 256 << 10
#: How many windows each way is tried on. The best of each counts: other programs use the processor and the disk too.
TRIALS = 4
REPORT_SECONDS = 0.1


class InputClosed(Exception):
    """The standard input ended."""


class Cancelled(Exception):
    """The parent sent ``stop``."""


class MessageStream:
    """The two standard streams, as messages."""

    def __init__(self) -> None:
        self._buffer = b""

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next message, or nothing after *timeout* seconds; raise ``InputClosed`` at the end of the input."""
        while b"\n" not in self._buffer:
            if timeout is not None and not select.select([0], [], [], timeout)[0]:
                return None
            data = os.read(0, 65536)
            if not data:
                raise InputClosed
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    @staticmethod
    def send(message: dict[str, Any]) -> None:
        """Send one message."""
        os.write(1, json.dumps(message).encode() + b"\n")


def open_plain(path: str) -> int:
    """Open the plain file at *path*, following no link and waiting for no pipe's other end; raise ``OSError`` for anything else."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("it is not a plain file")
    return fd


class ReadStrategy:
    """The two ways to read a window (map or buffer), and the least that each has cost, in processor seconds a byte."""

    def __init__(self) -> None:
        self._readers = (_mapped, _read)
        self._costs: dict[Callable[[Any, int, int, int], None], list[float]] = {reader: [] for reader in self._readers}

    def update(self, made: Any, fd: int, start: int, length: int) -> None:
        """Hash *length* bytes from *start*; raise ``OSError`` or ``ValueError`` where they are not there."""
        tried = min(self._readers, key=lambda reader: len(self._costs[reader]))
        if len(self._costs[tried]) == TRIALS:
            min(self._readers, key=lambda reader: min(self._costs[reader]))(made, fd, start, length)
            return
        begun = time.thread_time()
        tried(made, fd, start, length)
        if length >= FOLLOW_LEAST:
            self._costs[tried].append((time.thread_time() - begun) / length)


def main() -> None:
    """Hash one file after the other, until the input ends."""
    stream, strategy = MessageStream(), ReadStrategy()
    try:
        while True:
            message = stream.receive(None)
            if message and "path" in message:
                stream.send(_respond(stream, strategy, message))
    except (InputClosed, BrokenPipeError, KeyboardInterrupt):
        return


def _respond(stream: MessageStream, strategy: ReadStrategy, request: dict[str, Any]) -> dict[str, Any]:
    try:
        fd = open_plain(request["path"])
        try:
            return _hash(stream, strategy, fd, request)
        finally:
            os.close(fd)
    except Cancelled:
        return {"stopped": True}
    except (OSError, ValueError) as error:
        return {"error": getattr(error, "strerror", None) or str(error)}


def _hash(stream: MessageStream, strategy: ReadStrategy, fd: int, request: dict[str, Any]) -> dict[str, Any]:
    size, upto, threads = request["size"], request["upto"], request["threads"]
    parallel = request["algorithm"] == "blake3" and threads > 1
    made, window = _hasher(request["algorithm"], threads), WINDOW_PARALLEL if parallel else WINDOW
    update = _mapped if parallel else strategy.update
    done, reported_at = 0, time.monotonic()
    while done < size:
        ready = min(upto, size) - done
        idle = ready < FOLLOW_LEAST and upto < size
        while (message := stream.receive(None if idle else 0)) is not None:
            if "stop" in message:
                raise Cancelled
            upto = max(upto, message["upto"])
            idle = False
        ready = min(upto, size) - done
        if ready >= FOLLOW_LEAST or upto >= size:
            update(made, fd, done, min(ready, window))
            done += min(ready, window)
        if time.monotonic() - reported_at >= REPORT_SECONDS:
            stream.send({"hashed": done})
            reported_at = time.monotonic()
    seen = os.fstat(fd)
    if seen.st_size != size:
        raise ValueError(f"it has {seen.st_size} bytes, not {size}")
    return {
        "hex": made.hexdigest(), "size": seen.st_size, "device": seen.st_dev, "inode": seen.st_ino, "mtime_ns": seen.st_mtime_ns,
    }  # fmt: skip


def _read(made: Any, fd: int, start: int, length: int) -> None:
    """Hash *length* bytes from *start* through a buffer."""
    buffer = memoryview(bytearray(min(BUFFER, length)))
    end = start + length
    while start < end:
        count = os.preadv(fd, [buffer[: end - start]], start)
        if not count:
            raise ValueError(f"it ends at byte {start}, before {end}")
        made.update(buffer[:count])
        start += count


def _mapped(made: Any, fd: int, start: int, length: int) -> None:
    """Hash *length* bytes from *start* through a map. A map begins at a page; what lies before *start* in it was hashed already."""
    base = start - start % mmap.ALLOCATIONGRANULARITY
    if os.fstat(fd).st_size < start + length:
        raise ValueError(f"it ends at byte {os.fstat(fd).st_size}, before {start + length}")  # the usual case; SIGBUS is for the race
    with mmap.mmap(fd, start + length - base, mmap.MAP_SHARED, mmap.PROT_READ, offset=base) as window:
        _populate(window)
        with memoryview(window) as whole, whole[start - base :] as part:
            made.update(part)


def _populate(window: mmap.mmap) -> None:
    """
    Map all pages of *window* by one call, which is a seventh faster than a fault for every few of them.

    A page that cannot be had (the file shrank, the disk failed) is then an ``OSError`` here, in most cases, and no SIGBUS.
    """
    try:
        window.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 5.14
            raise


def _hasher(algorithm: str, threads: int) -> Any:
    if algorithm == "blake3":
        from blake3 import blake3

        return blake3(max_threads=threads)
    return hashlib.new(algorithm)


if __name__ == "__main__":
    main()
    sys.exit(0)
