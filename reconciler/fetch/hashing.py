"""
Hashing: what decides whether bytes are the signed ones.

Rules that hold here:

1. A file is hashed in another process (``hash_worker``), one file at a time in each. Whatever kills that process (a file that shrank, a
   disk that failed, the kernel's memory killer) is a failed verification of that file, and of no other.
2. Processes start when they are needed, are kept for the next file, and end with this object or with this program.
3. A file that still grows is hashed as far as its complete prefix goes: ``Job.extend_to`` says how far that is, and that all before it is
   final. Whoever writes a byte before that mark again must start a new job.
4. The result carries the device, inode, size and time of the open file that was hashed. Its path may lead elsewhere by then.

``Hashers`` belongs to one thread; ``wake`` alone may be called from others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.core.errors import StoreError
from reconciler.fetch import hash_worker
from reconciler.fetch.hash_process import Hashed, HashProcess, Job

#: Below this, a read in this process costs less than a message to another; a failing disk is an ``OSError`` here.
INLINE_BYTES = 1 << 20
_EXTEND_SECONDS = 0.1


class Checked(Struct, frozen=True, kw_only=True):
    """One file of a scrub: whether it still has its *digest*, what was *found* instead, or why it could not be read."""

    digest: str
    ok: bool
    found: str = ""
    error: str = ""
    size: int = 0
    inode: int = 0
    mtime_ns: int = 0


class Hashers:
    """Up to *workers* hashing processes, and the files that wait for one."""

    def __init__(self, workers: int | None = None) -> None:
        self._cores = os.cpu_count() or 1
        self._most_workers = workers or self._cores
        self._workers: list[HashProcess] = []
        self._waiting: deque[Job] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._closed = False
        self._wake_guard = threading.Lock()

    def prepare(self) -> None:
        """Start a process, unless there is one: it is ready by the time at which a file is."""
        if not self._workers:
            self._start_worker()

    def start(self, path: Path, algorithm: str, size: int, *, upto: int | None = None) -> Job:
        """Hash the file at *path*; with *upto*, only so far at first, and on as ``Job.extend_to`` says."""
        job = Job(path, algorithm, size, size if upto is None else upto)
        self._waiting.append(job)
        self._assign()
        return job

    def wait(self, timeout: float) -> None:
        """Receive what the processes send. Return after the first message, after ``wake``, or after *timeout* seconds."""
        for key, _ in self._selector.select(max(timeout, 0.0)):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    while os.read(self._wake_out, 4096):
                        pass
            else:
                self._read_from(key.data)
        for worker in list(self._workers):
            worker.send_limit()
            if worker.stalled:
                self._remove_worker(worker, "the disk did not answer")
        self._assign()

    def wake(self) -> None:
        """Make ``wait`` return; from any thread, and without effect after ``close``, when the descriptor may be another file's."""
        with self._wake_guard, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._wake_in, b".")

    def finish(self, job: Job) -> Hashed:
        """Wait until *job* is done."""
        while job.result is None:
            self.wait(1.0)
        return job.result

    def digest(self, path: Path, algorithm: str) -> str:
        """
        Return the digest of the plain file at *path*.

        Raises:
            OSError: it is missing, no plain file, or cannot be opened.
            StoreError: it changed or could not be read while it was hashed.
        """
        fd = hash_worker.open_plain(str(path))
        try:
            size = os.fstat(fd).st_size
            if size <= INLINE_BYTES:
                return f"{algorithm}:{inline(fd, algorithm)[0]}"
        finally:
            os.close(fd)
        done = self.finish(self.start(path, algorithm, size))
        if done.error:
            raise StoreError(f"cannot hash {path.name}: {done.error}")
        return done.found

    def check_many(
        self,
        files: Iterable[tuple[str, int, Path]],
        report: Callable[[str, int, int], None] | None = None,
        rate: int = 0,
    ) -> Iterator[Checked]:
        """
        Hash each (digest, size, path) of *files* on all cores and yield what was found, in the order in which they end.

        *report* is called with (digest, bytes hashed, size) at most ten times a second. *rate* is the limit in bytes a second for all
        together; 0: none. Closing the iterator stops what runs.
        """
        scrub = _Scrub(self, iter(files), report or _ignore_progress, rate)
        try:
            yield from scrub.run(self._most_workers)
        finally:
            scrub.cancel()

    def close(self) -> None:
        """End all processes; idempotent."""
        with self._wake_guard:
            if self._closed:
                return
            self._closed = True
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._selector.close()
        os.close(self._wake_out)
        os.close(self._wake_in)

    def _assign(self) -> None:
        while self._waiting:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None and len(self._workers) >= self._most_workers:
                return
            job = self._waiting.popleft()
            if job.cancelled:
                continue
            (idle or self._start_worker()).assign(job, self._threads())

    def _threads(self) -> int:
        """Threads for blake3, which alone can use them: all cores for a lone file, fewer where others are hashed beside it."""
        busy = 1 + sum(worker.job is not None for worker in self._workers)
        return max(1, self._cores // min(busy, self._cores))

    def _start_worker(self) -> HashProcess:
        worker = HashProcess()
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)
        return worker

    def _read_from(self, worker: HashProcess) -> None:
        if worker in self._workers and (worker.process.stdout is None or worker.process.stdout.closed or not worker.receive()):
            self._remove_worker(worker, "")

    def _remove_worker(self, worker: HashProcess, why: str) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.output)
        code = worker.end()
        job = worker.job
        if job and job.result is None:
            ended = f"signal {-code}" if code < 0 else f"exit status {code}"
            job.result = Hashed(error=why or f"the file could not be read to its end ({ended})")


