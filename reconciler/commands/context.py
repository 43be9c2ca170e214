"""
What a command knows of its node before it begins: the settings as values, the clock, the machine's facts; and the store, held.

Rules that hold here:

1. Settings become values once, by ``from_settings``: every path is resolved, every amount is in the unit that its name tells.
   Commands take the ``NodeContext`` or parts of it, never ``Settings``.
2. The clock is read once a run wherever an instant decides.
3. One run holds the store for writing at a time; readers need no lock.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from reconciler import files
from reconciler.core import units
from reconciler.core.errors import InternalError, ReconcileError, SettingsError
from reconciler.core.node import Limits, NodeFacts, Policy
from reconciler.core.text import printable
from reconciler.fetch.settings import CredentialSource, FetchSettings, SwarmSettings
from reconciler.serve.content import Server
from reconciler.settings import HostCredential, Runtimes, Settings
from reconciler.store.layout import Layout

if TYPE_CHECKING:
    from reconciler.store.ledger import Ledger

Clock = Callable[[], datetime]


def wall_clock() -> datetime:
    """Return the current instant."""
    return datetime.now(UTC)


class NodeContext(Struct, frozen=True, kw_only=True):
    """One node's settings as values."""

    #: The folder of the settings file.
    folder: Path
    #: URL, or absolute path, of the network's signed snapshot.
    snapshot: str
    #: The pinned trust root, and its fingerprint if the operator was told it.
    root_path: Path
    root_fingerprint: str
    #: URL or path template with ``{version}`` of newer roots; empty: none are looked for.
    root_updates: str
    #: How long no snapshot can be fetched before that is more than a warning.
    quiet_seconds: float
    #: ``models.lock``, and the signed envelope beside it.
    lock_path: Path
    envelope_path: Path
    #: The node's name and groups, which place it in rollouts.
    node_id: str
    cohorts: tuple[str, ...]
    #: Where signed statuses go, a folder or an address (empty: none are made), and the key that signs them.
    report_to: str
    report_key: Path | None
    layout: Layout
    policy: Policy
    limits: Limits
    download: FetchSettings
    swarm: SwarmSettings
    sandbox: Literal["auto", "bubblewrap", "landlock"]
    #: The longest time that a test job may take.
    test_seconds: float
    runtimes: Runtimes
    #: Commands (argv) that are run after a swap; empty: none.
    activated_hook: tuple[str, ...]
    healthy_hook: tuple[str, ...]
    healthy_seconds: float
    #: The servers that follow the active set.
    servers: tuple[Server, ...] = ()
    #: Time between the agent's cycles, and the most that is added to it at random.
    interval_seconds: float
    jitter_seconds: float
    #: Where the agent writes the status page after each cycle; None: nowhere.
    page_path: Path | None = None
    #: Host and port at which the agent serves its metrics; None: nowhere.
    metrics_address: tuple[str, int] | None
    clock: Clock

    @property
    def envelope_hint(self) -> str:
        """How a damaged envelope beside the lock is mended: where it is the settings' own snapshot, it cannot be fetched."""
        if self.snapshot == str(self.envelope_path):
            return f"bring it back from git: `git checkout HEAD -- {self.envelope_path.name}`"
        return "run `reconcile lock` to get it anew, or bring it back from git"


def from_settings(settings: Settings, *, clock: Clock = wall_clock) -> NodeContext:
    """
    Return the values of *settings*.

    Raises:
        SettingsError: a path is not UTF-8.
    """
    network = settings.network
    made = NodeContext(
        folder=Path(settings.base),
        snapshot=_source(settings, network.snapshot),
        root_path=settings.path(network.root),
        root_fingerprint=network.root_fingerprint,
        root_updates=_source(settings, network.root_updates),
        quiet_seconds=units.seconds(network.quiet_after),
        lock_path=settings.path(network.lockfile),
        envelope_path=settings.envelope_path,
        node_id=settings.node.id,
        cohorts=settings.node.cohorts,
        report_to=_source(settings, settings.report.to),
        report_key=settings.path(settings.report.key) if settings.report.key else None,
        layout=Layout(settings.store_path, settings.archive_path),
        policy=settings.policy,
        limits=Limits(),
        download=_download(settings),
        swarm=_swarm(settings),
        sandbox=settings.smoke.sandbox,
        test_seconds=units.seconds(settings.smoke.timeout),
        runtimes=settings.engines,
        activated_hook=settings.command(settings.hooks.activated),
        healthy_hook=settings.command(settings.hooks.healthy),
        healthy_seconds=units.seconds(settings.hooks.healthy_timeout),
        servers=_servers(settings),
        interval_seconds=units.seconds(settings.agent.interval),
        jitter_seconds=units.seconds(settings.agent.jitter),
        page_path=settings.path(settings.agent.page) if settings.agent.page else None,
        metrics_address=address(settings.agent.metrics_address) if settings.agent.metrics_address else None,
        clock=clock,
    )
    _check_encodable(made)
    return made


