"""
One child in one cell: what it is given, how it is started, fed, heard and ended.

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
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler.errors import SandboxUnavailable
from reconciler.runtime import cage

Mode = Literal["bubblewrap", "landlock"]

OUTPUT_BYTES = 65_536
_KILL_SECONDS = 5.0
_SCRATCH_BYTES = 64 << 20
_SCRATCH = "/scratch"
_SHARED = "/dev/shm"  # noqa: S108  a mount point of the sandbox's own


class Cell(Struct, frozen=True, kw_only=True):
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


class Ended(Struct, frozen=True, kw_only=True):
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


class Sandbox:
    """One working mode."""

    def __init__(self, mode: Mode, bubblewrap: Path | None = None) -> None:
        self.mode: Mode = mode
        self._bubblewrap = bubblewrap

    def run(self, cell: Cell) -> Ended:
        """
        Run *cell* and return how it ended; nothing of the child is left when this returns.

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
        return _attended(child, cell, job, nonce, wrapped=self.mode == "bubblewrap")

    def _started(self, cell: Cell, given: dict[Path, int]) -> subprocess.Popen[bytes]:
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

    def _argv(self, cell: Cell, given: dict[Path, int]) -> list[str]:
        python = [sys.executable, "-I", "-B", "-c", cage.BOOTSTRAP, self._setup(cell, given), str(_package().parent)]
        return [*self._wrapped(cell, given), *python] if self.mode == "bubblewrap" else python

    def _setup(self, cell: Cell, given: dict[Path, int]) -> str:
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
            "devices": [*map(str, cell.devices)],
            "limits": _limits(cell),
        }
        return json.dumps(setup)

    def _wrapped(self, cell: Cell, given: dict[Path, int]) -> list[str]:
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


def _limits(cell: Cell) -> dict[str, int]:
    """Return resource limits. That on address space is wide: each thread reserves much of it, and the model is mapped into it."""
    processors = os.cpu_count() or 1
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(cell.seconds * processors) + 5,
        "RLIMIT_FSIZE": cell.file_bytes,
        "RLIMIT_NOFILE": 1024 if cell.server else 256,
    }
    if cell.memory_bytes and not cell.devices:
        mapped = sum(path.stat().st_size for folder in cell.read for path in _files(folder))
        limits |= {"RLIMIT_DATA": cell.memory_bytes, "RLIMIT_AS": 2 * cell.memory_bytes + 2 * mapped + processors * (256 << 20)}
    return limits


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]


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


# -- attending a child -----------------------------------------------------------------------------


def _attended(child: subprocess.Popen[bytes], cell: Cell, job: bytes, nonce: str, *, wrapped: bool) -> Ended:
    """Feed the child, read at most so much of what it says, and end it and its group in time."""
    out = _Pipe(child.stdout, len(cage.CONFINED) + cell.answer_bytes, keep_first=True)
    errors = _Pipe(child.stderr, OUTPUT_BYTES, keep_first=False)
    threading.Thread(target=_feed, args=(child, job), daemon=True).start()
    try:
        timed_out = not _exits(child.pid, cell.seconds)
    finally:
        _end_group(child)
    said, complaint, code = out.text(), errors.text(), child.returncode
    killed_inside = wrapped and 128 < code < 160  # bubblewrap's way of telling
    return Ended(
        answer=_answer(said.removeprefix(cage.CONFINED), nonce),
        confined=said.startswith(cage.CONFINED),
        code=code,
        signal=0 if timed_out else -code if code < 0 else code - 128 if killed_inside else 0,
        timed_out=timed_out,
        errors=complaint.decode(errors="replace")[-16_384:],
    )


def _exits(pid: int, seconds: float) -> bool:
    """Wait for the child's end without reaping it: until that is done its number, and its group's, is nobody else's."""

    def wait() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(seconds)
    return not waiting.is_alive()


def _feed(child: subprocess.Popen[bytes], job: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.write(job)
        child.stdin.close()


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()


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
