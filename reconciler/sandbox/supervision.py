"""
A child from its start to its end: fed its job, heard within bounds, ended in time, and how it ended.

Everything that it says is hostile text. Its number, and its group's, is nobody else's until it is reaped, so that is done last.
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
#: Signals that a process sends to itself when its own code is at fault, or gets for what it used up; others come from outside.
OWN_FAULT = {
    signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP, signal.SIGXFSZ,
    signal.SIGXCPU,
}  # fmt: skip


class ProcessResult(Struct, frozen=True, kw_only=True):
    """How a child ended."""

    #: Its document, if it wrote one that carries the nonce.
    answer: dict[str, Any] | None
    #: Whether it was confined: if not, nothing that it was started for ran, and the sandbox is to blame.
    confined: bool
    code: int
    #: The signal that killed it, or 0.
    signal: int
    timed_out: bool
    #: The end of what it wrote to standard error; hostile text.
    errors: str

    @property
    def setup_failed(self) -> bool:
        """Whether the sandbox, and not what it held, is to blame."""
        return not self.confined

    @property
    def word(self) -> dict[str, Any] | None:
        """Its answer, if it also ended by itself, in time and without complaint; else None."""
        return self.answer if self.confined and self.code == 0 and not self.timed_out else None


class StopSignal:
    """Ends the wait for a child, from any thread."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)

    def set(self) -> None:
        """End it: a wait that begins later, too."""
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        """Return what can be polled."""
        return self._fd

    def close(self) -> None:
        """Let go; nobody may set it any more."""
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
    """Feed the child, read at most so much of what it says, and end it and its group in time, or when *stop* is set."""
    out = _Pipe(child.stdout, len(confine.CONFINED) + answer_bytes, keep_first=True)
    errors = _Pipe(child.stderr, OUTPUT_BYTES, keep_first=False)
    feeding = threading.Thread(target=_feed, args=(child, job), daemon=True)
    feeding.start()
    try:
        timed_out = not _exits(child.pid, seconds, stop)
    finally:
        _end_group(child)
        feeding.join(_KILL_SECONDS)  # nobody is left who could read
    said, complaint, code = out.text(), errors.text(), child.returncode
    killed_inside = wrapped and 128 < code < 160  # bubblewrap's way of telling
    return ProcessResult(
        answer=_answer(said.removeprefix(confine.CONFINED), nonce),
        confined=said.startswith(confine.CONFINED),
        code=code,
        signal=0 if timed_out else -code if code < 0 else code - 128 if killed_inside else 0,
        timed_out=timed_out,
        errors=complaint.decode(errors="replace")[-16_384:],
    )


def _exits(pid: int, seconds: float, stop: StopSignal | None) -> bool:
    """Wait for the child's end without reaping it: until that is done its number, and its group's, is nobody else's."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        for one in (handle, stop) if stop else (handle,):
            poll.register(one, select.POLLIN)
        return any(fd == handle for fd, _ in poll.poll(seconds * 1000))
    finally:
        os.close(handle)


def _feed(child: subprocess.Popen[bytes], job: bytes) -> None:
    """Write *job* and close the pipe, both in one thread: a file that is closed while another thread writes to it fails in either."""
    assert child.stdin is not None
    with contextlib.suppress(OSError), child.stdin:
        child.stdin.write(job)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class _Pipe:
    """Reads a pipe to its end in a thread and keeps only so much of it: a child that writes a gibibyte fills no memory."""

    def __init__(self, pipe: Any, most: int, *, keep_first: bool) -> None:
        self._pipe = pipe
        self._most = most
        self._keep_first = keep_first
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._pipe:
            while chunk := self._pipe.read1(65_536):
                if self._keep_first:
                    self._kept += chunk[: self._most - len(self._kept)]
                else:
                    self._kept = (self._kept + chunk)[-self._most :]

    def text(self) -> bytes:
        self._thread.join(_KILL_SECONDS)
        return bytes(self._kept)


def _answer(said: bytes, nonce: str) -> dict[str, Any] | None:
    """Return the child's document, if it is one and carries the nonce: else it is noise."""
    try:
        found = json.loads(said, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("nonce") == nonce else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def printable(text: str) -> str:
    """Return *text* without what could steer a terminal, or cannot be encoded: part of it comes from the model."""
    return re.sub(r"[^\x20-\x7e\u00a0-\u202d\u2030-\ud7ff\ue000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)