def address(text: str) -> tuple[str, int]:
    """
    Return host and port of *text*, HOST:PORT or [HOST]:PORT.

    Raises:
        SettingsError: it is not one.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise SettingsError(f"{printable(text)!r} is not an address, as 127.0.0.1:9460 or [::1]:9460 is")
    return host, int(port)


#: Where temporary folders are made, in the order in which the variables count.
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")


def _check_encodable(context: NodeContext) -> None:
    """
    Refuse paths that are not UTF-8: child processes get them in JSON, which holds nothing else.

    Such a path comes from the working directory, from a home folder, from a link or from the environment, since the settings are UTF-8.
    """
    paths = {
        "the trust root": context.root_path, "the lockfile": context.lock_path, "[network] snapshot": context.snapshot,
        "the store": os.path.realpath(context.layout.root), "cold storage": os.path.realpath(context.layout.cold),
        "[download] ca_file": context.download.ca_file or "", "[download] netrc": context.download.netrc or "",
    } | {f"${name}": os.environ.get(name, "") for name in _TEMPORARY}  # fmt: skip
    for what, path in paths.items():
        try:
            str(path).encode()
        except UnicodeEncodeError:
            hint = "rename the folder, or put it elsewhere"
            raise SettingsError(f"{what}: the path {printable(str(path))} is not UTF-8", hint=hint) from None


def _source(settings: Settings, text: str) -> str:
    """Return *text*, a URL or path, with the path made absolute; nothing stays nothing."""
    return text if "://" in text or not text else str(settings.path(text))


def _download(settings: Settings) -> FetchSettings:
    chosen = settings.download
    return FetchSettings(
        mirrors=chosen.mirrors,
        fallback=chosen.fallback,
        allowed_hosts=chosen.allowed_hosts,
        own_redirects=chosen.redirects,
        credentials=tuple(_credential(settings, host, one) for host, one in chosen.credentials.items()),
        allow_http=chosen.allow_http,
        connections=chosen.connections,
        concurrent=chosen.concurrent,
        limit_bytes=units.size(chosen.limit),
        min_rate_bytes=units.size(chosen.min_rate),
        timeout_seconds=units.seconds(chosen.timeout),
        proxy=chosen.proxy,
        ca_file=settings.path(chosen.ca_file) if chosen.ca_file else None,
        netrc=settings.path(chosen.netrc) if chosen.netrc else None,
    )


def _swarm(settings: Settings) -> SwarmSettings:
    chosen = settings.swarm
    return SwarmSettings(
        enabled=chosen.enabled,
        folder=settings.path(chosen.folder),
        ports=chosen.ports,
        concurrent=settings.download.concurrent,
        upload_limit_bytes=units.size(chosen.upload_limit),
        seed_seconds=units.seconds(chosen.seed_time),
        seed_ratio=chosen.seed_ratio,
        reserve_bytes=units.size(chosen.reserve),
        slow_seconds=units.seconds(chosen.slow_after),
        min_rate_bytes=units.size(chosen.min_rate),
        alone_seconds=units.seconds(chosen.alone_after),
        ca_file=settings.path(settings.download.ca_file) if settings.download.ca_file else None,
    )


def _credential(settings: Settings, host: str, given: HostCredential) -> CredentialSource:
    file = given.token_file or given.basic_file
    return CredentialSource(
        host=host,
        kind="basic" if given.basic_file else "bearer",
        file=file if not file or file.startswith("%d/") else str(settings.path(file)),
        variable=given.token_env,
    )


def _servers(settings: Settings) -> tuple[Server, ...]:
    if not settings.serve:
        return ()
    from reconciler.serve.kinds import KINDS  # a node without servers needs none of them

    for one in settings.serve:
        if fault := KINDS[one.kind].check_options(one.options):
            raise SettingsError(f"[[serve]] {one.name} options: {fault}")
    return tuple(
        Server(
            name=one.name,
            kind=one.kind,
            path=settings.path(one.path).absolute() if one.path else None,
            reload=settings.command(one.reload) if isinstance(one.reload, tuple) else one.reload,
            models=one.models,
            options=one.options,
            drain_seconds=units.seconds(one.drain),
            folder=Path(settings.base),
        )
        for one in settings.serve
    )


class RunOptions(Struct, frozen=True, kw_only=True):
    """What the command line says about one run."""

    #: Model ids: only these, and none of those.
    only: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    #: The lock must be what the snapshot compiles to; a new one is never fetched.
    locked: bool = False
    #: No network at all.
    offline: bool = False
    #: Hosts that gave nothing in earlier runs are left alone until their time, as nobody waits for this run.
    patient: bool = False
    #: Blobs come from this bundle alone, and not from the network.
    bundle: Path | None = None
    #: How long to wait for another run to let the store go.
    lock_timeout_seconds: float = 0.0


def measure_node(context: NodeContext) -> NodeFacts:
    """Return the facts of this machine; a missing driver or engine is a fact, not an error."""
    from reconciler.runtime import devices, engines

    gpus = devices.gpus(context.runtimes.llama_cpp.devices)
    disk = os.statvfs(existing_folder(context.layout.root))
    return NodeFacts(
        gpus=gpus,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disk_total_bytes=disk.f_blocks * disk.f_frsize,
        disk_free_bytes=disk.f_bavail * disk.f_frsize,
        disk_total_inodes=disk.f_files,
        disk_free_inodes=disk.f_favail,
        engines=engines.installed(context.runtimes, context.layout.root / "cache"),
        device=devices.device_label(gpus),
        split=context.runtimes.llama_cpp.split,
    )


def remember_engines(context: NodeContext) -> None:
    """Ask the configured servers for their versions, where that is not known, so that readers need not; the caller holds the store."""
    if context.runtimes.servers:
        from reconciler.runtime import engines

        engines.remember_versions(context.runtimes, context.layout.root / "cache")


def existing_folder(path: Path) -> Path:
    """Return *path*, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def hold_store(context: NodeContext, *, timeout_seconds: float = 0.0) -> Iterator[Ledger]:
    """
    Hold the store as its one writer, made if it is missing, and give its ledger, open for writing.

    Raises:
        InternalError: a bug ended what was done with it; there is a report, and an incident.
        StoreBusy: another run still holds it after *timeout_seconds*.
        StoreNewer: a newer version of this program wrote it.
        StoreError: it cannot be read or written.
    """
    from reconciler.store import atomic, housekeeping, store_format, writer_lock
    from reconciler.store.ledger import Ledger

    layout = context.layout
    atomic.make_folder(layout.root)
    with files.translate_errors(f"read the store {layout.root}"):
        layout.check(fan_out=True)
    store_format.check_store(layout)
    with (
        writer_lock.hold(layout.lock_file, timeout_seconds=timeout_seconds),
        housekeeping.released_when_full(layout.space_reserve),
        Ledger.writing(layout.ledger) as ledger,
        _bugs_logged(layout, ledger),
    ):
        store_format.write(layout)
        yield ledger


