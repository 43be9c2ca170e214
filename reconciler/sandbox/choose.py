"""
Which sandbox works here, found by attacking it.

Two modes, both with the filter and limits of ``confine``: ``bubblewrap``, namespaces of its own; and ``landlock``, where namespaces are
not to be had. There is no third: where neither works, nothing is run. A mode counts as working only after the hostile probe met every
door shut and could read its canary; that is remembered for this boot, kernel, bubblewrap and version of ourselves, a failure never is.
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
from reconciler.sandbox.process import Mode, Sandbox, SandboxJob
from reconciler.sandbox.supervision import ProcessResult

Setting = Literal["auto", "bubblewrap", "landlock"]

#: Never looked for through PATH: a file that somebody put there would be asked to guard us.
BUBBLEWRAP = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))
_PROBE_SECONDS = 30.0
#: What a cell for a server may do, since it is alone in its namespaces.
_SERVER_DOORS = {"new-program", "new-process"}


class Probed(Struct, frozen=True, kw_only=True):
    """What the probe saw of a mode."""

    mode: Mode
    works: bool
    #: Doors that were open, or why it could not be tried.
    detail: str


def choose(setting: Setting, cache: Path | None = None, *, server: bool = False) -> Sandbox:
    """
    Return a sandbox that the probe found good, the stronger mode first; with *server*, one that can hold a server.

    Raises:
        SandboxUnavailable: none is; the message says what each lacked.
    """
    modes: tuple[Mode, ...] = ("bubblewrap", "landlock") if setting == "auto" else (setting,)
    failures = []
    for mode in modes:
        if server and mode == "landlock":
            failures.append("landlock: it gives no network of its own, which a server needs")
            continue
        probed = _remembered(mode, cache, server=server)
        if probed.works:
            return _sandbox(mode)
        failures.append(f"{mode}: {probed.detail}")
    raise SandboxUnavailable("; ".join(failures))


def forget(cache: Path) -> None:
    """Forget what was remembered: a sandbox that failed after its probe must be probed again."""
    for path in cache.glob("sandbox-*.json"):
        path.unlink(missing_ok=True)


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


def _sandbox(mode: Mode) -> Sandbox:
    if mode == "landlock":
        return Sandbox(mode)
    found = find_bubblewrap()
    if isinstance(found, str):
        raise SandboxUnavailable(found)
    return Sandbox(mode, found)


def _remembered(mode: Mode, cache: Path | None, *, server: bool) -> Probed:
    """Probe *mode*, once for this boot, kernel and bubblewrap; only a good result is remembered."""
    path = cache / f"sandbox-{mode}{'-server' if server else ''}.json" if cache else None
    key = _identity(mode)
    if path is not None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            known = msgspec.json.decode(path.read_bytes(), type=tuple[str, Probed])
            if known[0] == key and known[1].works:
                return known[1]
    found = probe(mode, server=server)
    if path is not None and found.works:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            with open(temporary, "wb", opener=_for_us_to_write) as file:
                file.write(msgspec.json.encode((key, found)))
            temporary.replace(path)
    return found


def _for_us_to_write(path: str, flags: int) -> int:
    """Open a new file that others may read at most, whatever the umask is."""
    return os.open(path, flags, 0o644)


def _identity(mode: Mode) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = find_bubblewrap() if mode == "bubblewrap" else ""
    program = f"{found} {_seen(found)}" if isinstance(found, Path) else found
    return f"{boot} {os.uname().release} {os.getuid()} {sys.executable} {program} {_ourselves()}"


@functools.cache
def _ourselves() -> str:
    """Return what changes when the code of the sandbox does: an upgrade is not vouched for by the old probe."""
    return " ".join(_seen(path) for path in sorted(Path(__file__).parent.glob("*.py")))


def _seen(path: Path) -> str:
    seen = path.stat()
    return f"{seen.st_ino} {seen.st_mtime_ns} {seen.st_size}"


def probe(mode: Mode, *, server: bool = False) -> Probed:
    """Run the hostile probe in *mode* and say what it saw."""
    try:
        with tempfile.TemporaryDirectory(prefix="reconcile-probe-") as folder, _doors(Path(folder)) as job:
            job |= {"namespaces": mode == "bubblewrap", "server": server}
            canary = (Path(job["canary"]),)
            ended = _sandbox(mode).run(
                SandboxJob(module="reconciler.sandbox.probe", job=job, seconds=_PROBE_SECONDS, read=canary, server=server)
            )
            why = _judged(ended, job)
    except SandboxUnavailable as error:
        why = error.message
    except OSError as error:
        why = f"the probe could not be made: {error}"
    return Probed(mode=mode, works=not why, detail=why or "every door was shut")


def _judged(ended: ProcessResult, job: dict[str, Any]) -> str:
    if ended.word is None:
        why = ended.errors.strip().splitlines()[-1:] or [f"the probe ended with {ended.code}"]
        return f"it did not start: {why[0][:300]}"
    found = {str(name) for name in ended.word.get("open", ["everything"])}
    allowed = _SERVER_DOORS if job["server"] else set()
    if found - allowed:
        return f"the probe could get through: {', '.join(sorted(found - allowed))}"
    if allowed - found or (job["server"] and not ended.word.get("loopback")):
        return "no server can be started in it and spoken to"
    return "" if ended.word.get("canary") == job["word"] else "the probe could not read its canary"


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
        leaked = os.open(folder / "secret", os.O_RDONLY)
        stack.callback(os.close, leaked)
        os.set_inheritable(leaked, True)
        try:
            yield {
                "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": str(folder / "unix"), "abstract": abstract,
                "secret": str(folder / "secret"), "outside": str(folder / "outside"), "canary": str(folder / "canary"), "word": word,
                "parent": os.getpid(), "variable": variable, "descriptor": leaked,
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
