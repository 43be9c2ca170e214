"""
Commands that only read: status, incidents, history, the agent's health, and the figures for metrics.

Rules that hold here:

1. Nothing here changes anything, and all of it works while a run holds the store.
2. Each figure for metrics is found out for itself: a lock that is refused takes the models' figures away and leaves the disk's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from reconciler.commands import fetch_record, load_lock, node_trust, serve, summary
from reconciler.commands.context import NodeContext, existing_folder, measure_node
from reconciler.commands.fetch_record import FetchStatus
from reconciler.core import plan as plans
from reconciler.core.errors import (
    BlobDamaged,
    DiskFull,
    FetchError,
    HashMismatch,
    InternalError,
    ReconcileError,
    SandboxUnavailable,
    ServeFailed,
    SizeMismatch,
    SmokeFailed,
    StoreError,
    TrustError,
    UnpackRefused,
    UsageError,
)
from reconciler.core.lock import LockedModel
from reconciler.core.node import NodeFacts
from reconciler.core.plan import ModelChange
from reconciler.core.state import ModelState, NodeState, ServerState
from reconciler.hooks import TOLD, Told
from reconciler.ports import TestReport
from reconciler.report.metrics import ModelMetrics, NetworkMetrics, NodeMetrics, StoreMetrics
from reconciler.store import observe, test_facts
from reconciler.store.generations import path_of
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger, LoggedIncident


class SnapshotStatus(Struct, frozen=True, kw_only=True):
    """Which snapshot a status speaks of."""

    version: int  #: Its version.
    digest: str  #: SHA-256 of its payload.
    expires_at: datetime  #: Until when it may be acted on.


class ModelStatus(Struct, frozen=True, kw_only=True):
    """One model: its state and why."""

    id: str  #: Model id.
    state: ModelState  #: Its state.
    reason: str  #: Why; begins with a word of a closed list.
    tasks: tuple[str, ...] = ()  #: What it is for.
    tree: str | None = None  #: Digest of its tree.
    #: Relative to the store's ``active``; null where it is not active.
    path: str | None = None
    bytes: int = 0  #: Size of its files.
    total_bytes: int = 0  #: Size of what it is downloaded as; 0 where it is not listed.
    here_bytes: int = 0  #: How much of that is on this node, with what is only partly downloaded.
    attempts: int = 0  #: Failures since it last passed.
    last_error: str | None = None  #: The last failure.
    since: datetime | None = None  #: When it came into this state.
    #: Files that the last test job that passed loaded, and those that it could not; both empty where none has passed or none said.
    exercised: tuple[str, ...] = ()
    not_exercised: tuple[str, ...] = ()
    #: The folder of the last record of its failure, relative to the store; null where none is kept.
    quarantine: str | None = None
    #: Its last test job, of a model that was asked for by name; null where none ever ran.
    test: TestReport | UnsetType | None = UNSET
    tested_at: datetime | UnsetType | None = UNSET  #: When that was.


class Status(Struct, frozen=True, kw_only=True):
    """A node's status, as the router and a fleet's controller read it."""

    schema: int = 1  #: Version of this form.
    network: str  #: The network's name.
    snapshot: SnapshotStatus  #: The snapshot that the lock was compiled from.
    lock: str  #: Digest of the lock.
    generation: int  #: Number of the active generation.
    active_digest: str  #: Digest of the active set: the same on two nodes that serve the same bytes.
    node: NodeFacts  #: What this machine has.
    models: tuple[ModelStatus, ...]  #: Every model, sorted by model id.
    #: Why nothing new is installed now, as an error's name and message: of the lock, else of the snapshot; null where all is well.
    refused: str | None = None
    heard: FetchStatus = FetchStatus()  #: What the attempts to fetch the snapshot met.
    summary: str = ""  #: How the node is, in one sentence, and what to do where something is wrong.
    drift: tuple[str, ...] = ()  #: What differs from what the last run left.
    #: Whether a rollback holds models back until `reconcile resume`.
    held: bool = False
    #: How the activated hook failed last; it is run again in each run. Null where it did not fail, or there is none.
    hook_error: str | None = None
    #: What each configured server has, in the order of the settings.
    serve: tuple[ServerState, ...] = ()
    #: When an agent that waits begins its next cycle, which tries again what is failed or pending; null without one.
    next_sync_at: datetime | None = None


def status(context: NodeContext, model: str = "") -> Status:
    """
    Return the states of all models, or of *model* alone, with the report of its last test; a name without a version is all of its versions.

    Raises:
        TrustError: the lock is not one that the network signed; an expired one is shown, with why it is refused.
        UsageError: there is no such model.
    """
    now, layout = context.clock(), context.layout
    found = load_lock.load_verified_lock(context)
    node = measure_node(context)
    with Ledger.reading(layout.ledger) as ledger:
        state, fetches = observe.node_state(layout, ledger), fetch_record.read(context, ledger)
        made = plans.diff(found.lock, found.lock_digest, state, node, context.policy, now=now)
        shown = [change for change in made.models if not model or change.id == model]
        shown = shown or [change for change in made.models if change.id.partition(":")[0] == model]
        if model and not shown:
            raise UsageError(f"there is no model {model!r}", hint=_known_models(made, model))
        partly = observe.partial_bytes(layout, {name: blob.size for name, blob in found.lock.blob.items()})
        listed = {model.id: model for model in found.lock.model}
        models = tuple(_model(change, listed.get(change.id), found, state, partly) for change in shown)
        models = tuple(_with_details(one, layout, ledger, named=bool(model)) for one in models)
    told = hook_told(context)
    refusal = _refusal(context, found, now)
    refused = refusal or fetches.refused
    return Status(
        network=found.lock.network,
        snapshot=SnapshotStatus(
            version=found.lock.snapshot.version, digest=found.lock.snapshot.digest, expires_at=found.lock.snapshot.expires_at
        ),
        lock=found.lock_digest,
        generation=state.active.number,
        active_digest=state.active.digest,
        node=node,
        models=models,
        refused=f"{refused.name}: {refused.message}" if refused else None,
        heard=fetches,
        summary=summary.sentence(made, found, refusal, fetches, now, hook_error=told.error if told else ""),
        drift=made.drift,
        held=any(change.reason.startswith("held:") for change in made.models),
        hook_error=told.error or None if told else None,
        serve=serve.states(context),
        next_sync_at=_next_sync(layout, now),
    )


def _known_models(made: plans.Plan, model: str) -> str:
    import difflib

    known = [change.id for change in made.models]
    near = difflib.get_close_matches(model, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known[:20]) or 'none'}{', …' if len(known) > 20 else ''}"


def _refusal(context: NodeContext, found: load_lock.VerifiedLock, now: datetime) -> ReconcileError | None:
    try:
        return found.refusal(node_trust.read_trust_state(context), now=now, limits=context.limits)
    except ReconcileError as error:
        return error


def _next_sync(layout: Layout, now: datetime) -> datetime | None:
    health = read_health(layout)
    if health is None or health.phase != "waiting" or health.next_at is None or health.next_at < now:
        return None
    return health.next_at


def _with_details(one: ModelStatus, layout: Layout, ledger: Ledger, *, named: bool) -> ModelStatus:
    """Return *one* with where its failure was recorded, and, if it was asked for by name, with its last test job."""
    if one.state == "failed":
        from reconciler.store import quarantine  # it imports all that deletes and makes trees

        folder = quarantine.newest(layout, one.id)
        one = structs.replace(one, quarantine=str(folder.relative_to(layout.root))) if folder else one
    if not named:
        return one
    made, tried = ledger.report(one.id), test_facts.untested(ledger, one.id)
    report, at = tried if tried and (made is None or tried[1] >= made[1]) else made or (None, None)
    return structs.replace(one, test=report, tested_at=at)


def _model(
    change: ModelChange, listed: LockedModel | None, found: load_lock.VerifiedLock, state: NodeState, partly: dict[str, int]
) -> ModelStatus:
    record = state.records.get(change.id)
    entry = state.active.entries.get(change.id)
    tree = state.trees.get(listed.recipe if listed else record.recipe if record else "")
    passed = state.passed.get(change.id)
    sizes = {name: found.lock.blob[name].size for name in listed.blobs} if listed else {}
    return ModelStatus(
        id=change.id,
        state=change.from_,
        reason=_reason(change, record.reason if record else ""),
        tasks=entry.tasks if entry else listed.tasks if listed else (),
        tree=entry.tree if entry else tree.digest if tree else None,
        path=path_of(change.id) if entry else None,
        bytes=entry.bytes if entry else tree.bytes if tree else 0,
        total_bytes=sum(sizes.values()),
        here_bytes=observe.bytes_here(state, sizes, partly) if listed else 0,
        attempts=record.attempts if record else 0,
        last_error=record.last_error or None if record else None,
        since=record.since if record else None,
        exercised=passed.exercised if passed else (),
        not_exercised=passed.not_exercised if passed else (),
    )


def _reason(change: ModelChange, remembered: str) -> str:
    """Return why a model is in its state: the last run's reason, unless the plan changes something about it now."""
    if change.op == "keep" and change.reason.startswith(("failed-before", "held")):
        return change.reason  # it says when the next try is, or that none is; the last error has what went wrong
    settled = change.op == "keep" and not change.reason.startswith("not-listed")
    known = remembered and not (change.changes and remembered.startswith("up-to-date"))
    unfetched = remembered.startswith("source-failed") and change.reason.startswith("source-failed")
    return remembered if known and (settled or unfetched or change.from_ in {"failed", "pending"}) else change.reason


