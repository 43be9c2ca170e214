"""
The sandbox: a child without network, without the file system beyond what it needs, without a way to other processes.

Two modes, both with the filter and limits of ``cage``: ``bubblewrap``, namespaces of its own; and ``landlock``, where namespaces are
not to be had. There is no third: where neither works, nothing is run. A mode counts as working only after the hostile probe met every
door shut and could read its canary; that is remembered for this boot and kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler.errors import SandboxUnavailable
from reconciler.runtime import cage

Mode = Literal["bubblewrap", "landlock"]
Setting = Literal["auto", "bubblewrap", "landlock"]

#: Never looked for through PATH: a file that somebody put there would be asked to guard us.
BUBBLEWRAP = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))
OUTPUT_BYTES = 65_536
_KILL_SECONDS = 5.0
_PROBE_SECONDS = 30.0
_SCRATCH_BYTES = 64 << 20
_SCRATCH = "/scratch"


class Cell(Struct, frozen=True, kw_only=True):
    """What a child is given: a module to run, its job, what it may read and the one folder that it may write."""

    module: str
    job: dict[str, Any]
    seconds: float
    read: tuple[Path, ...] = ()
    write: Path | None = None
    devices: tuple[Path, ...] = ()
    #: Bytes of the largest file that it may write.
    file_bytes: int = 1 << 20
    processes: int = 4096
    #: Bytes of its answer that are read; what it says beyond is noise.
    answer_bytes: int = OUTPUT_BYTES


class Ended(Struct, frozen=True, kw_only=True):
    """How a child ended."""

    #: Its document, if it wrote one that carries the nonce.
    answer: dict[str, Any] | None
    code: int
    #: The signal that killed it, or 0.
    signal: int
    timed_out: bool
    #: The end of what it wrote to standard error.
    errors: str

    @property
    def setup_failed(self) -> bool:
        """Whether the sandbox, and not what it held, is to blame."""
        return self.answer is None and not self.timed_out and (self.code == cage.SETUP_FAILED or "bwrap: " in self.errors)


class Sandbox:
    """One working mode."""

    def __init__(self, mode: Mode, bubblewrap: Path | None = None) -> None:
        self.mode = mode
        self._bubblewrap = bubblewrap

    def run(self, cell: Cell) -> Ended:
        """Run *cell* and return how it ended; whatever the child does, its whole group is gone when this returns."""
        nonce = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="reconcile-cell-") as scratch:
            argv = self._argv(cell, scratch)
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                close_fds=True,  # an inherited descriptor is a hole that no mount covers
                env=_environment(scratch if self.mode == "landlock" else _SCRATCH),
                cwd="/",
                start_new_session=True,
            )
            return _attended(child, cell, nonce)

    def _argv(self, cell: Cell, scratch: str) -> list[str]:
        python = [sys.executable, "-I", "-B", "-c", cage.BOOTSTRAP, self._setup(cell, scratch), str(_package().parent)]
        return [*self._wrapped(cell), *python] if self.mode == "bubblewrap" else python

    def _setup(self, cell: Cell, scratch: str) -> str:
        landlock = self.mode == "landlock"
        system = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/sys/devices/system/cpu", "/dev/null", "/dev/urandom", "/dev/zero")
        write = [scratch, "/dev/null", *([str(cell.write)] if cell.write else [])]
        setup = {
            "module": cell.module,
            "parent": os.getpid() if landlock else 0,  # in a namespace of its own it sees another number
            "landlock": landlock,
            "read": [*system, *map(str, _python_folders()), *map(str, cell.read)],
            "write": write,
            "devices": [*map(str, cell.devices)],
            "limits": {
                "RLIMIT_CORE": 0,
                "RLIMIT_CPU": int(cell.seconds * (os.cpu_count() or 1)) + 5,
                "RLIMIT_FSIZE": cell.file_bytes,
                "RLIMIT_NOFILE": 256,
                "RLIMIT_NPROC": cell.processes,
            },
        }
        return json.dumps(setup)

    def _wrapped(self, cell: Cell) -> list[str]:
        """Return the command that makes the namespaces. The order matters: the root is made read-only after every mount point in it."""
        binds = [("--ro-bind", path) for path in (*_python_folders(), *cell.read)]
        arguments = [
            str(self._bubblewrap),
            "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534",
            "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox",
            "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin",
            "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
            "--proc", "/proc", "--dev", "/dev", "--size", str(_SCRATCH_BYTES), "--tmpfs", _SCRATCH,
        ]  # fmt: skip
        for flag, path in binds:
            arguments += [flag, str(path), str(path)]
        for path in cell.devices:
            arguments += ["--dev-bind-try", str(path), str(path)]
        if cell.devices:
            arguments += ["--ro-bind-try", "/sys", "/sys"]  # a driver looks for its GPU's place in it
        if cell.write:
            arguments += ["--bind", str(cell.write), str(cell.write)]
        return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]


def _environment(home: str) -> dict[str, str]:
    """Return all of a child's environment: nothing of ours reaches it."""
    fixed = {"PATH": "/usr/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    return fixed | {"CUDA_CACHE_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _python_folders() -> tuple[Path, ...]:
    """Return the folders that this interpreter and its packages need, each once, none inside another or under /usr."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1], _package()}
    found |= {path.resolve() for path in found}
    kept: list[Path] = []
    for path in sorted(found, key=lambda one: len(one.parts)):
        if not any(path.is_relative_to(other) for other in (*kept, Path("/usr"))):
            kept.append(path)
    return tuple(kept)


# -- attending a child -----------------------------------------------------------------------------


def _attended(child: subprocess.Popen[bytes], cell: Cell, nonce: str) -> Ended:
    """Feed the child, read at most so much of what it says, and end it and its group in time."""
    job = msgspec.json.encode(cell.job | {"nonce": nonce})
    out, errors = _Tail(child.stdout, cell.answer_bytes, keep_first=True), _Tail(child.stderr, OUTPUT_BYTES, keep_first=False)
    timed_out = False
    try:
        feeding = threading.Thread(target=_feed, args=(child, job), daemon=True)
        feeding.start()
        child.wait(cell.seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _end_group(child)
    said, complaint = out.text(), errors.text()
    code = child.returncode
    return Ended(
        answer=_answer(said, nonce),
        code=code,
        signal=0 if timed_out else -code if code < 0 else code - 128 if 128 < code < 160 else 0,
        timed_out=timed_out,
        errors=complaint.decode(errors="replace")[-4000:],
    )


def _feed(child: subprocess.Popen[bytes], job: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.write(job)
        child.stdin.close()


def _end_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_KILL_SECONDS)
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()


class _Tail:
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
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("nonce") == nonce else None


# -- choosing and probing --------------------------------------------------------------------------


class Probed(Struct, frozen=True, kw_only=True):
    """What the probe saw of a mode."""

    mode: Mode
    works: bool
    #: Doors that were open, or why it could not be tried.
    detail: str
    bubblewrap: str = ""


def choose(setting: Setting, cache: Path | None = None) -> Sandbox:
    """
    Return a sandbox that the probe found good, the stronger mode first.

    Raises:
        SandboxUnavailable: none is; the message says what each lacked.
    """
    modes: tuple[Mode, ...] = ("bubblewrap", "landlock") if setting == "auto" else (setting,)
    failures = []
    for mode in modes:
        probed = _remembered(mode, cache)
        if probed.works:
            return Sandbox(mode, Path(probed.bubblewrap) if probed.bubblewrap else None)
        failures.append(f"{mode}: {probed.detail}")
    raise SandboxUnavailable("; ".join(failures))


def examine() -> tuple[Probed, ...]:
    """Return what the probe sees of each mode now."""
    return tuple(probe(mode) for mode in ("bubblewrap", "landlock"))


def find_bubblewrap() -> Path | str:
    """Return bubblewrap's path, or why there is none to be trusted."""
    for path in BUBBLEWRAP:
        with contextlib.suppress(OSError):
            seen = path.stat()
            if seen.st_uid != 0 or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"{path} is not root's alone"
            return path
    return "bubblewrap is not installed"


def _remembered(mode: Mode, cache: Path | None) -> Probed:
    """Probe *mode*, once for this boot, kernel and bubblewrap; only a good result is remembered."""
    path = cache / f"sandbox-{mode}.json" if cache else None
    key = _identity(mode)
    if path is not None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(path.read_bytes(), type=tuple[str, Probed])
            if known[0] == key and known[1].works:
                return known[1]
    found = probe(mode)
    if path is not None and found.works:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(msgspec.json.encode((key, found)))
            temporary.replace(path)
    return found


def _identity(mode: Mode) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = find_bubblewrap() if mode == "bubblewrap" else ""
    seen = found.stat() if isinstance(found, Path) else None
    program = f"{found} {seen.st_ino} {seen.st_mtime_ns} {seen.st_size}" if seen else str(found)
    return f"{boot} {os.uname().release} {os.getuid()} {sys.executable} {program}"


def probe(mode: Mode) -> Probed:
    """Run the hostile probe in *mode* and say what it saw."""
    found = find_bubblewrap() if mode == "bubblewrap" else None
    if isinstance(found, str):
        return Probed(mode=mode, works=False, detail=found)
    with tempfile.TemporaryDirectory(prefix="reconcile-probe-") as folder, _doors(Path(folder)) as job:
        ended = Sandbox(mode, found).run(
            Cell(module="reconciler.runtime.probe", job=job, seconds=_PROBE_SECONDS, read=(Path(job["canary"]),))
        )
    return Probed(mode=mode, works=(why := _judged(ended, job)) == "", detail=why or "every door was shut", bubblewrap=str(found or ""))


def _judged(ended: Ended, job: dict[str, Any]) -> str:
    if ended.answer is None:
        why = ended.errors.strip().splitlines()[-1:] or [f"the probe ended with {ended.code}"]
        return f"it did not start: {why[0][:300]}"
    if ended.answer.get("open"):
        return f"the probe could get through: {', '.join(map(str, ended.answer['open']))}"
    return "" if ended.answer.get("canary") == job["word"] else "the probe could not read its canary"


@contextlib.contextmanager
def _doors(folder: Path) -> Iterator[dict[str, Any]]:
    """Open real doors outside, so that a probe that gets through finds somebody there."""
    word = secrets.token_hex(16)
    (folder / "canary").write_text(word)
    (folder / "canary").chmod(0o444)
    (folder / "outside").mkdir()
    (folder / "secret").write_text("secret")
    variable = f"RECONCILE_PROBE_{secrets.token_hex(8)}"
    os.environ[variable] = "secret"
    abstract = f"reconcile-{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        threading.Thread(target=_echo, args=(udp,), daemon=True).start()
        for name in (str(folder / "unix"), "\0" + abstract):
            door = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            door.bind(name)
            door.listen()
        try:
            yield {
                "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": str(folder / "unix"), "abstract": abstract,
                "secret": str(folder / "secret"), "outside": str(folder / "outside"), "canary": str(folder / "canary"), "word": word,
                "parent": os.getpid(), "variable": variable,
            }  # fmt: skip
        finally:
            del os.environ[variable]
            with contextlib.suppress(OSError):
                udp.shutdown(socket.SHUT_RDWR)


def _echo(udp: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            _, sender = udp.recvfrom(16)
            if sender is None:  # shut down
                return
            udp.sendto(b"y", sender)


