"""
From prepared models to models that serve: each batch is judged, recorded and activated by one swap.

Rules that hold here:

1. A failed model never takes another with it, and an older copy that is approved outlives a newer one that fails.
2. A copy serves on only while nothing bad is known of its own bytes and its own test (``_must_leave``).
"""

from __future__ import annotations

import contextlib
from datetime import datetime

from msgspec import structs

from reconciler.apply import activate, records, retire
from reconciler.apply.prepare import Batch, Preparation, Prepared
from reconciler.apply.run_state import RunState
from reconciler.core import lifecycle
from reconciler.core.errors import BlobDamaged, DiskFull, FetchError, HashMismatch, InternalError, SizeMismatch, SmokeFailed, StoreError
from reconciler.core.events import Incident, ModelDone, Notice
from reconciler.core.lock import LockedModel
from reconciler.core.plan import WORK
from reconciler.core.state import ActiveModel, ModelState, Passed, TreeSeen
from reconciler.ports import Ports, TestReport


def relink(run: RunState, ports: Ports) -> RunState:
    """Activate, in one swap, the models that need only their link again: they wait for no download and for no room."""
    work = [run.models[change.id] for change in run.planned("enable")]
    linked = Preparation(run, ports).linked(work)
    return _conclude(run, ports, Batch(prepared=linked)) if linked else run


def install(run: RunState, ports: Ports) -> RunState:
    """Prepare the models that need work, and activate each as soon as it is ready; hash the copies that serve on without any."""
    work = [run.models[change.id] for change in run.planned(*WORK) if change.id not in run.fates]
    if not work and not run.plan.blobs:
        return run
    with contextlib.closing(Preparation(run, ports).batches(work)) as batches:
        for batch in batches:
            run = _conclude(run, ports, batch)
    return _stop_damaged(run, ports)


def _conclude(run: RunState, ports: Ports, batch: Batch) -> RunState:
    ready = batch.prepared
    trees = {one.model.recipe: one.tree for one in ready if one.tree}
    made = run.made | {tree.digest for tree in trees.values()}
    run = structs.replace(run, trees=run.trees | trees, made=made, damaged=run.damaged | batch.damaged)
    passed = [one for one in ready if _record_test(run, ports, one)]
    for one in ready:
        run = run.with_fate(one.model.id, "passed") if one in passed else _give_up(run, ports, one)
    added = {one.model.id: _entry(ports, one.model, one.tree) for one in passed if one.model.serves and one.tree}
    gone = [one.model.id for one in ready if one.model.id in run.serving and _must_leave(run, one)]
    what = "installed or tested" if added else "failed its repair or its test"
    replaced = retire.replaced_by(run, added)
    run = activate.swap(run, ports, added, gone, what, replaced=replaced)
    run = retire.record_replaced(run, ports, replaced)
    for one in passed:
        state: ModelState = "active" if one.model.serves else "inactive"
        run = records.settle(run, ports, one.model.id, state, lifecycle.reason("up-to-date"))
    return run


def _record_test(run: RunState, ports: Ports, one: Prepared) -> bool:
    """Record a test's report; return whether the model may serve, or rest, now."""
    if one.error is not None or one.tree is None:
        return False
    if one.report is None:
        _copy_pass(run, ports, one.model, one.tree)
        return True
    at = ports.now()
    passed = _passed(run, one.model, one.tree, one.report, at) if one.report.verdict == "passed" else None
    ports.ledger.tested(one.model.id, one.report, passed, at)
    return passed is not None


