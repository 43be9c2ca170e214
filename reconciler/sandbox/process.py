"""
Starts one child in a sandbox, with exactly what its job names.

Rules that hold here:

1. A child gets no descriptor, no variable and no path of ours but those of its ``SandboxJob``.
2. No process of the child is left when ``Sandbox.run`` returns: they end with their namespace, or it could not start any.
3. Its output is bounded, and is an answer only with the job's nonce and after the line which says that it was confined.
4. What it may read is opened once and given by that descriptor: a path that is exchanged a moment later opens nothing else.
5. A server has a loopback interface of its own where there are namespaces. Where there are none, it may listen on one port of the
   machine's, and connect to nothing (``confine``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler import loopback
from reconciler.core.errors import SandboxUnavailable
from reconciler.sandbox import confine, machine_view, supervision
from reconciler.sandbox.supervision import OUTPUT_BYTES, ProcessResult

Mode = Literal["bubblewrap", "landlock"]

_SCRATCH_BYTES = 64 << 20
_SCRATCH = "/scratch"
#: Beside the processes that a server may start: the threads that engines start for each processor. The kernel counts them alike.
_THREADS_PER_PROCESSOR = 64
_SHARED = "/dev/shm"  # noqa: S108  a mount point of the sandbox's own


class SandboxJob(Struct, frozen=True, kw_only=True):
    """A module whose ``main`` the child runs, its job, what it may read, and the one folder that it may write."""

    module: str
    job: dict[str, Any]
    seconds: float
    read: tuple[Path, ...] = ()
    write: Path | None = None
    devices: tuple[Path, ...] = ()
    #: Variables of its environment beside those that every child has.
    variables: dict[str, str] = {}
    #: It may start programs and connect to them over a loopback interface of its own; without namespaces, to one port.
    server: bool = False
    #: Bytes of the largest file that it may write.
    file_bytes: int = 1 << 20
    #: Bytes of all files in its scratch folder, and of all shared memory.
    scratch_bytes: int = _SCRATCH_BYTES
    shared_bytes: int = _SCRATCH_BYTES
    #: Processes that a server may have at once.
    processes: int = 512
    #: Bytes of private memory; 0: no limit. Ignored with devices, whose drivers reserve far more address space than they use.
    memory_bytes: int = 0
    #: Bytes of standard output that are kept.
    answer_bytes: int = OUTPUT_BYTES


class Sandbox:
    """One mode of confinement: namespaces made by *bubblewrap*, or Landlock."""

    def __init__(self, mode: Mode, bubblewrap: Path | None = None) -> None:
        self.mode: Mode = mode
        self._bubblewrap = bubblewrap

    def run(self, job: SandboxJob, stop: supervision.StopSignal | None = None) -> ProcessResult:
        """
        Run *job* until it ends or *stop* is set, and return how it ended; no process of it is left when this returns.

        Raises:
            SandboxUnavailable: this mode cannot run such a job, or could not be started.
        """
        nonce = secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            try:
                job = self._bare_server(job, stack) if job.server and self.mode == "landlock" else job
                document = msgspec.json.encode(job.job | {"nonce": nonce})
                with _open_paths(job.read) as given:
                    child = self._start(job, given)
            except OSError as error:
                raise SandboxUnavailable(f"{self.mode} did not start: {error}") from None
            wrapped = self.mode == "bubblewrap"
            return supervision.supervise(
                child, document, nonce, seconds=job.seconds, answer_bytes=job.answer_bytes, wrapped=wrapped, stop=stop
            )

    def _bare_server(self, job: SandboxJob, stack: contextlib.ExitStack) -> SandboxJob:
        """Return *job* with a port to listen on, and a folder to write to, which *stack* deletes."""
        if why := confine.no_tcp_rules():
            raise SandboxUnavailable(f"landlock: {why}")
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="reconcile-server-"))
        given = {"port": loopback.free_port(), "scratch": scratch, "scratch_bytes": job.scratch_bytes}
        return msgspec.structs.replace(job, job=job.job | given, write=Path(scratch))

    def _start(self, job: SandboxJob, given: dict[Path, int]) -> subprocess.Popen[bytes]:
        with machine_view.etc_files() as etc:
            passed = (*given.values(),) if self._takes_descriptors() else ()
            return subprocess.Popen(
                self._argv(job, given, etc),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                close_fds=True,  # an inherited descriptor is a hole that no mount covers
                pass_fds=(*passed, *etc.values()) if job.server and self.mode == "bubblewrap" else passed,
                env=self._environment(job),
                cwd="/",
                start_new_session=True,
            )

    def _environment(self, job: SandboxJob) -> dict[str, str]:
        """Return the child's whole environment; no variable of ours is in it. Bubblewrap sets the job's own for the child alone."""
        if self.mode == "bubblewrap":
            return _fixed_variables(_SCRATCH)
        return _fixed_variables(job.job.get("scratch", "/")) | job.variables

    def _takes_descriptors(self) -> bool:
        return self._bubblewrap is None or _binds_descriptors(self._bubblewrap, self._bubblewrap.stat().st_mtime_ns)

    def _argv(self, job: SandboxJob, given: dict[Path, int], etc: dict[str, int]) -> list[str]:
        python = [sys.executable, "-I", "-B", "-c", confine.BOOTSTRAP, self._setup(job, given), str(_package().parent)]
        return [*self._bubblewrap_command(job, given, etc), *python] if self.mode == "bubblewrap" else python

    def _setup(self, job: SandboxJob, given: dict[Path, int]) -> str:
        landlock = self.mode == "landlock"
        system = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom", "/dev/zero")
        server = machine_view.BARE_SERVER if job.server else ()
        driver = ("/proc/driver/nvidia", "/proc/devices", "/proc/self", "/sys/devices", "/sys/bus", "/sys/class", "/sys/module")
        setup = {
            "module": job.module,
            "packages": [*map(str, _package_folders())],
            "parent": os.getpid() if landlock else 0,  # in a namespace of its own it sees another number
            "landlock": landlock,
            "server": job.server,
            "port": job.job.get("port", 0),
            "writes": job.write is not None,
            "read": [*system, *server, *(driver if job.devices else ()), *map(str, _python_folders())],
            "given": [*given.values()] if landlock else [],
            "write": ["/dev/null", *([str(job.write)] if job.write else [])],
            # A driver names its threads through these files, and CUDA fails where it may not. The child opens it: its threads only.
            "devices": [*map(str, job.devices), *(["/proc/self/task"] if job.devices else [])],
            "limits": _limits(job, bare=landlock),
        }
        return json.dumps(setup)

    def _bubblewrap_command(self, job: SandboxJob, given: dict[Path, int], etc: dict[str, int]) -> list[str]:
        """Return the command that makes the namespaces. The root becomes read-only last, after every mount point in it was made."""
        binds = [("--ro-bind", str(path), path) for path in _python_folders()]
        by_descriptor = self._takes_descriptors()
        binds += [("--ro-bind-fd", str(fd), path) if by_descriptor else ("--ro-bind", str(path), path) for path, fd in given.items()]
        arguments = [
            str(self._bubblewrap),
            "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
            "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox",
            "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin",
            "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
            "--proc", "/proc", "--dev", "/dev", "--size", str(job.scratch_bytes), "--tmpfs", _SCRATCH,
            "--size", str(job.shared_bytes), "--tmpfs", _SHARED,
        ]  # fmt: skip
        arguments += _server_view(job, etc) if job.server else []
        for flag, source, target in binds:
            arguments += [flag, source, str(target)]
        for path in job.devices:
            arguments += ["--dev-bind-try", str(path), str(path)]
        if job.devices:
            arguments += ["--ro-bind-try", "/sys", "/sys"]  # a driver finds its GPU's bus address in it
        for name, value in job.variables.items():
            arguments += ["--setenv", name, value]
        if job.write:
            arguments += ["--bind", str(job.write), str(job.write)]
        return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"]


def _server_view(job: SandboxJob, etc: dict[str, int]) -> list[str]:
    """Return the arguments that show a server what it needs of the machine, and hide what tells this machine from another."""
    arguments = ["--size", str(_SCRATCH_BYTES), "--tmpfs", "/tmp", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]  # noqa: S108  its own
    for path, fd in etc.items():
        arguments += ["--ro-bind-data", str(fd), path]
    if job.devices:  # a driver reads of /proc and /sys what it likes
        return arguments
    for seen in machine_view.processors():
        arguments += ["--ro-bind-try", str(seen), str(seen)]
    for hidden in machine_view.HIDDEN:
        arguments += ["--dev-bind", "/dev/null", hidden] if Path(hidden).exists() else []
    return arguments


@contextlib.contextmanager
def _open_paths(paths: tuple[Path, ...]) -> Iterator[dict[Path, int]]:
    """Open each of *paths* with O_PATH: the descriptor names the file or folder, and reads nothing of it."""
    given: dict[Path, int] = {}
    try:
        for path in dict.fromkeys(paths):
            given[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)
        yield given
    finally:
        for fd in given.values():
            os.close(fd)


@functools.cache
def _binds_descriptors(bubblewrap: Path, _mtime_ns: int) -> bool:
    """Whether this bubblewrap has ``--ro-bind-fd``. Its version does not tell: distributions added the option to older ones."""
    try:
        shown = subprocess.run([bubblewrap, "--help"], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10, env={})
    except (OSError, subprocess.SubprocessError):
        return False
    return b"--ro-bind-fd" in shown.stdout + shown.stderr


def _limits(job: SandboxJob, *, bare: bool) -> dict[str, int]:
    """
    Return resource limits. That on address space is wide: each thread reserves much of it, and the model is mapped.

    Shared memory is files too. The number of processes is counted in the namespace, or, *bare*, over all that this user runs; for root
    the kernel has no such limit, and only the worker's own count holds.
    """
    processors = os.cpu_count() or 1
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(job.seconds * processors) + 5,
        "RLIMIT_FSIZE": max(job.file_bytes, job.shared_bytes) if job.server and not bare else job.file_bytes,
        "RLIMIT_NOFILE": 4096 if job.server else 256,
    }
    if job.server:
        limits["RLIMIT_NPROC"] = job.processes + _THREADS_PER_PROCESSOR * processors + (_own_threads() if bare else 0)
    if job.memory_bytes and not job.devices:
        limits |= {"RLIMIT_DATA": job.memory_bytes, "RLIMIT_AS": 3 * job.memory_bytes + processors * (256 << 20)}
    return limits


def _own_threads() -> int:
    """Return how many threads this user's processes have now."""
    import psutil

    user = os.getuid()
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            count += process.num_threads() if process.uids().real == user else 0
    return count


def _fixed_variables(home: str) -> dict[str, str]:
    """Return what every child has in its environment."""
    fixed = {"PATH": "/usr/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    # numpy starts OpenBLAS when it is imported, with a thread for each processor: a third of a small test job, for sums that none has.
    return fixed | {"CUDA_CACHE_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _package_folders() -> tuple[Path, ...]:
    """Return where our packages are installed: a user's own folder, and those that a ``.pth`` file names, are outside the interpreter's."""
    return tuple(Path(folder) for folder in sys.path if Path(folder).name in {"site-packages", "dist-packages"})


def _python_folders() -> tuple[Path, ...]:
    """Return the folders that this interpreter and its packages need, each once, none inside another or under /usr."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1], _package(), *_package_folders()}
    found |= {path.resolve() for path in found}
    kept: list[Path] = []
    for path in sorted(found, key=lambda one: len(one.parts)):
        if path.is_dir() and not any(path.is_relative_to(other) for other in (*kept, Path("/usr"))):
            kept.append(path)
    return tuple(kept)