def hook_told(context: NodeContext) -> Told | None:
    """Return what the activated hook was told of last; None where there is no hook, or it never ran."""
    with Ledger.reading(context.layout.ledger) as ledger:
        return ledger.fact(TOLD, Told) if context.activated_hook else None


def incidents(context: NodeContext, limit: int = 100) -> tuple[LoggedIncident, ...]:
    """
    Return the newest incidents, the oldest of them first.

    Raises:
        StoreError: the ledger is damaged.
    """
    with _readable_ledger(context.layout.ledger) as ledger:
        return ledger.incidents(limit)


def history(context: NodeContext, limit: int = 100) -> tuple[Change, ...]:
    """
    Return the newest sets that runs ended with, the oldest of them first.

    Raises:
        StoreError: the ledger is damaged.
    """
    with _readable_ledger(context.layout.ledger) as ledger:
        return ledger.history(limit)


@contextlib.contextmanager
def _readable_ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.reading(path) as ledger:
        if ledger.damaged:
            raise StoreError(
                f"{path} cannot be read: what happened is not known", hint=f"the next `reconcile apply` keeps it as {path.name}.damaged"
            )
        yield ledger


# -- the agent's health ----------------------------------------------------------------------------

CycleOutcome = Literal["done", "models-failed", "busy", "refused", "silent", "error"]
Phase = Literal["working", "waiting", "stopped"]


