"""What leaves the node: archived models go to cold storage once their successors serve, unlisted ones when their grace period is over."""

from __future__ import annotations

from collections.abc import Collection

from reconciler.apply import activate, records
from reconciler.apply.run_state import RunState
from reconciler.core import lifecycle, units
from reconciler.core.errors import BlobDamaged, DiskFull, StoreError
from reconciler.core.lock import LockedModel
from reconciler.core.plan import ModelChange
from reconciler.ports import Incident, ModelPhase, Notice, Ports


def replaced_by(run: RunState, added: Collection[str]) -> list[str]:
    """Return the archived versions whose successor is among *added*: they leave in the same swap."""
    names = {model.partition(":")[0] for model in added}
    return [change.id for change in run.planned("archive") if change.id.partition(":")[0] in names]


def archive(run: RunState, ports: Ports) -> RunState:
    """Move the archived models to cold storage, each once no listed version of it is still to come."""
    ready = [change for change in run.planned("archive") if not _is_awaited(run, change.id)]
    run, _ = activate.swap(run, ports, {}, [change.id for change in ready if change.id in run.serving], "archived by the snapshot")
    for change in ready:
        run = _archive(run, ports, run.models[change.id], change)
    return run


def remove(run: RunState, ports: Ports) -> RunState:
    """Forget the models whose grace period is over; garbage collection frees what nothing else needs."""
    for change in run.planned("remove"):
        record = run.records.get(change.id)
        since = record.unlisted_since if record else None
        over = since is None or units.age_seconds(since, ports.now()) >= run.policy.grace_seconds
        if change.id in run.models or over:
            ports.report(ModelPhase(model=change.id, phase="removing"))
            run = records.forget(run, ports, change.id, change.reason)
    return run


def _is_awaited(run: RunState, model: str) -> bool:
    """Return whether *model* still serves because a listed version that follows it is not active yet."""
    name = model.partition(":")[0]
    successors = [one.id for one in run.lock.model if one.name == name and one.id != model and one.state == "enabled"]
    coming = [one for one in successors if run.changes[one].op != "reject"]
    return model in run.serving and any(one not in run.serving for one in coming)


def _archive(run: RunState, ports: Ports, model: LockedModel, change: ModelChange) -> RunState:
    ports.report(ModelPhase(model=model.id, phase="archiving"))
    needed = lifecycle.blobs_still_needed(run.lock, run.trees, run.serving)
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
    if tree is not None and tree.digest not in {entry.tree for entry in run.serving.values()}:
        ports.trees.remove(tree.digest)
    return records.settle(run, ports, model.id, "archived", change.reason)


def _archive_blob(ports: Ports, name: str) -> None:
    try:
        ports.blobs.archive(name)
    except BlobDamaged:
        ports.blobs.discard(name)  # nothing else needs it, and nobody may find it later and believe it
        raise
