"""
One child in one cell: what it is given, and how it is started.

Rules that hold here:

1. A child gets no descriptor, no variable and no path of ours but those of its ``Cell``.
2. Whatever it does, nothing of it is left when ``Sandbox.run`` returns: its namespace ends with it, or it could make no process.
3. What it says is bounded, and counts only with the job's nonce, after the line that says that it was confined.
4. What it may read is opened once and given by that descriptor, so that a path which leads elsewhere a moment later opens nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler.core.errors import SandboxUnavailable
from reconciler.sandbox import confine, supervision
from reconciler.sandbox.supervision import OUTPUT_BYTES, ProcessResult

Mode = Literal["bubblewrap", "landlock"]

_SCRATCH_BYTES = 64 << 20
_SCRATCH = "/scratch"
_SHARED = "/dev/shm"  # noqa: S108  a mount point of the sandbox's own


class SandboxJob(Struct, frozen=True, kw_only=True):
    """What a child is given: a module whose ``main`` it runs, its job, what it may read and the one folder that it may write."""

    module: str
    job: dict[str, Any]
    seconds: float
    read: tuple[Path, ...] = ()
    write: Path | None = None
    devices: tuple[Path, ...] = ()
    #: May start programs and talk to them through a loopback of its own; only with namespaces.
    server: bool = False
    #: Bytes of the largest file that it may write.
    file_bytes: int = 1 << 20
    #: Bytes of private memory; 0: as much as there is. Never with devices: drivers reserve without end.
    memory_bytes: int = 0
    #: Bytes of its answer that are read; what it says beyond is noise.
    answer_bytes: int = OUTPUT_BYTES


class Sandbox:
    """One working mode."""

    def __init__(self, mode: Mode, bubblewrap: Path | None = None) -> None:
        self.mode: Mode = mode
        self._bubblewrap = bubblewrap

    def run(self, cell: SandboxJob, stop: supervision.StopSignal | None = None) -> ProcessResult:
        """
        Run *cell* until it ends or *stop* is set, and return how it ended; nothing of the child is left when this returns.

        Raises:
            SandboxUnavailable: the mode cannot hold such a cell, or could not be started.
        """
        if cell.server and self.mode != "bubblewrap":
            raise SandboxUnavailable(f"{self.mode} gives no network of its own, which a server needs; bubblewrap does")
        nonce = secrets.token_hex(16)
        job = msgspec.json.encode(cell.job | {"nonce": nonce})
        try:
            with _opened(cell.read) as given:
                child = self._started(cell, given)
        except OSError as error:
            raise SandboxUnavailable(f"{self.mode} did not start: {error}") from None
        wrapped = self.mode == "bubblewrap"
        return supervision.supervise(child, job, nonce, seconds=cell.seconds, answer_bytes=cell.answer_bytes, wrapped=wrapped, stop=stop)

    def _started(self, cell: SandboxJob, given: dict[Path, int]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._argv(cell, given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            close_fds=True,  # an inherited descriptor is a hole that no mount covers
            pass_fds=tuple(given.values()) if self._takes_descriptors() else (),
            env=_environment("/" if self.mode == "landlock" else _SCRATCH),
            cwd="/",
            start_new_session=True,
        )

    def _takes_descriptors(self) -> bool:
        return self._bubblewrap is None or _binds_descriptors(self._bubblewrap, self._bubblewrap.stat().st_mtime_ns)

    def _argv(self, cell: SandboxJob, given: dict[Path, int]) -> list[str]:
        python = [sys.executable, "-I", "-B", "-c", confine.BOOTSTRAP, self._setup(cell, given), str(_package().parent)]
        return [*self._wrapped(cell, given), *python] if self.mode == "bubblewrap" else python

    def _setup(self, cell: SandboxJob, given: dict[Path, int]) -> str:
        landlock = self.mode == "landlock"
        system = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom", "/dev/zero")
        driver = ("/proc/driver/nvidia", "/proc/devices", "/proc/self", "/sys/devices", "/sys/bus", "/sys/class", "/sys/module")
        setup = {
            "module": cell.module,
            "packages": [*map(str, _package_folders())],
            "parent": os.getpid() if landlock else 0,  # in a namespace of its own it sees another number
            "landlock": landlock,
            "server": cell.server,
            "writes": cell.write is not None,
            "read": [*system, *(driver if cell.devices else ()), *map(str, _python_folders())],
            "given": [*given.values()] if landlock else [],
            "write": ["/dev/null", *([str(cell.write)] if cell.write else [])],
            # A driver names its threads by their files there, and CUDA fails where it may not. Opened by the child: its own threads alone.
            "devices": [*map(str, cell.devices), *(["/proc/self/task"] if cell.devices else [])],
            "limits": _limits(cell),
        }
        return json.dumps(setup)

    def _wrapped(self, cell: SandboxJob, given: dict[Path, int]) -> list[str]:
        """Return the command that makes the namespaces. The order matters: the root is made read-only after every mount point in it."""
        binds = [("--ro-bind", str(path), path) for path in _python_folders()]
        by_descriptor = self._takes_descriptors()
        binds += [("--ro-bind-fd", str(fd), path) if by_descriptor else ("--ro-bind", str(path), path) for path, fd in given.items()]
        arguments = [
            str(self._bubblewrap),
            "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
            "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox",
            "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin",
            "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
            "--proc", "/proc", "--dev", "/dev", "--size", str(_SCRATCH_BYTES), "--tmpfs", _SCRATCH,
            "--size", str(_SCRATCH_BYTES), "--tmpfs", _SHARED,
        ]  # fmt: skip
        for flag, source, target in binds:
            arguments += [flag, source, str(target)]
        for path in cell.devices:
            arguments += ["--dev-bind-try", str(path), str(path)]
        if cell.devices:
            arguments += ["--ro-bind-try", "/sys", "/sys"]  # a driver looks for its GPU's place in it
        if cell.write:
            arguments += ["--bind", str(cell.write), str(cell.write)]
        return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"]


@contextlib.contextmanager
def _opened(paths: tuple[Path, ...]) -> Iterator[dict[Path, int]]:
    """Give a descriptor for each of *paths*, that names the file or folder and cannot read it."""
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
    """Whether this bubblewrap knows ``--ro-bind-fd``: asked of it, since distributions gave it to older versions."""
    try:
        told = subprocess.run([bubblewrap, "--help"], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10, env={})
    except (OSError, subprocess.SubprocessError):
        return False
    return b"--ro-bind-fd" in told.stdout + told.stderr


def _limits(cell: SandboxJob) -> dict[str, int]:
    """Return resource limits. That on address space is wide: each thread reserves much of it, and the model is mapped into it."""
    processors = os.cpu_count() or 1
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(cell.seconds * processors) + 5,
        "RLIMIT_FSIZE": cell.file_bytes,
        "RLIMIT_NOFILE": 1024 if cell.server else 256,
    }
    if cell.memory_bytes and not cell.devices:
        limits |= {"RLIMIT_DATA": cell.memory_bytes, "RLIMIT_AS": 3 * cell.memory_bytes + processors * (256 << 20)}
    return limits


def _environment(home: str) -> dict[str, str]:
    """Return all of a child's environment: nothing of ours reaches it."""
    fixed = {"PATH": "/usr/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    return fixed | {"CUDA_CACHE_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _package_folders() -> tuple[Path, ...]:
    """Return where packages are installed for us: a user's own folder and those that a path file names are outside the interpreter's."""
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