@contextlib.contextmanager
def _bugs_logged(layout: Layout, ledger: Ledger) -> Iterator[None]:
    """Raise an exception that nobody raised on purpose as an ``InternalError``, with a report and an incident."""
    try:
        yield
    except (ReconcileError, OSError):
        raise
    except Exception as error:
        from reconciler.core.events import Incident

        found = report_bug(error, layout)
        with contextlib.suppress(ReconcileError):
            ledger.log_incident(Incident(kind=found.name, detail=found.message), wall_clock())
        raise found from error


def report_bug(error: Exception, layout: Layout | None = None) -> InternalError:
    """
    Write a report of *error*, an exception that nobody raised on purpose, and return the error that names the report; raises nothing.

    The report goes into the store at *layout*; where there is none that can be written, into a new private folder for temporary files.
    """
    try:
        import tempfile

        from reconciler.store import crash_report  # with all that describes a traceback, which nothing else needs

        if layout is None or not os.access(layout.root, os.W_OK | os.X_OK):
            folder = Path(tempfile.mkdtemp(prefix="reconcile-"))
            layout = Layout(folder, folder / "archive")
        return crash_report.internal_error(layout, error, {"command": " ".join(sys.argv[1:2])}, wall_clock())
    except Exception as second:  # noqa: BLE001  a bug in what reports bugs must not hide the first
        return InternalError(f"{type(error).__name__}; no report could be written: {type(second).__name__}")
