"""What is remembered of models: the state in which a run leaves each, and why. Only the thread that carries out the plan writes it."""

from __future__ import annotations

from datetime import datetime

from msgspec import structs

from reconciler.apply.run_state import RunState
from reconciler.core.errors import ReconcileError
from reconciler.core.events import Incident, ModelDone
from reconciler.core.state import ModelState, Record
from reconciler.ports import Ports


def settle(
    run: RunState,
    ports: Ports,
    model: str,
    state: ModelState,
    reason: str,
    *,
    attempts: int = 0,
    last_error: str = "",
    unhealthy_at: datetime | None = None,
) -> RunState:
    """Record and report the *state* in which this run leaves *model*."""
    known, listed = run.records.get(model), run.models.get(model)
    same = known is not None and known.state == state
    record = Record(
        id=model,
        state=state,
        recipe=listed.recipe if listed else known.recipe if known else "",
        blobs=listed.blobs if listed else known.blobs if known else (),
        reason=reason,
        attempts=attempts,
        last_error=last_error,
        since=known.since if known and same else ports.now(),
        unhealthy_at=unhealthy_at,
    )
    run = run if record == known else _put(run, ports, record)
    ports.report(ModelDone(model=model, state=state, reason=reason))
    return run


def fail(run: RunState, ports: Ports, model: str, error: ReconcileError, *, unhealthy: bool = False) -> RunState:
    """Record and report that *model*, which is listed, failed, how often it has, and whether the node was *unhealthy* with it."""
    known = (run.observed.records if unhealthy else run.records).get(model)  # it passed its test in this run, which ends no count
    attempts = known.attempts + 1 if known and known.recipe == run.models[model].recipe else 1
    text = f"{error.name}: {error.message}"
    return settle(
        run,
        ports,
        model,
        "failed",
        f"failed-before: {text}",
        attempts=attempts,
        last_error=text,
        unhealthy_at=ports.now() if unhealthy else None,
    )


def reject(run: RunState, ports: Ports) -> RunState:
    """Record the models that this node cannot run; each is an incident once."""
    for change in run.planned("reject"):
        known = run.records.get(change.id)
        if known is None or known.reason != change.reason:
            ports.report(Incident(kind="incompatible", model=change.id, detail=change.reason.partition(": ")[2]))
        run = settle(run, ports, change.id, change.to, change.reason)
    return run


def unlist(run: RunState, ports: Ports, model: str, reason: str) -> RunState:
    """Record since when *model* is not listed, or is replaced; that a model is not listed any more is an incident once."""
    known = run.records.get(model)
    if known is not None and known.unlisted_since is not None:
        return run
    if model not in run.models:
        ports.report(Incident(kind="removed-unlisted", model=model, detail=reason))
    known = known or Record(id=model, state="inactive")
    run = _put(run, ports, structs.replace(known, state="inactive", reason=reason, unlisted_since=ports.now()))
    ports.report(ModelDone(model=model, state="inactive", reason=reason))
    return run


def forget(run: RunState, ports: Ports, model: str, reason: str) -> RunState:
    """Remember nothing of *model*."""
    ports.ledger.forget(model)
    ports.report(ModelDone(model=model, state="absent", reason=reason))
    return structs.replace(run, records={known: record for known, record in run.records.items() if known != model})


def correct(run: RunState, ports: Ports) -> RunState:
    """Make the records of models that need nothing agree with what was observed: a run may end between an effect and its record."""
    for change in run.planned("keep"):
        listed, known = run.models.get(change.id), run.records.get(change.id)
        if listed is None or known is None or change.id in run.fates or change.reason.startswith("excluded"):
            continue
        if known.state == "failed" and known.recipe == listed.recipe and change.from_ == "active" and not run.serves_as_listed(listed):
            continue  # what failed is the listed content, and what serves is an older one
        if known.state != change.from_ or (known.recipe != listed.recipe and change.from_ != "absent"):
            run = settle(run, ports, change.id, change.from_, change.reason)
    return run


def _put(run: RunState, ports: Ports, record: Record) -> RunState:
    ports.ledger.put(record)
    return structs.replace(run, records={**run.records, record.id: record})
