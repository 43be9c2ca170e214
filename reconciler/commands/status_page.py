"""
``status --page`` and ``[agent] page``: the status page, gathered from the same values as ``status``, ``incidents`` and ``history``.

Rules that hold here:

1. A page is made also where the lock is refused or missing: it says so, and shows what is known without it.
2. It is written as a whole and replaced by one rename, so that a browser never reads half of it.
"""

from __future__ import annotations

from pathlib import Path

from reconciler import files
from reconciler.commands import documents, fetch_record, status
from reconciler.commands.context import NodeContext, measure_node
from reconciler.commands.status import ModelStatus, Status
from reconciler.core.errors import ReconcileError
from reconciler.report import page
from reconciler.report.page import ChartPoint, Page, PageEvent, PageModel
from reconciler.store import atomic
from reconciler.store.ledger import Change, Ledger, LoggedIncident

_INCIDENTS = 20
_HISTORY = 20
_POINTS = 200


def write(context: NodeContext, path: Path) -> None:
    """Write the page to *path*; raises StoreError."""
    with files.translate_errors(f"write the page {path}"):
        atomic.write(atomic.target_of(path), render(context))


def render(context: NodeContext) -> bytes:
    """Return the page as it is now."""
    return page.render(gather(context))


def gather(context: NodeContext) -> Page:
    """Return what the page shows."""
    now = context.clock()
    with Ledger.reading(context.layout.ledger) as ledger:
        changes, incidents = ledger.history(_POINTS), ledger.incidents(_INCIDENTS)
    history = tuple(_change(one) for one in reversed(changes[-_HISTORY:]))
    logged = tuple(_incident(one) for one in reversed(incidents))
    try:
        found = status.status(context)
    except ReconcileError as error:
        summary = f"{error.name}: {error.message}. {error.hint}"
        node = measure_node(context)
        return Page(
            made_at=now, summary=summary, level="error", node=node, incidents=logged, history=history, points=_points(changes, None)
        )
    return Page(
        made_at=now,
        summary=found.summary,
        level=_level(found, is_late=fetch_record.is_late(found.heard, context.quiet_seconds, now)),
        network=found.network,
        snapshot_version=found.snapshot.version,
        expires_at=found.snapshot.expires_at,
        heard_at=found.heard.last,
        generation=found.generation,
        lock=found.lock,
        active_digest=found.active_digest,
        node=found.node,
        reserve_bytes=context.policy.reserve_bytes,
        next_at=found.next_sync_at,
        models=tuple(map(_model, found.models)),
        incidents=logged,
        history=history,
        points=_points(changes, sum(one.state == "active" for one in found.models)),
    )


def _level(found: Status, *, is_late: bool) -> str:
    if found.refused or is_late:
        return "error"
    troubled = any(one.state in {"failed", "pending"} or one.reason.startswith("source-failed") for one in found.models)
    return "warning" if found.heard.unreachable or found.drift or troubled or found.held else "ok"


def _model(found: ModelStatus) -> PageModel:
    return PageModel(
        id=found.id,
        state=found.state,
        reason=found.reason,
        tasks=found.tasks,
        here_bytes=found.here_bytes,
        total_bytes=found.total_bytes or found.bytes,
        attempts=found.attempts,
        last_error=found.last_error or "",
        since=found.since,
    )


def _incident(one: LoggedIncident) -> PageEvent:
    about = " ".join(part for part in (one.model, one.blob[:19], documents.redacted(one.source)) if part)
    text = f"{about}: {one.detail}" if about else one.detail
    return PageEvent(at=one.at, kind=one.kind, text=text, times=one.times, last_at=one.last_at)


def _change(one: Change) -> PageEvent:
    signed = " ".join([*(f"+{model}" for model in one.added), *(f"-{model}" for model in one.removed)])
    return PageEvent(at=one.at, kind=f"generation {one.generation}", text=f"{one.actor}: {one.what} {signed}")


def _points(changes: tuple[Change, ...], active: int | None) -> tuple[ChartPoint, ...]:
    """Return how many models were active after each of *changes*, the oldest first; *active* is how many are now, if that is known."""
    counts, count = [], sum(len(one.added) - len(one.removed) for one in changes) if active is None else active
    for one in reversed(changes):
        counts.append(ChartPoint(at=one.at, active=max(count, 0)))
        count -= len(one.added) - len(one.removed)
    return tuple(reversed(counts))
