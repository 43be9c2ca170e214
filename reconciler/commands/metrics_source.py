"""
The figures that metrics tell, gathered from the status, the ledger and the store.

Each part is found out for itself: a lock that cannot be confirmed takes the models' figures away and leaves the disk's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from reconciler.commands import load_lock
from reconciler.commands import lock as lock_command
from reconciler.commands import status as status_command
from reconciler.commands.options import Clock, wall_clock
from reconciler.commands.status import ModelStatus, Status
from reconciler.core.errors import (
    BlobDamaged,
    DiskFull,
    FetchError,
    HashMismatch,
    InternalError,
    ReconcileError,
    SandboxUnavailable,
    SizeMismatch,
    SmokeFailed,
    TrustError,
    UnpackRefused,
)
from reconciler.ports import TestReport
from reconciler.report.metrics import Figures, ModelFigures, NetworkFigures, StoreFigures
from reconciler.settings import Settings
from reconciler.store import observe
from reconciler.store.ledger import Ledger

#: Every kind of incident, so that each has its series before its first one: what grows from nothing is no growth to Prometheus.
KINDS = (
    *(error.name for error in TrustError.__subclasses__()),
    *(error.name for error in (FetchError, HashMismatch, SizeMismatch, UnpackRefused)),
    *(error.name for error in (SmokeFailed, SandboxUnavailable, BlobDamaged, DiskFull, InternalError)),
    "incompatible", "removed-unlisted", "crash-recovered",
)  # fmt: skip

_T = TypeVar("_T")
_NEVER = datetime.fromtimestamp(0, UTC)


def collect(settings: Settings, *, clock: Clock = wall_clock) -> Figures:
    """Return all figures but the run's; what cannot be found out is left out."""
    status = _known(lambda: status_command.status(settings, clock=clock))
    with Ledger.reading(load_lock.store_layout(settings).ledger) as ledger:
        return Figures(
            models=tuple(_model(model, ledger.report(model.id)) for model in status.models) if status else None,
            network=_known(lambda: _network(settings, status)) if status else None,
            store=_known(lambda: _store(settings, ledger)),
            incidents=dict.fromkeys(KINDS, 0) | (_known(ledger.incident_totals) or {}),
        )


def _known(find: Callable[[], _T]) -> _T | None:
    try:
        return find()
    except (ReconcileError, OSError):
        return None


def _model(status: ModelStatus, tested: tuple[TestReport, datetime] | None) -> ModelFigures:
    report, at = tested or (None, None)
    ran = report is not None and report.verdict == "passed"
    return ModelFigures(
        id=status.id,
        state=status.state,
        bytes=status.bytes,
        attempts=status.attempts,
        since=status.since,
        tested_at=at,
        load_seconds=report.load_seconds if report and ran else None,
        run_seconds=report.run_seconds if report and ran else None,
        tokens_per_second=report.tokens_per_second if report and ran and report.tokens else None,
    )


def _network(settings: Settings, status: Status) -> NetworkFigures:
    root, trust_state = load_lock.trusted_root(settings), _known(lambda: lock_command.read_trust_state(settings))
    return NetworkFigures(
        network=status.network,
        lock=status.lock,
        snapshot_version=status.snapshot.version,
        snapshot_expires_at=status.snapshot.expires_at,
        root_version=root.version,
        root_expires_at=root.expires_at,
        floor_version=trust_state.version if trust_state else None,
        refused=(status.refused or "").partition(":")[0],
    )


def _store(settings: Settings, ledger: Ledger) -> StoreFigures:
    state = observe.node_state(load_lock.store_layout(settings), ledger)
    blobs = state.blobs.values()
    return StoreFigures(
        generation=state.active.number,
        blobs=len(state.blobs),
        blob_bytes=sum(blob.size for blob in blobs),
        archived_bytes=sum(blob.size for blob in state.archived.values()),
        damaged_blobs=sum(blob.damaged for blob in blobs),
        drift=len(state.drift),
        disk_free_bytes=shutil.disk_usage(existing(settings.store_path)).free,
        disk_reserve_bytes=settings.policy.reserve_bytes,
        oldest_verified_at=min((blob.verified_at or _NEVER for blob in blobs), default=None),
    )


def existing(path: Path) -> Path:
    """Return *path*, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.parent
    return path