class Health(Struct, frozen=True, kw_only=True):
    """``<store>/health.json``: the agent's state, for programs that watch it. The agent writes it before and after each cycle."""

    schema: int = 1
    phase: Phase
    #: How the last cycle ended; null before the first one has.
    outcome: CycleOutcome | None = None
    message: str = ""
    started_at: datetime
    ended_at: datetime | None = None
    seconds: float = 0.0
    succeeded_at: datetime | None = None
    #: When the next cycle begins; null while one goes on, and once the agent stopped.
    next_at: datetime | None = None
    #: Cycles in a row that failed.
    failures: int = 0
    #: How many cycles ended how, over restarts.
    totals: dict[str, int] = {}


def health_path(layout: Layout) -> Path:
    """Return the path of ``health.json``."""
    return layout.root / "health.json"


def read_health(layout: Layout) -> Health | None:
    """Return what the last agent wrote, or None where nothing is there or it cannot be read."""
    try:
        return msgspec.json.decode(health_path(layout).read_bytes(), type=Health)
    except (OSError, msgspec.DecodeError):
        return None


# -- metrics ---------------------------------------------------------------------------------------

#: Every kind of incident, so that each has its series before its first one: Prometheus sees no increase in a series that begins at 1.
INCIDENT_KINDS = (
    *(error.name for error in TrustError.__subclasses__()),
    *(error.name for error in (FetchError, HashMismatch, SizeMismatch, UnpackRefused)),
    *(error.name for error in (SmokeFailed, SandboxUnavailable, BlobDamaged, DiskFull, InternalError, ServeFailed)),
    "incompatible", "removed-unlisted", "crash-recovered", "hook-failed",
)  # fmt: skip

