"""
The order of effects. It is the safety proof, so the code cites the steps by number:

1. Stop serving what may not be served: unlisted and disabled models leave the active set in one swap, before anything is fetched.
2. Refuse, before the first byte, what the disk has no room for.
3. Remember that a run began. Clear what a run that was cut short left behind.
4. Bring blobs: fetched, thawed or hashed again. Each gets its name only when its digest was checked.
5. As soon as all blobs of a model are there: make its tree, run its test job. Different models overlap.
6. Activate what passed, each time as a new generation by one swap; a failed model never takes another with it. Ask whether the node
   is healthy; if not, return to the generation before.
7. Retire what the network archived, once its successor serves. Only then forget and delete what nobody needs.
8. Remember that the run ended.

At every instant ``active`` leads to a complete generation of verified and tested models; whatever step is cut short, the next run's
plan differs by what is missing, and the same steps finish it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime

from msgspec import Struct

from reconciler.apply.activate import NOT_WHOLE, ActiveSet
from reconciler.apply.prepare import Preparation, Prepared
from reconciler.apply.records import Records
from reconciler.core import plan as plans
from reconciler.core import units
from reconciler.core.errors import BlobDamaged, DiskFull, FetchError, HashMismatch, SizeMismatch, SmokeFailed, StoreError
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import ModelChange, Plan
from reconciler.core.state import ActiveModel, NodeState, Passed, TreeSeen
from reconciler.ports import Incident, ModelPhase, Notice, Ports, RunEnded, RunStarted, TestReport


class Outcome(Struct, frozen=True, kw_only=True):
    """How a run ended."""

    lock: str
    generation: int
    active: tuple[str, ...]
    failed: tuple[str, ...]
    #: Models that could not be tested now.
    untested: tuple[str, ...]
    changed: bool


def execute(plan: Plan, lock: Lock, state: NodeState, node: NodeFacts, policy: Policy, ports: Ports) -> Outcome:
    """
    Carry out *plan*, which was made from the other arguments, and return how it ended.

    Raises:
        DiskFull: there is no room for what is planned; nothing was fetched.
        StoreError: the disk refused; the next run finishes what this one began.
    """
    return _Run(plan, lock, state, node, policy, ports).execute()


_WORK = {"install", "repair", "retest", "enable", "restore"}


class _Run:
    """One run's progress. Only the thread that called ``execute`` touches generations and records."""

    def __init__(self, plan: Plan, lock: Lock, state: NodeState, node: NodeFacts, policy: Policy, ports: Ports) -> None:
        self._plan = plan
        self._lock = lock
        self._state = state
        self._node = node
        self._policy = policy
        self._ports = ports
        self._models = {model.id: model for model in lock.model}
        self._changes = {change.id: change for change in plan.models}
        self._serving = ActiveSet(state.active, ports, broken=state.broken)
        self._records = Records(state.records, lock, ports)
        self._bringing = Preparation(plan, lock, state, policy, ports)
        #: Trees by recipe: those that were there, and those that this run made.
        self._trees = dict(state.trees)
        self._failed: set[str] = set()
        self._untested: set[str] = set()
        #: Trees that this run made or mended.
        self._mended: set[str] = set()
        self._began = ports.now()

    def execute(self) -> Outcome:
        ports, plan = self._ports, self._plan
        ports.report(
            RunStarted(lock=plan.lock, generation=plan.generation, models=len(plan.models), download_bytes=plan.summary["download_bytes"])
        )
        loud = plans.mass_removal_warning(plan.models, len(self._serving.entries))
        for warning in plan.warnings:
            ports.report(Incident(kind="removed-unlisted", detail=warning) if warning == loud else Notice(level="warning", text=warning))
        self._stop_serving()  # 1
        self._refuse_without_room()  # 2
        ports.ledger.set_running(running=True)  # 3
        if self._state.unfinished:
            ports.report(Incident(kind="crash-recovered", detail="the last run was cut short; this one finishes it"))
        ports.housekeeping.recover()
        self._catch_up()  # 6, for that run
        self._reject()
        self._install()  # 4, 5, 6
        self._serving.mend()
        self._retire()  # 7
        self._correct()
        ports.housekeeping.collect_garbage()
        ports.ledger.set_running(running=False)  # 8
        return self._outcome()

    def _outcome(self) -> Outcome:
        ports, plan = self._ports, self._plan
        generation = ports.generations.current()
        changed = any(change.changes for change in plan.models)
        seconds = (ports.now() - self._began).total_seconds()
        ports.report(
            RunEnded(
                lock=plan.lock,
                generation=generation.number,
                active=len(generation.entries),
                failed=len(self._failed),
                changed=changed,
                seconds=seconds,
            )
        )
        return Outcome(
            lock=plan.lock,
            generation=generation.number,
            active=tuple(generation.entries),
            failed=tuple(sorted(self._failed)),
            untested=tuple(sorted(self._untested)),
            changed=changed,
        )

    # -- 1: what may not serve ---------------------------------------------------------------------

    def _stop_serving(self) -> None:
        leaving = [change for change in self._plan.models if change.op in {"remove", "disable"} or self._deactivates(change)]
        spoiled = [model for model in self._serving.entries if self._is_spoiled(model)]
        ended = [change.id for change in leaving if change.id in self._serving.entries]
        what = "removed or disabled by the snapshot" if ended else "damaged" if spoiled else NOT_WHOLE
        # What only needs its link again comes back in one swap (4): a reader whose paths still work must not meet an empty set before.
        lost = self._state.broken and not any(change.op == "enable" for change in self._plan.models)
        self._serving.swap({}, [*ended, *spoiled], what, anew=lost or bool(self._state.misdirected))
        for change in leaving:
            if change.op == "disable":
                self._records.settle(change.id, "inactive", change.reason)
            elif change.op == "remove" and change.id not in self._models:
                self._mark_unlisted(change)

    def _deactivates(self, change: ModelChange) -> bool:
        """Say whether a listed model stops being active whatever else is done with it."""
        if change.op == "reject":
            return change.from_ == "active"
        return change.op in _WORK and self._models[change.id].state == "disabled"

    def _is_spoiled(self, model: str) -> bool:
        """
        Say whether an active copy cannot go on, and cannot be mended: what is mended is what the snapshot lists.

        It is an older content of its id, kept because the new one is not there yet, and damaged; or its link leads elsewhere.
        """
        entry, listed = self._serving.entries[model], self._models.get(model)
        own = self._state.trees.get(listed.recipe) if listed else None
        if own is not None and own.digest == entry.tree:
            return False
        if model in self._state.misdirected:
            return True
        seen = [tree for tree in self._state.trees.values() if tree.digest == entry.tree]
        blobs = [self._state.blobs.get(name) for tree in seen for name in tree.blobs]
        spoiled = self._changes[model].op == "install" and (
            any(tree.damaged for tree in seen) or any(blob is None or blob.damaged for blob in blobs)
        )
        if spoiled:
            self._ports.report(Incident(kind="blob-damaged", model=model, detail="its older copy is damaged and is not served any more"))
        return spoiled

    def _mark_unlisted(self, change: ModelChange) -> None:
        record = self._records.get(change.id)
        if record is None or record.unlisted_since is None:
            self._ports.report(Incident(kind="removed-unlisted", model=change.id, detail=change.reason))
            self._records.unlist(change.id, change.reason)

    # -- 2: room -----------------------------------------------------------------------------------

    def _refuse_without_room(self) -> None:
        if not self._plan.disk.short:
            return
        for change in self._plan.models:  # what nobody needs may be all that is in the way of the next run
            if change.op == "remove":
                self._remove(change)
        self._ports.housekeeping.collect_garbage()
        self._serve_without_room()
        raise self._no_room()

    def _no_room(self) -> DiskFull:
        """Log that there is no room, in words that are the same in the next run; say how the rest may be had meanwhile."""
        disk = self._plan.disk
        coming = sorted((change for change in self._plan.models if change.download_bytes), key=lambda change: -change.download_bytes)
        names = ", ".join(change.id for change in coming[:3]) + ("…" if coming[3:] else "")
        wanted = f"{units.human_size(disk.needed)} needed{' for ' if names else ''}{names}"
        kept = f"{units.human_size(disk.reserve)} kept in reserve"
        self._ports.report(Incident(kind="disk-full", detail=f"not enough space: {wanted}, {kept}; nothing was downloaded"))
        rest = f", or do the rest with `reconcile apply --except {coming[0].id}`" if coming[1:] else ""
        hint = f"free {units.human_size(disk.short)} (`reconcile gc --dry-run` shows what can go){rest}"
        return DiskFull(self._plan.warnings[-1], hint=hint)

    def _serve_without_room(self) -> None:
        """Activate what only needs its link, which is no reason to wait for room; leave no reader with a set that is not whole."""
        self._enable([self._models[change.id] for change in self._plan.models if change.op == "enable"])
        self._serving.mend()

    # -- 3: what a run left that was cut short -----------------------------------------------------

    def _catch_up(self) -> None:
        if self._state.heard is None:
            return
        added, why = self._serving.catch_up(self._state.heard, [change.id for change in self._plan.models if self._retires(change)])
        if why:
            self._unhealthy(added, why)

    def _unhealthy(self, added: Iterable[str], why: str) -> None:
        for model in sorted(added):
            self._failed.add(model)
            self._records.fail(model, SmokeFailed(f"the node was not healthy with it: {why}"))

    def _reject(self) -> None:
        for change in self._plan.models:
            if change.op == "reject":
                known = self._records.get(change.id)
                if known is None or known.reason != change.reason:
                    self._ports.report(Incident(kind="incompatible", model=change.id, detail=change.reason.partition(": ")[2]))
                self._records.settle(change.id, change.to, change.reason)

    # -- 4, 5: blobs, trees and tests --------------------------------------------------------------

    def _install(self) -> None:
        work = [self._models[change.id] for change in self._plan.models if change.op in _WORK]
        linked = self._enable(work)
        rest = [model for model in work if model.id not in linked]
        if not rest:
            return
        with contextlib.closing(self._bringing.batches(rest)) as batches:
            for ready in batches:
                self._conclude(ready)
        self._drop_spoiled()

    def _enable(self, work: list[LockedModel]) -> set[str]:
        """Activate, in one swap, what only needs its link again; return which that was."""
        ready = self._bringing.linked(work)
        if ready:
            self._conclude(ready)
        return {one.model.id for one in ready}

    def _drop_spoiled(self) -> None:
        """Stop serving what was kept for want of something better, and turned out to hold a damaged blob."""
        spoiled = {tree.digest for tree in self._trees.values() if self._bringing.lost & set(tree.blobs)} - self._mended
        gone = [model for model, entry in self._serving.entries.items() if entry.tree in spoiled]
        for model in gone:
            self._ports.report(Incident(kind="blob-damaged", model=model, detail="its older copy is damaged and is not served any more"))
        self._serving.swap({}, gone, "damaged")

    # -- 6: activation -----------------------------------------------------------------------------

    def _conclude(self, ready: list[Prepared]) -> None:
        self._trees.update({one.model.recipe: one.tree for one in ready if one.tree})
        self._mended.update(one.tree.digest for one in ready if one.tree)
        passed = [one for one in ready if self._judge(one)]
        for one in ready:
            if one not in passed:
                self._give_up(one)
        added = {one.model.id: self._entry(one.model, one.tree) for one in passed if one.model.state == "enabled" and one.tree}
        gone = [one.model.id for one in ready if one.model.id in self._serving.entries and self._must_leave(one)]
        what = "installed or tested" if added else "failed its repair or its test"
        why = self._serving.swap(added, gone, what, succeeded=self._succeeded(added))
        if why:
            self._unhealthy(added, why)
        for one in passed:
            if not (why and one.model.id in added):
                self._records.settle(one.model.id, "active" if one.model.state == "enabled" else "inactive", "up-to-date: nothing to do")

    def _judge(self, one: Prepared) -> bool:
        """Log a test's report; say whether the model may serve, or rest, now."""
        if one.error is not None or one.tree is None:
            return False
        if one.report is None:
            return True
        at = self._ports.now()
        passed = self._passed(one.model, one.tree, one.report, at) if one.report.verdict == "passed" else None
        if one.report.verdict != "unable":
            self._ports.ledger.tested(one.model.id, one.report, passed, at)
        return passed is not None

    def _passed(self, model: LockedModel, tree: TreeSeen, report: TestReport, at: datetime) -> Passed:
        engine = model.runtime.engine
        return Passed(
            tree=tree.digest,
            smoke=plans.smoke_digest(model),
            engine=engine,
            engine_version=self._node.engines.get(engine, report.engine_version),
            device=self._node.device,
            at=at,
        )

    def _give_up(self, one: Prepared) -> None:
        """Log why a model did not pass: it is at fault, or this node could not say."""
        model = one.model
        if one.report is not None and one.report.verdict == "unable":
            self._untested.add(model.id)
            if one.report.reason.startswith("sandbox-unavailable"):
                self._ports.report(Incident(kind="sandbox-unavailable", model=model.id, detail=one.report.reason))
            self._records.settle(model.id, "active" if self._keeps(one) else "pending", f"not-tested: {one.report.reason}")
            return
        self._failed.add(model.id)
        if one.error is not None and self._keeps(one) and not self._must_leave(one):  # the disk refused: not the model's fault
            self._ports.report(Notice(level="warning", text=f"{model.id} could not be tested: {one.error.message}"))
            self._records.settle(model.id, "active", f"not-tested: {one.error.name}: {one.error.message}")
            return
        error = one.error or SmokeFailed(one.report.reason if one.report else "it has no tree")
        if not isinstance(error, FetchError):
            kind = error.name if error.name in {"smoke-failed", "unpack-refused", "disk-full", "blob-damaged"} else "smoke-failed"
            self._ports.report(Incident(kind=kind, model=model.id, detail=error.message))
        if not isinstance(error, FetchError) or isinstance(error, HashMismatch | SizeMismatch):  # of bytes that lied, the record alone
            self._ports.housekeeping.quarantine(model.id, one.report, error.message, one.tree.digest if one.tree else "")
        self._records.fail(model.id, error)

    def _keeps(self, one: Prepared) -> bool:
        """Say whether a model is active with the very content that is listed."""
        entry, tree = self._serving.entries.get(one.model.id), one.tree or self._state.trees.get(one.model.recipe)
        return entry is not None and tree is not None and tree.digest == entry.tree

    def _must_leave(self, one: Prepared) -> bool:
        """
        Say whether an active model leaves: its own bytes are bad, or it failed its retest.

        An old copy outlives a bad new one, and a good one outlives a disk that refuses.
        """
        if one.model.id not in self._failed:
            return False
        if self._changes[one.model.id].op == "repair":
            return True
        lost = bool(self._bringing.lost & set(one.model.blobs))
        if one.tree is None and one.model.recipe not in self._state.trees:  # which content is active was forgotten with the ledger
            return lost and one.model.id in self._serving.entries
        refused = isinstance(one.error, StoreError) and not isinstance(one.error, BlobDamaged)
        return self._keeps(one) and (lost or not refused)

    def _succeeded(self, added: dict[str, ActiveModel]) -> list[str]:
        """Return the archived versions whose successor is among *added*: they leave in the same swap."""
        names = {model.partition(":")[0] for model in added}
        return [change.id for change in self._plan.models if self._retires(change) and change.id.partition(":")[0] in names]

    def _entry(self, model: LockedModel, tree: TreeSeen) -> ActiveModel:
        return ActiveModel(
            id=model.id,
            tasks=model.tasks,
            runtime=model.runtime,
            path=self._ports.active_path(model.id),
            entrypoint=model.entrypoint,
            bytes=tree.bytes,
            tree=tree.digest,
        )

    # -- 7: retiring and removing ------------------------------------------------------------------

    def _retires(self, change: ModelChange) -> bool:
        return change.op == "archive"

    def _retire(self) -> None:
        retiring = [change for change in self._plan.models if self._retires(change) and not self._awaited(change.id)]
        self._serving.swap({}, [change.id for change in retiring if change.id in self._serving.entries], "archived by the snapshot")
        for change in retiring:
            self._archive(self._models[change.id], change)
        for change in self._plan.models:
            if change.op == "remove":
                self._remove(change)

    def _awaited(self, model: str) -> bool:
        """Say whether *model* still serves for a listed version of it that is not active yet."""
        name = model.partition(":")[0]
        successors = [one for one in self._lock.model if one.name == name and one.id != model and one.state == "enabled"]
        coming = [one for one in successors if self._changes[one.id].op != "reject"]
        return model in self._serving.entries and any(one.id not in self._serving.entries for one in coming)

    def _archive(self, model: LockedModel, change: ModelChange) -> None:
        self._ports.report(ModelPhase(model=model.id, phase="archiving"))
        staying = plans.blobs_still_needed(self._lock, self._trees, self._serving.entries)
        moving = [name for name in model.blobs if name not in staying and name in self._state.blobs]
        try:
            for name in moving:
                self._archive_blob(name)
        except BlobDamaged as error:
            self._ports.report(Incident(kind="blob-damaged", model=model.id, detail=error.message))
            self._failed.add(model.id)
            self._records.fail(model.id, error)
            return
        except StoreError as error:  # cold storage is full or away: the model rests where it is until the next run
            kind = Incident(kind="disk-full", model=model.id, detail=error.message) if isinstance(error, DiskFull) else None
            self._ports.report(kind or Notice(level="warning", text=f"{model.id} is not archived yet: {error.message}"))
            self._failed.add(model.id)
            return
        tree = self._state.trees.get(model.recipe)
        if tree is not None and tree.digest not in {entry.tree for entry in self._serving.entries.values()}:
            self._ports.trees.remove(tree.digest)
        self._records.settle(model.id, "archived", change.reason)

    def _archive_blob(self, name: str) -> None:
        try:
            self._ports.blobs.archive(name)
        except BlobDamaged:
            self._ports.blobs.discard(name)  # nobody else needs it, and nobody may find it again and believe it
            raise

    def _remove(self, change: ModelChange) -> None:
        """Forget a model whose time is over; the sweep frees what nobody else needs."""
        record = self._records.get(change.id)
        since = record.unlisted_since if record else None
        over = since is None or (self._ports.now() - since).total_seconds() >= self._policy.grace_seconds
        if change.id in self._models or over:
            self._ports.report(ModelPhase(model=change.id, phase="removing"))
            self._records.forget(change.id, change.reason)

    def _correct(self) -> None:
        """Set right what was remembered wrongly of models that need nothing: a run was cut short between an effect and its record."""
        for change in self._plan.models:
            listed, known = self._models.get(change.id), self._records.get(change.id)
            if change.op != "keep" or listed is None or known is None or listed.id in self._failed or change.reason.startswith("excluded"):
                continue
            if known.state != change.from_ or (known.recipe != listed.recipe and change.from_ != "absent"):
                self._records.settle(change.id, change.from_, change.reason)
