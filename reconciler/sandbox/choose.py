"""
Which sandbox works on this machine, found by attacking it.

Rules that hold here:

1. There are two modes, both with the filter and the limits of ``confine``: ``bubblewrap``, with namespaces of its own, and ``landlock``,
   for machines without namespaces. Where neither works, nothing runs.
2. A mode works only if the hostile probe, run inside it, reached nothing outside and could read its canary: the one file that it is
   given.
3. A success is cached for this boot, kernel, bubblewrap, interpreter and code of this package. A failure is never cached.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler.core.errors import SandboxUnavailable
from reconciler.sandbox import confine
from reconciler.sandbox.process import Mode, Sandbox, SandboxJob
from reconciler.sandbox.supervision import ProcessResult

SandboxSetting = Literal["auto", "bubblewrap", "landlock"]

#: PATH is not searched: anybody may have put a program of this name there.
BUBBLEWRAP = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))
_PROBE_SECONDS = 30.0
#: What a probe may do in a sandbox for a server; where it is alone in its namespaces, also ask for their interfaces.
_SERVER_MAY: dict[bool, set[str]] = {True: {"new-program", "new-process", "netlink"}, False: {"new-program", "new-process"}}


class ProbeResult(Struct, frozen=True, kw_only=True):
    """Whether a mode works on this machine."""

    mode: Mode
    works: bool
    #: What the probe reached, or why it could not run.
    detail: str


def choose(setting: SandboxSetting, cache: Path | None = None, *, server: bool = False) -> Sandbox:
    """
    Return a sandbox that works, the stronger mode first; with *server*, one in which a server can run.

    *cache* is the folder in which successes are kept; without it every call runs the probe.

    Raises:
        SandboxUnavailable: none works; the message says why, for each mode.
    """
    modes: tuple[Mode, ...] = ("bubblewrap", "landlock") if setting == "auto" else (setting,)
    failures = []
    for mode in modes:
        if server and mode == "landlock" and (why := confine.no_tcp_rules()):
            failures.append(f"landlock: {why}")
            continue
        found = _cached_probe(mode, cache, server=server)
        if found.works:
            return make_sandbox(mode)
        failures.append(f"{mode}: {found.detail}")
    raise SandboxUnavailable("; ".join(failures))


def forget_probes(cache: Path) -> None:
    """Delete the cached successes: a sandbox that failed after its probe must be probed again."""
    for path in cache.glob("sandbox-*.json"):
        path.unlink(missing_ok=True)


def probe_all() -> tuple[ProbeResult, ...]:
    """Probe each mode now, whatever the cache holds."""
    return tuple(probe(mode) for mode in ("bubblewrap", "landlock"))


def find_bubblewrap() -> Path | str:
    """Return bubblewrap's path, or a sentence that says why there is none, or none to trust."""
    for path in BUBBLEWRAP:
        with contextlib.suppress(OSError):
            seen = path.stat()
            if seen.st_uid != 0 or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"{path} is not root's alone"
            return path
    return "bubblewrap is not installed"


def make_sandbox(mode: Mode) -> Sandbox:
    """
    Return the sandbox of *mode*, without a probe.

    Raises:
        SandboxUnavailable: bubblewrap is not installed, or others than root may write to it.
    """
    if mode == "landlock":
        return Sandbox(mode)
    found = find_bubblewrap()
    if isinstance(found, str):
        raise SandboxUnavailable(found)
    return Sandbox(mode, found)


def _cached_probe(mode: Mode, cache: Path | None, *, server: bool) -> ProbeResult:
    """Probe *mode*, unless *cache* holds a success under the same key."""
    path = cache / f"sandbox-{mode}{'-server' if server else ''}.json" if cache else None
    key = _cache_key(mode)
    if path is not None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(path.read_bytes(), type=tuple[str, ProbeResult])
            if known[0] == key and known[1].works:
                return known[1]
    found = probe(mode, server=server)
    if path is not None and found.works:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            with open(temporary, "wb", opener=_open_private) as file:
                file.write(msgspec.json.encode((key, found)))
            temporary.replace(path)
    return found


