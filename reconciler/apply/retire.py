"""What leaves the node: archived models go to cold storage once their successors serve, unlisted ones when their grace period is over."""

from __future__ import annotations

from collections.abc import Collection

from reconciler.apply import activate, records
from reconciler.apply.run_state import RunState
from reconciler.core import lifecycle, units
from reconciler.core.errors import BlobDamaged, DiskFull, StoreError
from reconciler.core.events import Incident, ModelPhase, Notice
from reconciler.core.lock import LockedModel
from reconciler.core.plan import ModelChange
from reconciler.ports import Ports


def replaced_by(run: RunState, added: Collection[str]) -> list[str]:
    """Return the retired and archived models that *added* replace: they leave in the same swap."""
    names = {model.partition(":")[0] for model in added}
    by_name = [change.id for change in run.planned("archive") if change.id.partition(":")[0] in names]
    return [*by_name, *(model for model in run.serving if run.replacements.get(model, frozenset()) & set(added) and not _stays(run, model))]


def record_replaced(run: RunState, ports: Ports, models: Collection[str]) -> RunState:
    """Record since when retired *models* are replaced: their bytes stay for the grace period."""
    for model in models:
        if run.models[model].state == "retired":
            stay = f"its bytes stay for {units.human_time(run.policy.grace_seconds)}"
            run = records.unlist(run.with_fate(model, "replaced"), ports, model, lifecycle.reason("replaced", stay))
    return run


def _stays(run: RunState, model: str) -> bool:
    listed = run.models.get(model)
    return listed is None or listed.state not in {"retired", "archived"}


def stop_archived(run: RunState, ports: Ports) -> RunState:
    """Take the archived models out of service, each once no listed version of it is still to come."""
    coming = [one for one in run.lock.model if one.state == "enabled" and one.id not in run.serving]
    awaited = {one.name for one in coming if run.changes[one.id].op != "reject"}
    gone = [change.id for change in run.planned("archive") if change.id in run.serving and change.id.partition(":")[0] not in awaited]
    return activate.swap(run, ports, {}, gone, "archived by the snapshot")


def archive(run: RunState, ports: Ports) -> RunState:
    """Move the archived models that do not serve to cold storage; while a server lags, they stay, since it may still read from them."""
    if run.is_lagging:
        return run
    leaving = [change for change in run.planned("archive") if change.id not in run.serving]
    needed = lifecycle.blobs_still_needed(run.lock, run.trees, run.serving) if leaving else set[str]()
    for change in leaving:
        run = _archive(run, ports, run.models[change.id], change, needed)
    return run


def remove(run: RunState, ports: Ports) -> RunState:
    """Forget the models whose grace period is over; garbage collection frees what nothing else needs."""
    leaving = {change.id: change.reason for change in run.planned("remove")}
    for model in run.ended("replaced"):
        leaving[model] = lifecycle.reason("replaced")
    for model, reason in leaving.items():
        record = run.records.get(model)
        since = record.unlisted_since if record else None
        over = since is None or units.age_seconds(since, ports.now()) >= run.policy.grace_seconds
        if over or (model in run.models and not reason.startswith("replaced")):
            ports.report(ModelPhase(model=model, phase="removing"))
            run = records.forget(run, ports, model, reason)
    return run


def _archive(run: RunState, ports: Ports, model: LockedModel, change: ModelChange, needed: Collection[str]) -> RunState:
    """Move the blobs of *model* to cold storage, but those that are *needed* elsewhere, and record how that ended."""
    ports.report(ModelPhase(model=model.id, phase="archiving"))
    try:
        for name in model.blobs:
            if name not in needed and name in run.observed.blobs:
                _archive_blob(ports, name)
    except BlobDamaged as error:
        ports.report(Incident(kind="blob-damaged", model=model.id, detail=error.message))
        return records.fail(run.with_fate(model.id, "failed"), ports, model.id, error)
    except StoreError as error:  # cold storage is full or away: the model stays where it is until the next run
        kind = Incident(kind="disk-full", model=model.id, detail=error.message) if isinstance(error, DiskFull) else None
        ports.report(kind or Notice(level="warning", text=f"{model.id} is not archived yet: {error.message}"))
        return run.with_fate(model.id, "refused")
    tree = run.observed.trees.get(model.recipe)
    if tree is not None and all(tree.digest != entry.tree for entry in run.serving.values()):
        ports.trees.remove(tree.digest)
    return records.settle(run, ports, model.id, "archived", change.reason)


def _archive_blob(ports: Ports, name: str) -> None:
    try:
        ports.blobs.archive(name)
    except BlobDamaged:
        ports.blobs.discard(name)  # nothing else needs it, and nobody may find it later and believe it
        raise
