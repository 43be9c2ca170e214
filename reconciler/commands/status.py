"""What reads: status, incidents, history. Nothing here changes anything, and all of it works while a run holds the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime

from msgspec import UNSET, Struct, UnsetType, structs

from reconciler.commands import health_file, load_lock, node_facts
from reconciler.commands import lock as lock_command
from reconciler.commands.options import Clock, wall_clock
from reconciler.core import plan as plans
from reconciler.core.errors import ReconcileError, StoreError, UsageError
from reconciler.core.node import NodeFacts
from reconciler.core.plan import ModelChange
from reconciler.core.state import ModelState, NodeState
from reconciler.ports import TestReport
from reconciler.settings import Settings
from reconciler.store import housekeeping, observe
from reconciler.store.generations import path_of
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger, LoggedIncident


class SnapshotStatus(Struct, frozen=True, kw_only=True):
    """Which snapshot a status speaks of."""

    version: int
    digest: str
    expires_at: datetime


class ModelStatus(Struct, frozen=True, kw_only=True):
    """One model: its state and why."""

    id: str
    state: ModelState
    reason: str
    tasks: tuple[str, ...] = ()
    tree: str | None = None
    #: Relative to the store's ``active``; null where it is not active.
    path: str | None = None
    bytes: int = 0
    attempts: int = 0
    last_error: str | None = None
    since: datetime | None = None
    #: The folder of the last record of its failure, relative to the store; null where none is kept.
    quarantine: str | None = None
    #: Its last test job, of a model that was asked for by name; null where none ever ran.
    test: TestReport | UnsetType | None = UNSET
    tested_at: datetime | UnsetType | None = UNSET


class Status(Struct, frozen=True, kw_only=True):
    """A node's status, as the router and a fleet's controller read it."""

    schema: int = 1
    network: str
    snapshot: SnapshotStatus
    lock: str
    generation: int
    active_digest: str
    node: NodeFacts
    models: tuple[ModelStatus, ...]
    #: Why nothing new is installed now, as an error's name and message; null where all is well.
    refused: str | None = None
    drift: tuple[str, ...] = ()
    #: When an agent that waits begins its next cycle, which tries again what is failed or pending; null without one.
    next_sync_at: datetime | None = None


def status(settings: Settings, model: str = "", *, clock: Clock = wall_clock) -> Status:
    """
    Return the states of all models, or of *model* alone, with the report of its last test.

    Raises:
        TrustError: the lock is not the network's word; a lock that has merely expired is shown, and said to be.
        UsageError: there is no such model.
    """
    now, layout = clock(), load_lock.store_layout(settings)
    found = load_lock.load_verified_lock(settings)
    node = node_facts.measure_node(settings)
    with Ledger.reading(layout.ledger) as ledger:
        state = observe.node_state(layout, ledger)
        made = plans.diff(found.lock, found.lock_digest, state, node, settings.policy, now=now)
        shown = [change for change in made.models if not model or change.id == model]
        if model and not shown:
            raise UsageError(f"there is no model {model!r}", hint=f"there are: {', '.join(c.id for c in made.models) or 'none'}")
        models = tuple(_model(change, found, state) for change in shown)
        models = tuple(_explained(one, layout, ledger, named=bool(model)) for one in models)
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
        refused=_refused(settings, found, now),
        drift=made.drift,
        next_sync_at=_next_sync(settings, now),
    )


def _refused(settings: Settings, found: load_lock.VerifiedLock, now: datetime) -> str | None:
    try:
        refusal = found.refusal(lock_command.read_trust_state(settings), now)
    except ReconcileError as error:
        refusal = error
    return f"{refusal.name}: {refusal.message}" if refusal else None


def _next_sync(settings: Settings, now: datetime) -> datetime | None:
    said = health_file.read(settings)
    waits = said is not None and said.phase == "waiting" and said.next_at is not None and said.next_at >= now
    return said.next_at if said and waits else None


def _explained(one: ModelStatus, layout: Layout, ledger: Ledger, *, named: bool) -> ModelStatus:
    """Return *one* with where its failure was recorded, and, if it was asked for by name, with its last test job."""
    if one.state == "failed" and (folder := housekeeping.quarantined(layout, one.id)):
        one = structs.replace(one, quarantine=str(folder.relative_to(layout.root)))
    if not named:
        return one
    report, at = ledger.report(one.id) or (None, None)
    return structs.replace(one, test=report, tested_at=at)


def _model(change: ModelChange, found: load_lock.VerifiedLock, state: NodeState) -> ModelStatus:
    record = state.records.get(change.id)
    entry = state.active.entries.get(change.id)
    listed = next((model for model in found.lock.model if model.id == change.id), None)
    tree = state.trees.get(listed.recipe if listed else record.recipe if record else "")
    return ModelStatus(
        id=change.id,
        state=change.from_,
        reason=_reason(change, record.reason if record else ""),
        tasks=entry.tasks if entry else listed.tasks if listed else (),
        tree=entry.tree if entry else tree.digest if tree else None,
        path=path_of(change.id) if entry else None,
        bytes=entry.bytes if entry else tree.bytes if tree else 0,
        attempts=record.attempts if record else 0,
        last_error=record.last_error or None if record else None,
        since=record.since if record else None,
    )


def _reason(change: ModelChange, remembered: str) -> str:
    """Return why a model is as it is: what the last run said of it, unless something has to be done about it now."""
    settled = change.op == "keep" and not change.reason.startswith("not-listed")
    told = remembered and not (change.changes and remembered.startswith("up-to-date"))
    return remembered if told and (settled or change.from_ in {"failed", "pending"}) else change.reason


def incidents(settings: Settings, limit: int = 100) -> tuple[LoggedIncident, ...]:
    """
    Return the newest incidents, the oldest of them first.

    Raises:
        StoreError: the ledger is damaged, and nobody knows.
    """
    with _remembering(settings) as ledger:
        return ledger.incidents(limit)


def history(settings: Settings, limit: int = 100) -> tuple[Change, ...]:
    """
    Return the newest swaps, the oldest of them first.

    Raises:
        StoreError: the ledger is damaged, and nobody knows.
    """
    with _remembering(settings) as ledger:
        return ledger.history(limit)


@contextlib.contextmanager
def _remembering(settings: Settings) -> Iterator[Ledger]:
    path = load_lock.store_layout(settings).ledger
    with Ledger.reading(path) as ledger:
        if ledger.damaged:
            raise StoreError(
                f"{path} cannot be read: what happened is not known", hint=f"the next `reconcile apply` keeps it as {path.name}.damaged"
            )
        yield ledger