def _open_private(path: str, flags: int) -> int:
    """Open a new file that nobody else may write, whatever the umask is."""
    return os.open(path, flags, 0o644)


def _cache_key(mode: Mode) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = find_bubblewrap() if mode == "bubblewrap" else ""
    program = f"{found} {_file_key(found)}" if isinstance(found, Path) else found
    return f"{boot} {os.uname().release} {os.getuid()} {sys.executable} {program} {_code_key()}"


@functools.cache
def _code_key() -> str:
    """Return a text that changes with the code of this package, so that an upgrade is probed anew."""
    return " ".join(_file_key(path) for path in sorted(Path(__file__).parent.glob("*.py")))


def _file_key(path: Path) -> str:
    seen = path.stat()
    return f"{seen.st_ino} {seen.st_mtime_ns} {seen.st_size}"


def probe(mode: Mode, *, server: bool = False) -> ProbeResult:
    """Run the hostile probe in *mode* and return what it reached."""
    try:
        with tempfile.TemporaryDirectory(prefix="reconcile-probe-") as folder, _probe_targets(Path(folder)) as job:
            job |= {"namespaces": mode == "bubblewrap", "server": server}
            canary = (Path(job["canary"]),)
            ended = make_sandbox(mode).run(
                SandboxJob(module="reconciler.sandbox.probe", job=job, seconds=_PROBE_SECONDS, read=canary, server=server)
            )
            why = _failure(ended, job)
    except SandboxUnavailable as error:
        why = error.message
    except OSError as error:
        why = f"the probe could not be made: {error}"
    return ProbeResult(mode=mode, works=not why, detail=why or "nothing outside was reachable")


def _failure(ended: ProcessResult, job: dict[str, Any]) -> str:
    """Return why the mode does not work, or nothing if it does."""
    answer = ended.valid_answer
    if answer is None:
        why = ended.errors.strip().splitlines()[-1:] or [f"the probe ended with {ended.code}"]
        return f"it did not start: {why[0][:300]}"
    succeeded = {str(name) for name in answer.get("succeeded", ["everything"])}
    allowed = _SERVER_MAY[job["namespaces"]] if job["server"] else set()
    if succeeded - allowed:
        return f"the probe reached: {', '.join(sorted(succeeded - allowed))}"
    if allowed - succeeded or (job["server"] and not answer.get("loopback")):
        return "no server can be started in it and spoken to"
    return "" if answer.get("canary") == job["canary_text"] else "the probe could not read its canary"


@contextlib.contextmanager
def _probe_targets(folder: Path) -> Iterator[dict[str, Any]]:
    """Make what the probe tries to reach: sockets, files, a variable, a descriptor; yield the probe's job, which names them."""
    canary_text = secrets.token_hex(16)
    (folder / "canary").write_text(canary_text)
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
        threading.Thread(target=_answer_datagrams, args=(udp,), daemon=True).start()
        for name in (str(folder / "unix"), "\0" + abstract):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(name)
            listener.listen()
        leaked = os.open(folder / "secret", os.O_RDONLY)
        stack.callback(os.close, leaked)
        os.set_inheritable(leaked, True)
        try:
            yield {
                "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": str(folder / "unix"), "abstract": abstract,
                "secret": str(folder / "secret"), "outside": str(folder / "outside"), "canary": str(folder / "canary"),
                "canary_text": canary_text, "parent": os.getpid(), "variable": variable, "descriptor": leaked,
            }  # fmt: skip
        finally:
            del os.environ[variable]
            with contextlib.suppress(OSError):
                udp.shutdown(socket.SHUT_RDWR)


def _answer_datagrams(udp: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            _, sender = udp.recvfrom(16)
            if sender is None:  # shut down
                return
            udp.sendto(b"y", sender)