def _copy_pass(run: RunState, ports: Ports, model: LockedModel, tree: TreeSeen) -> None:
    """Record for *model*, which runs no test, the pass of the same content and test job under another id."""
    passed = run.observed.newest_passes.get((tree.digest, lifecycle.smoke_digest(model)))
    own = run.observed.passed.get(model.id)
    if passed is None or (own is not None and (own.tree, own.smoke) == (passed.tree, passed.smoke)):
        return
    report = TestReport(
        verdict="passed",
        load_seconds=passed.load_seconds,
        tokens_per_second=passed.tokens_per_second,
        device=passed.ran_on,
        gpu_layers=passed.gpu_layers,
        compared=passed.compared,
        engine=passed.engine,
        engine_version=passed.engine_version,
        exercised=passed.exercised,
        not_exercised=passed.not_exercised,
    )
    ports.ledger.tested(model.id, report, passed, passed.at)


def _passed(run: RunState, model: LockedModel, tree: TreeSeen, report: TestReport, at: datetime) -> Passed:
    engine = model.runtime.engine
    return Passed(
        tree=tree.digest,
        smoke=lifecycle.smoke_digest(model),
        engine=engine,
        engine_version=run.node.engines.get(engine, report.engine_version),
        device=run.node.device,
        at=at,
        exercised=report.exercised,
        not_exercised=report.not_exercised,
        load_seconds=report.load_seconds,
        tokens_per_second=report.tokens_per_second,
        ran_on=report.device,
        gpu_layers=report.gpu_layers,
        compared=report.compared,
    )


def _entry(ports: Ports, model: LockedModel, tree: TreeSeen) -> ActiveModel:
    return ActiveModel(
        id=model.id,
        tasks=model.tasks,
        runtime=model.runtime,
        path=ports.active_path(model.id),
        entrypoint=model.entrypoint,
        bytes=tree.bytes,
        tree=tree.digest,
    )


# -- what did not pass -----------------------------------------------------------------------------


def _give_up(run: RunState, ports: Ports, one: Prepared) -> RunState:
    """Record why a model did not pass: this node could not test it, its disk or all its sources refused, or the model is at fault."""
    model = one.model
    if one.report is not None and one.report.verdict == "unable":
        return _leave_untested(run, ports, one, one.report.reason)
    if isinstance(one.error, InternalError):
        return _leave_as_it_was(run, ports, one.model, one.error)
    if isinstance(one.error, StoreError) and not isinstance(one.error, BlobDamaged):
        return _leave_refused(run, ports, one, one.error)
    if isinstance(one.error, FetchError) and not isinstance(one.error, HashMismatch | SizeMismatch):
        return _leave_unfetched(run, ports, one, one.error)
    run = run.with_fate(model.id, "failed")
    error = one.error or SmokeFailed(one.report.reason if one.report else "it has no tree")
    if not isinstance(error, FetchError):
        kind = error.name if error.name in {"smoke-failed", "unpack-refused", "disk-full", "blob-damaged"} else "smoke-failed"
        ports.report(Incident(kind=kind, model=model.id, detail=error.message))
    # Of wrong bytes only the record is kept.
    ports.housekeeping.quarantine(model.id, one.report, error.message, one.tree.digest if one.tree else "")
    return records.fail(run, ports, model.id, error)


def _leave_untested(run: RunState, ports: Ports, one: Prepared, why: str) -> RunState:
    if why.startswith("sandbox-unavailable"):
        ports.report(Incident(kind="sandbox-unavailable", model=one.model.id, detail=why))
    state: ModelState = "active" if run.serves_as_listed(one.model, one.tree) else "pending"
    return records.settle(run.with_fate(one.model.id, "untested"), ports, one.model.id, state, f"not-tested: {why}")


def _leave_refused(run: RunState, ports: Ports, one: Prepared, error: StoreError) -> RunState:
    """Blame no model for a disk that refuses: it stays as it was, and the next run tries again. One incident tells of all of them."""
    model, before = one.model.id, run.changes[one.model.id].from_
    if not run.ended("refused"):
        is_full = isinstance(error, DiskFull)
        ports.report(Incident(kind=error.name, detail=error.message) if is_full else Notice(level="warning", text=error.message))
    run = run.with_fate(model, "refused")
    why = f"{error.name}: {error.with_own_hint}"
    if before == "failed":  # the record of that failure stays
        ports.report(ModelDone(model=model, state=before, reason=lifecycle.reason("failed-before", why)))
        return run
    state = _state_without_work(run, one)
    return records.settle(run, ports, model, state, lifecycle.reason("not-installed" if state == "absent" else "not-tested", why))