class _Scrub:
    """A pass over many files, under one rate."""

    def __init__(
        self, hashers: Hashers, files: Iterator[tuple[str, int, Path]], report: Callable[[str, int, int], None], rate: int
    ) -> None:
        self._hashers, self._files, self._report, self._rate = hashers, files, report, rate
        self._running: dict[Job, str] = {}
        self._extended_at = self._reported_at = time.monotonic()

    def run(self, most: int) -> Iterator[Checked]:
        """Hash *most* files at a time until none is left."""
        more = True
        while more or self._running:
            while more and len(self._running) < most:
                more = self._begin()
            if self._running:
                self._hashers.wait(_EXTEND_SECONDS)
            self._extend_limits()
            self._report_progress()
            yield from self._finished()

    def cancel(self) -> None:
        """Stop what runs."""
        for job in self._running:
            job.cancel()

    def _begin(self) -> bool:
        found = next(self._files, None)
        if found is None:
            return False
        name, size, path = found
        job = self._hashers.start(path, digests.parse(name)[0], size, upto=0 if self._rate and size else None)
        self._running[job] = name
        return True

    def _extend_limits(self) -> None:
        """Let each file go on by its share of what the rate allows since the last time."""
        now = time.monotonic()
        open_ones = [job for job in self._running if job.upto < job.size]
        if self._rate and open_ones:
            share = int((now - self._extended_at) * self._rate / len(open_ones))
            for job in open_ones:
                job.extend_to(min(job.size, job.upto + share))
        self._extended_at = now

    def _report_progress(self) -> None:
        now = time.monotonic()
        if self._running and now - self._reported_at >= 0.1:
            self._reported_at = now
            job = next(iter(self._running))
            name = self._running.pop(job)
            self._running[job] = name  # the next one is reported next time
            self._report(name, job.hashed, job.size)

    def _finished(self) -> Iterator[Checked]:
        for job in [job for job in self._running if job.result]:
            name, done = self._running.pop(job), job.result
            assert done
            yield Checked(
                digest=name, ok=done.found == name, found=done.found, error=done.error,
                size=done.size, inode=done.inode, mtime_ns=done.mtime_ns,
            )  # fmt: skip


def inline(fd: int, algorithm: str) -> tuple[str, os.stat_result]:
    """
    Return the hex digest of the open file *fd* and its numbers, reading it in this process; for small files.

    Raises:
        OSError: it cannot be read.
    """
    made = digests.hasher(algorithm) if algorithm == "blake3" else hashlib.new(algorithm)
    offset = 0
    while data := os.pread(fd, INLINE_BYTES, offset):
        made.update(data)
        offset += len(data)
    return made.hexdigest(), os.fstat(fd)


def _ignore_progress(_digest: str, _hashed: int, _size: int) -> None:
    """Do nothing: the caller asked for no progress."""
