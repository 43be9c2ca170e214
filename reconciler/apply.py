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

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler import plan as plans
from reconciler.errors import (
    BlobDamaged,
    DiskFull,
    FetchError,
    HashMismatch,
    ReconcileError,
    SandboxUnavailable,
    SizeMismatch,
    SmokeFailed,
    StoreError,
)
from reconciler.lock import Lock, LockedModel
from reconciler.node import NodeFacts, Policy
from reconciler.plan import ModelChange, Plan
from reconciler.ports import (
    BlobReady,
    Blobs,
    Fetched,
    Fetcher,
    FetchFailed,
    Gate,
    Generations,
    Incident,
    Keeper,
    Ledger,
    ModelDone,
    ModelPhase,
    Notice,
    Reporter,
    RunEnded,
    RunStarted,
    Swapped,
    Tester,
    TestJob,
    TestReport,
    Trees,
    Want,
)
from reconciler.state import ActiveModel, Generation, ModelState, NodeState, Passed, Record, TreeSeen


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Everything that a run may touch."""

    blobs: Blobs
    trees: Trees
    generations: Generations
    ledger: Ledger
    keeper: Keeper
    gate: Gate
    fetcher: Fetcher
    tester: Tester
    report: Reporter
    now: Callable[[], datetime]
    #: Where a tree lies.
    tree_path: Callable[[str], Path]
    #: Where a model's folder lies in a generation.
    active_path: Callable[[str], str]


class Outcome(Struct, frozen=True, kw_only=True):
    """How a run ended."""

    lock: str
    generation: int
    active: tuple[str, ...]
    failed: tuple[str, ...]
    #: Models that could not be tested now.
    untested: tuple[str, ...]
    changed: bool


class Prepared(Struct, frozen=True, kw_only=True):
    """A model whose tree is made and whose test job ended; or why not."""

    model: LockedModel
    tree: TreeSeen | None = None
    report: TestReport | None = None
    error: ReconcileError | None = None


class Brought(Struct, frozen=True, kw_only=True):
    """A blob that is there now; or why not."""

    digest: str
    error: ReconcileError | None = None


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
        self._active = dict(state.active.entries)
        self._records = dict(state.records)
        #: Trees by recipe: those that were there, and those that this run made.
        self._trees = dict(state.trees)
        self._messages: queue.Queue[Brought | Prepared] = queue.Queue()
        self._failed: set[str] = set()
        self._untested: set[str] = set()
        #: Blobs that were on the disk, and whose bytes are not what they were.
        self._lost: set[str] = set()
        #: Trees that this run made or mended.
        self._mended: set[str] = set()
        self._began = ports.now()

    def execute(self) -> Outcome:
        ports, plan = self._ports, self._plan
        ports.report(
            RunStarted(
                lock=plan.lock, generation=plan.generation, models=len(plan.models), download_bytes=plan.summary["download_bytes"]
            )
        )
        loud = plans.taken_away(plan.models, len(self._active))
        for warning in plan.warnings:
            ports.report(Incident(kind="removed-unlisted", detail=warning) if warning == loud else Notice(level="warning", text=warning))
        self._stop_serving()  # 1
        self._refuse_without_room()  # 2
        ports.ledger.set_running(running=True)  # 3
        if self._state.unfinished:
            ports.report(Incident(kind="crash-recovered", detail="the last run was cut short; this one finishes it"))
        ports.keeper.recover()
        self._reject()
        self._install()  # 4, 5, 6
        self._retire()  # 7
        self._correct()
        ports.keeper.sweep()
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
        spoiled = [model for model in self._active if self._is_spoiled(model)]
        gone = [*(change.id for change in leaving if change.id in self._active), *spoiled]
        # What only needs its link again comes back in one swap (4): a reader whose paths still work must not meet an empty set before.
        lost = self._state.broken and not any(change.op == "enable" for change in self._plan.models)
        self._swap({}, gone, "removed or disabled by the snapshot", anew=lost or bool(self._state.strayed))
        for change in leaving:
            if change.op == "disable":
                self._settle(change.id, "inactive", change.reason)
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
        entry, listed = self._active[model], self._models.get(model)
        own = self._state.trees.get(listed.recipe) if listed else None
        if own is not None and own.digest == entry.tree:
            return False
        if model in self._state.strayed:
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
        record = self._records.get(change.id) or Record(id=change.id, state="inactive")
        if record.unlisted_since is None:
            self._ports.report(Incident(kind="removed-unlisted", model=change.id, detail=change.reason))
            self._put(msgspec.structs.replace(record, state="inactive", reason=change.reason, unlisted_since=self._began))
            self._ports.report(ModelDone(model=change.id, state="inactive", reason=change.reason))

    # -- 2: room -----------------------------------------------------------------------------------

    def _refuse_without_room(self) -> None:
        if not self._plan.disk.short:
            return
        for change in self._plan.models:  # what nobody needs may be all that is in the way of the next run
            if change.op == "remove":
                self._remove(change)
        self._ports.keeper.sweep()
        self._serve_without_room()
        raise DiskFull(self._plan.warnings[-1])

    def _serve_without_room(self) -> None:
        """Activate what only needs its link, which is no reason to wait for room; leave no reader with a set that is not whole."""
        enabled = [self._models[change.id] for change in self._plan.models if change.op == "enable"]
        self._enable(enabled, {model.id: self._needed(model) for model in enabled})
        if self._state.broken:
            self._swap({}, [], "what was active was not whole", anew=True)

    def _reject(self) -> None:
        for change in self._plan.models:
            if change.op == "reject":
                known = self._records.get(change.id)
                if known is None or known.reason != change.reason:
                    self._ports.report(Incident(kind="incompatible", model=change.id, detail=change.reason.partition(": ")[2]))
                self._settle(change.id, change.to, change.reason)

    # -- 4: blobs ----------------------------------------------------------------------------------

    def _install(self) -> None:
        work = [self._models[change.id] for change in self._plan.models if change.op in _WORK]
        if not work:
            return
        waiting = {model.id: self._needed(model) for model in work}
        for name, model_id in sorted((name, model_id) for model_id, names in waiting.items() for name in names):
            self._ports.report(ModelPhase(model=model_id, phase="fetching", detail=name))
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="test") as tests:
            bringing = threading.Thread(target=self._bring, args=(stop,), name="bring", daemon=True)
            bringing.start()
            try:
                work = self._enable(work, waiting)
                for model in [model for model in work if not waiting[model.id]]:
                    tests.submit(self._prepare_safely, model)
                self._collect(work, waiting, tests)
            except BaseException:
                self._ports.fetcher.close()  # a transfer may take hours, and nobody waits for it any more
                raise
            finally:
                stop.set()
                tests.shutdown(wait=True, cancel_futures=True)
                bringing.join()
        self._drop_spoiled()

    def _drop_spoiled(self) -> None:
        """Stop serving what was kept for want of something better, and turned out to hold a damaged blob."""
        spoiled = {tree.digest for tree in self._trees.values() if self._lost & set(tree.blobs)} - self._mended
        gone = [model for model, entry in self._active.items() if entry.tree in spoiled]
        for model in gone:
            self._ports.report(Incident(kind="blob-damaged", model=model, detail="its older copy is damaged and is not served any more"))
        self._swap({}, gone, "damaged")

    def _enable(self, work: list[LockedModel], waiting: dict[str, set[str]]) -> list[LockedModel]:
        """Activate, in one swap, what only needs its link again; return the rest of *work*."""
        ready = [model for model in work if self._changes[model.id].op == "enable" and not waiting[model.id]]
        if ready:
            self._conclude([self._prepared(model) for model in ready])
        return [model for model in work if model not in ready]

    def _needed(self, model: LockedModel) -> set[str]:
        """Return the digests that must be brought before *model*'s tree can be made."""
        tree = self._state.trees.get(model.recipe)
        own = {*self._lock.blobs_of(model), *(tree.blobs if tree else ())}
        return own & {change.digest for change in self._plan.blobs}

    def _bring(self, stop: threading.Event) -> None:
        """Bring every blob of the plan, in a thread of its own; each one's end is a message."""
        try:
            missing = [change.digest for change in self._plan.blobs if change.op == "fetch"]
            local = [change for change in self._plan.blobs if change.op != "fetch"]
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as hashing:
                checked = [(change.digest, hashing.submit(self._have, change.digest, change.op)) for change in local]
                self._fetch(missing, stop)
                damaged = [name for name, good in checked if not good.result()]
            self._fetch(damaged, stop)
        except ReconcileError as error:
            self._fail_rest(error)
        except Exception as error:  # noqa: BLE001  a bug here must not leave the run waiting for ever
            self._fail_rest(StoreError(f"unexpected: {type(error).__name__}: {error}"))

    def _have(self, name: str, op: str) -> bool:
        """Thaw or hash a blob that the node has; say whether it is good."""
        try:
            good = self._ports.blobs.check(name) if op == "check" else self._thawed(name)
        except ReconcileError as error:
            self._messages.put(Brought(digest=name, error=error))
            return True
        if good:
            self._messages.put(Brought(digest=name))
        else:
            if op == "check":
                self._lost.add(name)
            self._ports.report(Incident(kind="blob-damaged", blob=name, detail="its bytes are not what they were"))
        return good

    def _thawed(self, name: str) -> bool:
        try:
            self._ports.blobs.thaw(name)
        except BlobDamaged:
            return False
        return True

    def _fetch(self, names: list[str], stop: threading.Event) -> None:
        unknown = [name for name in names if name not in self._lock.blob]
        for name in unknown:  # a member of an archive: unpacking makes it again
            self._messages.put(Brought(digest=name))
        wants = [self._want(name) for name in names if name in self._lock.blob]
        if not wants or stop.is_set():
            return
        outcomes = self._ports.fetcher.fetch(wants, self._ports.report)
        for outcome in outcomes:
            self._messages.put(self._adopted(outcome))
            if stop.is_set():
                _close(outcomes)
                return

    def _want(self, name: str) -> Want:
        blob = self._lock.blob[name]
        own = self._policy.fallback if self._lock.allow_node_fallback else ()
        return Want(digest=name, size=blob.size, sources=(*blob.sources, *plans.expanded(own, name)))

    def _adopted(self, outcome: Fetched | FetchFailed) -> Brought:
        if isinstance(outcome, FetchFailed):
            return Brought(digest=outcome.digest, error=outcome.error)
        try:
            self._ports.blobs.adopt(outcome)
        except ReconcileError as error:
            return Brought(digest=outcome.digest, error=error)
        self._ports.report(BlobReady(digest=outcome.digest, size=outcome.size, sources=outcome.sources))
        return Brought(digest=outcome.digest)

    def _fail_rest(self, error: ReconcileError) -> None:
        for change in self._plan.blobs:
            self._messages.put(Brought(digest=change.digest, error=error))

    # -- 5: trees and tests ------------------------------------------------------------------------

    def _collect(self, work: list[LockedModel], waiting: dict[str, set[str]], tests: ThreadPoolExecutor) -> None:
        """Take messages until every model of *work* has ended; those that came together are activated together."""
        open_ = {model.id: model for model in work}
        while open_:
            ready: list[Prepared] = []
            for message in _all_waiting(self._messages):
                if isinstance(message, Prepared):
                    ready.append(message)
                    continue
                ready += self._after(message, open_, waiting, tests)
            for prepared in ready:
                open_.pop(prepared.model.id, None)
            self._conclude(ready)

    def _after(
        self, brought: Brought, open_: dict[str, LockedModel], waiting: dict[str, set[str]], tests: ThreadPoolExecutor
    ) -> list[Prepared]:
        """Start the models for which *brought* was the last blob; return those that fail with it."""
        ended = []
        for model in open_.values():
            if brought.digest not in waiting[model.id]:
                continue
            waiting[model.id].discard(brought.digest)
            if brought.error is not None:
                waiting[model.id].clear()
                ended.append(Prepared(model=model, error=brought.error))
            elif not waiting[model.id]:
                tests.submit(self._prepare_safely, model)
        return ended

    def _prepare_safely(self, model: LockedModel) -> None:
        self._messages.put(self._prepared(model))

    def _prepared(self, model: LockedModel) -> Prepared:
        try:
            return self._prepare(model)
        except SandboxUnavailable as error:  # an archive is unpacked in one too: nobody is at fault, and it is tried again
            return Prepared(model=model, report=TestReport(verdict="unable", reason=f"{error.name}: {error.message}"))
        except ReconcileError as error:
            return Prepared(model=model, error=error)
        except Exception as error:  # noqa: BLE001  a bug in one model's path must not leave the run waiting for ever
            return Prepared(model=model, error=StoreError(f"unexpected: {type(error).__name__}: {error}"))

    def _prepare(self, model: LockedModel) -> Prepared:
        report = self._ports.report
        if any(artifact.unpack for artifact in model.artifact):
            report(ModelPhase(model=model.id, phase="unpacking"))
        tree = self._ports.trees.assemble(model.recipe, model.artifact, model.entrypoint)
        if model.state != "enabled" or self._changes[model.id].op == "enable":
            return Prepared(model=model, tree=tree)
        report(ModelPhase(model=model.id, phase="testing"))
        tested = self._ports.tester.test(
            TestJob(
                model=model.id,
                tree=self._ports.tree_path(tree.digest),
                entrypoint=model.entrypoint,
                runtime=model.runtime,
                smoke=model.smoke,
                gpu_memory=model.gpu_memory,
                memory=model.memory,
            )
        )
        report(ModelPhase(model=model.id, phase="tested", detail=tested.reason or f"{tested.tokens} tokens on {tested.device}"))
        return Prepared(model=model, tree=tree, report=tested)

    # -- 6: activation -----------------------------------------------------------------------------

    def _conclude(self, ready: list[Prepared]) -> None:
        self._trees.update({one.model.recipe: one.tree for one in ready if one.tree})
        self._mended.update(one.tree.digest for one in ready if one.tree)
        passed = [one for one in ready if self._judge(one)]
        for one in ready:
            if one not in passed:
                self._give_up(one)
        added = {one.model.id: self._entry(one.model, one.tree) for one in passed if one.model.state == "enabled" and one.tree}
        gone = [one.model.id for one in ready if one.model.id in self._active and self._must_leave(one)]
        why = "" if not (added or gone) else self._swap(added, [*gone, *self._succeeded(added)], "installed or tested")
        for one in passed:
            if why and one.model.id in added:
                self._failed.add(one.model.id)
                self._fail(one.model, SmokeFailed(f"the node was not healthy with it: {why}"))
            else:
                self._settle(one.model.id, "active" if one.model.state == "enabled" else "inactive", "up-to-date: nothing to do")

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
            self._settle(model.id, "active" if self._keeps(one) else "pending", f"not-tested: {one.report.reason}")
            return
        self._failed.add(model.id)
        if one.error is not None and self._keeps(one) and not self._must_leave(one):  # the disk refused: not the model's fault
            self._ports.report(Notice(level="warning", text=f"{model.id} could not be tested: {one.error.message}"))
            self._settle(model.id, "active", f"not-tested: {one.error.name}: {one.error.message}")
            return
        error = one.error or SmokeFailed(one.report.reason if one.report else "it has no tree")
        if not isinstance(error, FetchError):
            kind = error.name if error.name in {"smoke-failed", "unpack-refused", "disk-full", "blob-damaged"} else "smoke-failed"
            self._ports.report(Incident(kind=kind, model=model.id, detail=error.message))
        if not isinstance(error, FetchError) or isinstance(error, HashMismatch | SizeMismatch):  # of bytes that lied, the record alone
            self._ports.keeper.quarantine(model.id, one.report, error.message, one.tree.digest if one.tree else "")
        self._fail(model, error)

    def _fail(self, model: LockedModel, error: ReconcileError) -> None:
        known = self._records.get(model.id)
        attempts = known.attempts + 1 if known and known.recipe == model.recipe else 1
        text = f"{error.name}: {error.message}"
        self._settle(model.id, "failed", f"failed-before: {text}", attempts=attempts, last_error=text)

    def _keeps(self, one: Prepared) -> bool:
        """Say whether a model is active with the very content that is listed."""
        entry, tree = self._active.get(one.model.id), one.tree or self._state.trees.get(one.model.recipe)
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
        lost = bool(self._lost & set(self._lock.blobs_of(one.model)))
        if one.tree is None and one.model.recipe not in self._state.trees:  # which content is active was forgotten with the ledger
            return lost and one.model.id in self._active
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

    def _swap(self, added: dict[str, ActiveModel], gone: list[str], what: str, *, anew: bool = False) -> str:
        """
        Swap in the set with *added* and without *gone*; return why the node was not healthy with it, or nothing.

        The same set is swapped in only if it must be made *anew*.
        """
        following = {model: entry for model, entry in (self._active | added).items() if model not in set(gone)}
        if following == self._active and not anew:
            return ""
        before = self._ports.generations.current()
        made = self._ports.generations.swap(following)
        why = self._ports.gate.healthy(made) if added else ""
        if why:
            return self._swap_back(before, made, gone, why)
        self._announce(made, tuple(sorted(added)), tuple(sorted(set(gone) & self._active.keys())), what)
        self._active = following
        return ""

    def _swap_back(self, before: Generation, made: Generation, gone: list[str], why: str) -> str:
        """Return to what served before; what may not serve any more stays out of it."""
        self._ports.report(Incident(kind="smoke-failed", detail=f"generation {made.number} is not healthy: {why}"))
        rest = {model: entry for model, entry in before.entries.items() if model not in gone or self._retiring(model)}
        whole = before.number and rest == before.entries
        back = self._ports.generations.reactivate(before.number) if whole else self._ports.generations.swap(rest)
        self._announce(back, (), (), f"went back: not healthy: {why}")
        self._active = dict(back.entries)
        return why

    def _retiring(self, model: str) -> bool:
        change = self._changes.get(model)
        return change is not None and self._retires(change)

    def _announce(self, made: Generation, added: tuple[str, ...], removed: tuple[str, ...], what: str) -> None:
        self._ports.report(Swapped(generation=made.number, added=added, removed=removed, what=what))
        self._ports.gate.activated(made)

    # -- 7: retiring and removing ------------------------------------------------------------------

    def _retires(self, change: ModelChange) -> bool:
        return change.op == "archive"

    def _retire(self) -> None:
        retiring = [change for change in self._plan.models if self._retires(change) and not self._awaited(change.id)]
        self._swap({}, [change.id for change in retiring if change.id in self._active], "archived by the snapshot")
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
        return model in self._active and any(one.id not in self._active for one in coming)

    def _archive(self, model: LockedModel, change: ModelChange) -> None:
        self._ports.report(ModelPhase(model=model.id, phase="archiving"))
        staying = plans.staying(self._lock, self._trees, self._active)
        moving = [name for name in self._lock.blobs_of(model) if name not in staying and name in self._state.blobs]
        try:
            for name in moving:
                self._freeze(name)
        except BlobDamaged as error:
            self._ports.report(Incident(kind="blob-damaged", model=model.id, detail=error.message))
            self._failed.add(model.id)
            self._fail(model, error)
            return
        except StoreError as error:  # cold storage is full or away: the model rests where it is until the next run
            kind = Incident(kind="disk-full", model=model.id, detail=error.message) if isinstance(error, DiskFull) else None
            self._ports.report(kind or Notice(level="warning", text=f"{model.id} is not archived yet: {error.message}"))
            self._failed.add(model.id)
            return
        tree = self._state.trees.get(model.recipe)
        if tree is not None and tree.digest not in {entry.tree for entry in self._active.values()}:
            self._ports.trees.remove(tree.digest)
        self._settle(model.id, "archived", change.reason)

    def _freeze(self, name: str) -> None:
        try:
            self._ports.blobs.freeze(name)
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
            self._ports.ledger.forget(change.id)
            self._records.pop(change.id, None)
            self._ports.report(ModelDone(model=change.id, state="absent", reason=change.reason))

    # -- records -----------------------------------------------------------------------------------

    def _settle(self, model: str, state: ModelState, reason: str, *, attempts: int = 0, last_error: str = "") -> None:
        """Remember and report the state in which this run leaves *model*."""
        known, listed = self._records.get(model), self._models.get(model)
        same = known is not None and known.state == state
        record = Record(
            id=model,
            state=state,
            recipe=listed.recipe if listed else known.recipe if known else "",
            blobs=self._lock.blobs_of(listed) if listed else known.blobs if known else (),
            reason=reason,
            attempts=attempts,
            last_error=last_error,
            since=known.since if known and same else self._ports.now(),
        )
        if record != known:
            self._put(record)
        self._ports.report(ModelDone(model=model, state=state, reason=reason))

    def _correct(self) -> None:
        """Set right what was remembered wrongly of models that need nothing: a run was cut short between an effect and its record."""
        for change in self._plan.models:
            listed, known = self._models.get(change.id), self._records.get(change.id)
            if change.op != "keep" or listed is None or known is None or change.reason.startswith("excluded"):
                continue
            if known.state != change.from_ or (known.recipe != listed.recipe and change.from_ != "absent"):
                self._settle(change.id, change.from_, change.reason)

    def _put(self, record: Record) -> None:
        self._records[record.id] = record
        self._ports.ledger.put(record)


def _all_waiting(messages: queue.Queue[Brought | Prepared]) -> Iterator[Brought | Prepared]:
    """Wait for a message, then yield it and all that came with it."""
    yield messages.get()
    while True:
        try:
            yield messages.get_nowait()
        except queue.Empty:
            return


def _close(outcomes: Iterator[Fetched | FetchFailed]) -> None:
    close = getattr(outcomes, "close", None)
    if close is not None:
        close()
