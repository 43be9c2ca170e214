"""
One hashing process, as this program sees it: the job that it has in hand, and the messages to and from it (``hash_worker`` is its inside).

Rules that hold here:

1. The process imports from this package's own folder alone, whatever the working directory or the caller's ``PYTHON*`` say.
2. A message is written whole or not at all; one that a full pipe does not take is repeated with the next. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.fetch import hash_worker

#: A read that brings nothing for so long (a dead network disk) is given up.
STALL_SECONDS = 300.0


class Hashed(Struct, frozen=True, kw_only=True):
    """What a job found: the digest of all bytes, with size, device, inode and time of the open file; or an *error* for people."""

    found: str = ""
    size: int = 0
    device: int = 0
    inode: int = 0
    mtime_ns: int = 0
    error: str = ""


class Job:
    """One file being hashed. ``result`` is there when it is done."""

    def __init__(self, path: Path, algorithm: str, size: int, upto: int) -> None:
        self.path, self.algorithm, self.size = path, algorithm, size
        self.upto = upto
        self.hashed = 0
        self.result: Hashed | None = None
        self.cancelled = False
        self.worker: HashProcess | None = None

    def extend_to(self, upto: int) -> None:
        """Allow reading up to byte *upto*; all before it is final. The file counts as whole when *upto* is its size."""
        if upto > self.upto:
            self.upto = upto
            if self.worker:
                self.worker.send_limit()

    def cancel(self) -> None:
        """Stop: the result is not wanted any more."""
        self.cancelled = True
        if self.worker and not self.result:
            self.worker.stop()
        self.result = self.result or Hashed(error="stopped")


class HashProcess:
    """A hashing process and its job."""

    def __init__(self) -> None:
        place = str(Path(hash_worker.__file__).resolve().parents[2])
        # -P -s: `import hashlib` finds nothing in the working directory or the user's site. The environment is ours, so that no PYTHON*
        # of the caller changes what runs.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", hash_worker.__name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONPATH": place, "LANG": "C.UTF-8"},
            start_new_session=True,  # Ctrl-C at the terminal is for the program, which then stops its workers
        )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self._input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._input, False)
        os.set_blocking(self.output, False)
        self._buffer = b""
        self._sent_limit = 0
        self.progress_at = time.monotonic()
        self.job: Job | None = None

    def assign(self, job: Job, threads: int) -> None:
        """Begin *job*, with so many *threads*."""
        self.job, job.worker = job, self
        self._sent_limit, self.progress_at = job.upto, time.monotonic()
        request = {"path": str(job.path), "algorithm": job.algorithm, "size": job.size, "threads": threads, "upto": job.upto}
        self._send(request)

    def send_limit(self) -> None:
        """Send how far the process may read, where that is new; a full pipe is tried again with the next message."""
        if self.job and self.job.upto > self._sent_limit and self._send({"upto": self.job.upto}):
            self._sent_limit = self.job.upto
            self.progress_at = time.monotonic()

    def stop(self) -> None:
        """Ask the process to stop its job; it is free when it answers."""
        if not self._send({"stop": True}):
            self.process.kill()  # ``receive`` sees the end of its output

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            os.write(self._input, json.dumps(message).encode() + b"\n")  # shorter than PIPE_BUF: whole or not at all (POSIX)
        except BlockingIOError:
            return False
        except OSError:
            pass  # it died: ``receive`` sees the end of its output
        return True

    def receive(self) -> bool:
        """Receive its messages; return whether it lives."""
        try:
            data = os.read(self.output, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return True

    def _handle(self, message: dict[str, Any]) -> None:
        job = self.job
        if job is None:
            return
        self.progress_at = time.monotonic()
        if "hashed" in message:
            job.hashed = message["hashed"]
            return
        if job.cancelled:
            pass
        elif "hex" in message:
            job.hashed = job.size
            job.result = Hashed(found=f"{job.algorithm}:{message.pop('hex')}", **message)
        else:
            job.result = Hashed(error=str(message.get("error", "stopped")))
        self.job = job.worker = None

    @property
    def stalled(self) -> bool:
        """Whether it should read and has not for too long."""
        job = self.job
        return (
            job is not None and job.upto - job.hashed > hash_worker.WINDOW_PARALLEL and time.monotonic() - self.progress_at > STALL_SECONDS
        )

    def end(self) -> int:
        """End the process; return its exit status, negative for a signal."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()