def _leave_unfetched(run: RunState, ports: Ports, one: Prepared, error: FetchError) -> RunState:
    """Blame no model for sources that do not answer (SPEC 8): no attempt is counted, and the next run tries again."""
    model, before = one.model.id, run.changes[one.model.id].from_
    run = run.with_fate(model, "unfetched")
    if before == "failed":  # the record of that failure stays
        ports.report(ModelDone(model=model, state=before, reason=lifecycle.reason("failed-before", f"{error.name}: {error.with_own_hint}")))
        return run
    state: ModelState = "pending" if _state_without_work(run, one) in {"pending", "inactive"} else "absent"
    return records.settle(run, ports, model, state, lifecycle.reason("source-failed", error.with_own_hint))


def _state_without_work(run: RunState, one: Prepared) -> ModelState:
    """Return the state of a model's listed content, for which nothing could be done; an older copy that serves is not that content."""
    before = run.changes[one.model.id].from_
    if before != "active":
        return before
    return "pending" if _must_leave(run, one) else "active" if run.serves_as_listed(one.model, one.tree) else "absent"


def _leave_as_it_was(run: RunState, ports: Ports, model: LockedModel, error: InternalError) -> RunState:
    """Blame no model for a bug of this program: its record stays, and the next run plans for it what this one did."""
    ports.report(Incident(kind=error.name, model=model.id, detail=error.message))
    ports.report(ModelDone(model=model.id, state=run.changes[model.id].from_, reason=f"{error.name}: {error.message}"))
    return run.with_fate(model.id, "internal-error")


def _must_leave(run: RunState, one: Prepared) -> bool:
    """Return whether a model that did not pass stops serving: its own bytes are bad, or its own test failed."""
    model = one.model
    fate = run.fates.get(model.id)
    if fate not in {"failed", "refused", "unfetched"}:
        return False
    if run.changes[model.id].op == "repair":
        return True
    damaged = bool(run.damaged & set(model.blobs))
    if one.tree is None and model.recipe not in run.observed.trees:  # which content serves was forgotten with the ledger
        return damaged
    return run.serves_as_listed(model, one.tree) and (damaged or fate == "failed")


def stop_bad_copies(run: RunState, ports: Ports) -> RunState:
    """Take out of service what is damaged, and hash what is not believed; for a run that can install and repair nothing."""
    serving = {entry.tree for entry in run.serving.values()}
    named = {name for tree in run.trees.values() if tree.digest in serving for name in tree.blobs}
    bad = {change.digest for change in run.plan.blobs if change.op == "check" and change.digest in named and _is_bad(ports, change.digest)}
    run = _stop_damaged(structs.replace(run, damaged=run.damaged | bad), ports)
    gone = [change.id for change in run.planned("repair") if change.id in run.serving]
    return activate.swap(run, ports, {}, gone, "damaged")


def _is_bad(ports: Ports, name: str) -> bool:
    """Hash a blob; what the disk refuses to read is not known to be bad."""
    try:
        good = ports.blobs.check(name)
    except StoreError:
        return False
    if not good:
        ports.report(Incident(kind="blob-damaged", blob=name, detail="its bytes have changed"))
    return not good


def _stop_damaged(run: RunState, ports: Ports) -> RunState:
    """Take out of service the copies in which a check of this run found a damaged blob, and which it did not mend."""
    damaged = {tree.digest for tree in run.trees.values() if run.damaged & set(tree.blobs)} - run.made
    gone = [model for model, entry in run.serving.items() if entry.tree in damaged]
    for model in gone:
        ports.report(Incident(kind="blob-damaged", model=model, detail="the copy that served is damaged and is not served any more"))
    return activate.swap(run, ports, {}, gone, "damaged")