_T = TypeVar("_T")
_NEVER = datetime.fromtimestamp(0, UTC)


def node_metrics(context: NodeContext) -> NodeMetrics:
    """Return all figures but the agent's own; what cannot be found out is left out."""
    found = _known(lambda: status(context))
    with Ledger.reading(context.layout.ledger) as ledger:
        return NodeMetrics(
            models=tuple(_model_metrics(model, ledger.report(model.id)) for model in found.models) if found else None,
            network=_known(lambda: _network_metrics(context, found)) if found else None,
            store=_known(lambda: _store_metrics(context, ledger)),
            heard_at=_known(lambda: fetch_record.read(context, ledger).last),
            servers={state.name: state.generation for state in serve.states(context)},
            incidents=dict.fromkeys(INCIDENT_KINDS, 0) | (_known(ledger.incident_totals) or {}),
        )


def _known(find: Callable[[], _T]) -> _T | None:
    try:
        return find()
    except (ReconcileError, OSError):
        return None


def _model_metrics(model: ModelStatus, tested: tuple[TestReport, datetime] | None) -> ModelMetrics:
    report, at = tested or (None, None)
    ran = report is not None and report.verdict == "passed"
    return ModelMetrics(
        id=model.id,
        state=model.state,
        bytes=model.bytes,
        attempts=model.attempts,
        unfetched=model.reason.startswith("source-failed"),
        held=model.reason.startswith("held"),
        since=model.since,
        tested_at=at,
        load_seconds=report.load_seconds if report and ran else None,
        run_seconds=report.run_seconds if report and ran else None,
        tokens_per_second=report.tokens_per_second if report and ran and report.tokens else None,
    )


def _network_metrics(context: NodeContext, found: Status) -> NetworkMetrics:
    root, trust_state = node_trust.trusted_root(context), _known(lambda: node_trust.read_trust_state(context))
    return NetworkMetrics(
        network=found.network,
        lock=found.lock,
        snapshot_version=found.snapshot.version,
        snapshot_expires_at=found.snapshot.expires_at,
        root_version=root.version,
        root_expires_at=root.expires_at,
        floor_version=trust_state.version if trust_state else None,
        refused=(found.refused or "").partition(":")[0],
    )


def _store_metrics(context: NodeContext, ledger: Ledger) -> StoreMetrics:
    state = observe.node_state(context.layout, ledger)
    blobs = state.blobs.values()
    told = hook_told(context)
    system = os.statvfs(existing_folder(context.layout.root))
    return StoreMetrics(
        generation=state.active.number,
        activated_generation=told.succeeded if told else None,
        blobs=len(state.blobs),
        blob_bytes=sum(blob.size for blob in blobs),
        archived_bytes=sum(blob.size for blob in state.archived.values()),
        damaged_blobs=sum(blob.damaged for blob in blobs),
        drift=len(state.drift),
        disk_free_bytes=system.f_bavail * system.f_frsize,
        disk_free_inodes=system.f_favail if system.f_files else None,
        disk_reserve_bytes=context.policy.reserve_bytes,
        oldest_verified_at=min((blob.verified_at or _NEVER for blob in blobs), default=None),
    )
