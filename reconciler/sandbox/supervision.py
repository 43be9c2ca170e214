"""
Supervises a child until it ends: writes its job, reads a bounded part of its output, ends it in time, and reports how it ended.

Rules that hold here:

1. All output of the child is hostile text.
2. The child is reaped last: until then no other process can have its process id or its group's, so a signal reaches nobody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import threading
from typing import Any

from msgspec import Struct

from reconciler.sandbox import confine

OUTPUT_BYTES = 65_536
_KILL_SECONDS = 5.0
#: Signals that a process gets through its own fault: its code failed, or it used up a limit. All others come from outside.
OWN_FAULT = {
    signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP, signal.SIGXFSZ,
    signal.SIGXCPU,
}  # fmt: skip


class ProcessResult(Struct, frozen=True, kw_only=True):
    """How a child ended."""

    #: The JSON document that it wrote, if it carries the nonce.
    answer: dict[str, Any] | None
    #: Whether it confined itself. If not, its job did not run, and the sandbox is at fault.
    confined: bool
    code: int
    #: The signal that killed it, or 0.
    signal: int
    timed_out: bool
    #: The end of what it wrote to standard error; hostile text.
    errors: str

    @property
    def setup_failed(self) -> bool:
        """Whether the sandbox, and not what ran in it, is at fault."""
        return not self.confined

    @property
    def valid_answer(self) -> dict[str, Any] | None:
        """Its answer, if it was confined and then ended by itself, in time and with exit code 0; else None."""
        return self.answer if self.confined and self.code == 0 and not self.timed_out else None


class StopSignal:
    """Ends the wait for a child, from any thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)

    def set(self) -> None:
        """End the wait; one that begins later ends at once."""
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; ``set`` MUST NOT be called after this."""
        os.close(self._fd)


def supervise(
    child: subprocess.Popen[bytes],
    job: bytes,
    nonce: str,
    *,
    seconds: float,
    answer_bytes: int,
    wrapped: bool,
    stop: StopSignal | None = None,
) -> ProcessResult:
    """
    Write *job* to the child, and end it and its process group after *seconds*, or when *stop* is set.

    At most *answer_bytes* of its standard output and the last ``OUTPUT_BYTES`` of its standard error are kept. *wrapped*: it is
    bubblewrap, which reports the signal that killed its own child as 128 and the signal's number.
    """
    out = _Pipe(child.stdout, len(confine.CONFINED) + answer_bytes, keep_first=True)
    errors = _Pipe(child.stderr, OUTPUT_BYTES, keep_first=False)
    writer = threading.Thread(target=_write_job, args=(child, job), daemon=True)
    writer.start()
    try:
        timed_out = not _ends_in_time(child.pid, seconds, stop)
    finally:
        _kill_group(child)
        writer.join(_KILL_SECONDS)  # nobody is left who could read
    output, complaint, code = out.kept(), errors.kept(), child.returncode
    killed_inside = wrapped and 128 < code < 160
    return ProcessResult(
        answer=_answer(output.removeprefix(confine.CONFINED), nonce),
        confined=output.startswith(confine.CONFINED),
        code=code,
        signal=0 if timed_out else -code if code < 0 else code - 128 if killed_inside else 0,
        timed_out=timed_out,
        errors=complaint.decode(errors="replace"),
    )


def _ends_in_time(pid: int, seconds: float, stop: StopSignal | None) -> bool:
    """Wait for the child's end without reaping it; return False when *seconds* passed or *stop* was set before."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        for one in (handle, stop) if stop else (handle,):
            poll.register(one, select.POLLIN)
        return any(fd == handle for fd, _ in poll.poll(seconds * 1000))
    finally:
        os.close(handle)


def _write_job(child: subprocess.Popen[bytes], job: bytes) -> None:
    """Write *job* and close the pipe, both in one thread: closing a file while another thread writes to it raises in either."""
    assert child.stdin is not None
    with contextlib.suppress(OSError), child.stdin:
        child.stdin.write(job)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class _Pipe:
    """Reads a pipe to its end in a thread and keeps its first or its last *most* bytes, so that much output takes little memory."""

    def __init__(self, pipe: Any, most: int, *, keep_first: bool) -> None:
        self._pipe = pipe
        self._most = most
        self._keep_first = keep_first
        self._bytes = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._pipe:
            while chunk := self._pipe.read1(65_536):
                if self._keep_first:
                    self._bytes += chunk[: self._most - len(self._bytes)]
                else:
                    self._bytes = (self._bytes + chunk)[-self._most :]

    def kept(self) -> bytes:
        self._thread.join(_KILL_SECONDS)
        return bytes(self._bytes)


def _answer(output: bytes, nonce: str) -> dict[str, Any] | None:
    """Return the child's JSON document, if *output* is one and carries the nonce; else None."""
    try:
        found = json.loads(output, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("nonce") == nonce else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def printable(text: str) -> str:
    """Return *text* with a replacement for each character that could control a terminal or cannot be encoded."""
    return re.sub(r"[^\x20-\x7e\u00a0-\u202d\u2030-\ud7ff\ue000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)
