"""Hashing survives what happens to files: cut short, grown, replaced, unreadable; and the processes that do it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reconciler.core import digest as digests
from reconciler.fetch import hash_worker
from reconciler.fetch.hash_process import Job
from reconciler.fetch.hashing import Hashers
from tests.fetching import children_of, name_of, some

BIG = 24 << 20


@pytest.fixture
def hashers() -> Iterator[Hashers]:
    with contextlib.closing(Hashers(2)) as made:
        yield made
    assert not [pid for pid in children_of(os.getpid()) if b"hasher" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def big(tmp_path: Path, seed: int = 1) -> tuple[Path, str]:
    data = some(BIG, seed)
    path = tmp_path / f"big{seed}"
    path.write_bytes(data)
    return path, name_of(data)


def worker_of(job: Job) -> int:
    assert job.worker
    return job.worker.process.pid


@pytest.mark.parametrize("algorithm", ["sha256", "sha512", "blake3"])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, hash_worker.WINDOW - 1, hash_worker.WINDOW, hash_worker.WINDOW + 1, (1 << 20) + 7])
def test_the_digest_is_right_at_every_edge(tmp_path: Path, hashers: Hashers, algorithm: str, size: int) -> None:
    data = some(size, size)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert hashers.digest(path, algorithm) == digests.of(data, algorithm)
    done = hashers.finish(hashers.start(path, algorithm, size))
    seen = path.stat()
    assert (done.found, done.error) == (digests.of(data, algorithm), "")
    assert (done.size, done.device, done.inode, done.mtime_ns) == (size, seen.st_dev, seen.st_ino, seen.st_mtime_ns)


@pytest.mark.parametrize("way", [hash_worker._mapped, hash_worker._read])
def test_either_way_hashes_the_same_bytes_and_misses_none_that_are_gone(tmp_path: Path, way: Callable[[Any, int, int, int], None]) -> None:
    data = some(3_000_000, 5)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        for start, length in ((0, len(data)), (1, 4096), (4096, 1), (1_234_567, 1_000_000), (len(data) - 1, 1)):
            made = hashlib.sha256()
            way(made, file.fileno(), start, length)
            assert made.digest() == hashlib.sha256(data[start : start + length]).digest()
        for start, length in ((0, len(data) + 1), (len(data), 1), (len(data) + 4096, 10)):
            with pytest.raises(ValueError, match="it ends at byte"):
                way(hashlib.sha256(), file.fileno(), start, length)


def test_the_way_that_costs_less_is_kept_and_the_digest_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, clock = [], itertools.count()
    mapped, read = hash_worker._mapped, hash_worker._read
    data = some(32 * hash_worker.FOLLOW_LEAST, 6)
    path = tmp_path / "file"
    path.write_bytes(data)

    def costly(made: Any, fd: int, start: int, length: int) -> None:
        next(clock)
        taken.append("costly")
        mapped(made, fd, start, length)

    def cheap(made: Any, fd: int, start: int, length: int) -> None:
        taken.append("cheap")
        read(made, fd, start, length)

    monkeypatch.setattr(hash_worker, "_mapped", costly)
    monkeypatch.setattr(hash_worker, "_read", cheap)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    ways, made = hash_worker.ReadStrategy(), hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, len(data), hash_worker.FOLLOW_LEAST):
            ways.update(made, file.fileno(), start, hash_worker.FOLLOW_LEAST)

    assert made.digest() == hashlib.sha256(data).digest()
    assert taken.count("costly") == hash_worker.TRIALS


def test_hashing_follows_a_file_that_grows(tmp_path: Path, hashers: Hashers) -> None:
    data = some(BIG, 3)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(data[:1000])
        file.flush()
        job = hashers.start(path, "sha256", BIG, upto=1000)
        for start in range(1000, BIG, 3_333_333):
            file.write(data[start : start + 3_333_333])
            file.flush()
            job.extend_to(min(start + 3_333_333, BIG - 1))
            hashers.wait(0.01)
        assert job.result is None
        job.extend_to(BIG)
    assert hashers.finish(job).found == name_of(data)


def test_a_file_cut_short_while_it_is_mapped_kills_the_worker_and_nobody_else(tmp_path: Path, hashers: Hashers) -> None:
    """SIGBUS: what the kernel sends when a mapped page is read that the file no longer has."""
    path, _ = big(tmp_path)
    other, name = big(tmp_path, 2)
    job = hashers.start(path, "sha256", BIG, upto=0)
    pid = worker_of(job)
    beside = hashers.start(other, "sha256", BIG)
    os.kill(pid, signal.SIGBUS)
    done = hashers.finish(job)
    assert "could not be read to its end" in done.error
    assert not done.found
    assert hashers.finish(beside).found == name
    assert hashers.digest(other, "sha256") == name


def test_a_file_truncated_under_the_hashing_is_a_failed_verification(tmp_path: Path, hashers: Hashers) -> None:
    path, name = big(tmp_path)
    job = hashers.start(path, "sha256", BIG, upto=BIG // 2)
    while job.worker and job.hashed < BIG // 4 and not job.result:
        hashers.wait(0.2)
        job.extend_to(job.upto + 1)
    os.truncate(path, BIG // 3)
    job.extend_to(BIG)
    done = hashers.finish(job)
    assert done.error
    assert done.found != name


def test_a_real_sigbus_in_the_worker(tmp_path: Path) -> None:
    """The window is mapped, then the file is cut: what ``_mapped`` would meet in the race that the size check cannot close."""
    import subprocess

    path, _ = big(tmp_path)
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); window = mmap.mmap(fd, 1 << 20, mmap.MAP_SHARED, mmap.PROT_READ);"
        "os.ftruncate(fd, 0); import hashlib; hashlib.sha256(window)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert ran.returncode == -signal.SIGBUS


def test_a_file_that_grew_is_refused(tmp_path: Path, hashers: Hashers) -> None:
    path, _ = big(tmp_path)
    with path.open("ab") as file:
        file.write(b"x")
    done = hashers.finish(hashers.start(path, "sha256", BIG))
    assert "not" in done.error
    assert not done.found


def test_only_plain_files_are_opened(tmp_path: Path, hashers: Hashers) -> None:
    target, _ = big(tmp_path)
    link, pipe, folder = tmp_path / "link", tmp_path / "pipe", tmp_path / "folder"
    link.symlink_to(target)
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (link, pipe, folder, Path("/dev/zero"), tmp_path / "missing"):
        assert hashers.finish(hashers.start(path, "sha256", BIG)).error
        with pytest.raises(OSError):
            hashers.digest(path, "sha256")


def test_renaming_the_file_does_not_matter(tmp_path: Path, hashers: Hashers) -> None:
    path, name = big(tmp_path)
    job = hashers.start(path, "sha256", BIG, upto=BIG // 2)
    while job.hashed == 0 and not job.result:
        hashers.wait(0.2)
        job.extend_to(job.upto + (1 << 20) if job.upto < BIG - (2 << 20) else job.upto)
    path.rename(tmp_path / "elsewhere")
    job.extend_to(BIG)
    assert hashers.finish(job).found == name


def test_a_dropped_job_frees_its_place(tmp_path: Path, hashers: Hashers) -> None:
    path, name = big(tmp_path)
    for _ in range(5):
        hashers.start(path, "sha256", BIG, upto=0).cancel()
        hashers.wait(0)
    assert hashers.digest(path, "sha256") == name


def test_a_scrub_reports_each_file(tmp_path: Path, hashers: Hashers) -> None:
    path, name = big(tmp_path)
    rotten, wrong = big(tmp_path, 2)[0], name_of(b"other")
    files = [(name, BIG, path), (wrong, BIG, rotten), (name, BIG - 1, path), (name, BIG, tmp_path / "missing")]
    told: list[tuple[str, int, int]] = []
    found = list(hashers.check_many(files, lambda *args: told.append(args)))
    assert sorted((it.ok, bool(it.found), bool(it.error)) for it in found) == sorted([
        (True, True, False), (False, True, False), (False, False, True), (False, False, True),
    ])  # fmt: skip
    good = next(it for it in found if it.ok)
    assert (good.digest, good.size, good.inode, good.mtime_ns) == (name, BIG, path.stat().st_ino, path.stat().st_mtime_ns)
    assert all(0 <= hashed <= size for _, hashed, size in told)


def test_a_rate_is_kept_to(tmp_path: Path, hashers: Hashers) -> None:
    """Bytes that may be read are counted, not seconds: never more than the rate allows at that time."""
    import time

    path, name = big(tmp_path)
    begun = time.monotonic()
    rate = BIG * 2
    assert all(it.ok for it in hashers.check_many([(name, BIG, path)], None, rate))
    assert time.monotonic() - begun >= BIG / rate * 0.9


def test_closing_a_scrub_stops_it(tmp_path: Path, hashers: Hashers) -> None:
    path, name = big(tmp_path)
    scrub = hashers.check_many([(name, BIG, path)] * 50)
    next(scrub)
    scrub.close()  # type: ignore[attr-defined]
    assert hashers.digest(path, "sha256") == name


def test_hashing_takes_no_memory_for_large_files(tmp_path: Path) -> None:
    """Windows are unmapped: the worker's peak memory is far below the file's size."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(600 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.closing(Hashers(1)) as hashers:
        job = hashers.start(path, "sha256", 600 << 20, upto=(600 << 20) - 1)
        pid = worker_of(job)
        peak = 0
        while job.hashed < 500 << 20 and not job.result:
            hashers.wait(0.2)
            status = Path(f"/proc/{pid}/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0])
        job.extend_to(600 << 20)
        assert hashers.finish(job).found == f"sha256:{_zeros(600)}"
    assert peak < 64 << 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def _zeros(mib: int) -> str:
    made = hashlib.sha256()
    for _ in range(mib):
        made.update(bytes(1 << 20))
    return made.hexdigest()


def test_workers_end_when_their_program_is_killed(tmp_path: Path) -> None:
    import subprocess

    path, _ = big(tmp_path)
    code = (
        "import sys; from pathlib import Path; from reconciler.fetch.hashing import Hashers; h = Hashers(1);"
        f"j = h.start(Path(sys.argv[1]), 'sha256', {BIG}, upto=0); print(j.worker.process.pid, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdin
    worker = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()
    for _ in range(500):
        if not Path(f"/proc/{worker}/exe").exists():
            break
        threading.Event().wait(0.02)
    assert not Path(f"/proc/{worker}/exe").exists()


def test_the_worker_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hashlib.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path, name = big(tmp_path)
    with contextlib.closing(Hashers(1)) as hashers:
        assert hashers.digest(path, "sha256") == name
