"""
Blobs are fetched, restored or hashed; each model whose blobs are all there is assembled and tested while the others are on their way.

Rules that hold here:

1. Nothing here touches generations or records: what became of a model is handed on as a value.
2. Every model of the work ends, once: with a tree and a report, or with an error. A bug of this program is an ``InternalError``.
3. Two threads work: one moves bytes, one assembles and tests, so that one test job at a time has the GPU. Their results are messages.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from reconciler.apply.run_state import RunState
from reconciler.core import lifecycle
from reconciler.core import plan as plans
from reconciler.core.errors import BlobDamaged, ReconcileError, SandboxUnavailable
from reconciler.core.events import BlobReady, Incident, ModelPhase
from reconciler.core.lock import LockedModel
from reconciler.core.state import TreeSeen
from reconciler.ports import Fetched, FetchFailed, Ports, TestJob, TestReport, Want

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor


class Prepared(Struct, frozen=True, kw_only=True):
    """A model whose tree is made and whose test job ended; or why not."""

    model: LockedModel
    tree: TreeSeen | None = None
    report: TestReport | None = None
    error: ReconcileError | None = None


class Batch(Struct, frozen=True, kw_only=True):
    """Models that ended together, and the blobs that were found damaged until then."""

    prepared: list[Prepared]
    damaged: frozenset[str] = frozenset()


class BlobResult(Struct, frozen=True, kw_only=True):
    """A blob that is there now; or why not."""

    digest: str
    error: ReconcileError | None = None


class Preparation:
    """The blobs of a run's plan, and the models that are made of them."""

    def __init__(self, run: RunState, ports: Ports) -> None:
        self._run, self._ports = run, ports
        self._messages: queue.Queue[BlobResult | Prepared] = queue.Queue()
        self._stop = threading.Event()
        #: Blobs that were on the disk, and whose bytes are not what they were.
        self._damaged: set[str] = set()
        #: Blobs that the plan moves or hashes, and those of them whose files become others.
        self._planned = frozenset(change.digest for change in run.plan.blobs)
        self._replaced = frozenset(change.digest for change in run.plan.blobs if change.op != "check")
        #: Reports of this run's test jobs, by what they depend on.
        self._reports: dict[tuple[str, str, str], TestReport] = {}

    def linked(self, work: Iterable[LockedModel]) -> list[Prepared]:
        """Return those of *work* for which no blob must be fetched, restored or hashed, prepared at once."""
        return [self._prepared(model) for model in work if not self._needed(model)]

    def batches(self, work: list[LockedModel]) -> Generator[Batch, None, None]:
        """
        Prepare *work*; yield its models as they end, together where they end together. Close it, whatever happens.

        The last batch has no models: it tells which blobs were found damaged in all.
        """
        waiting = {model.id: self._needed(model) for model in work}
        for name, model_id in sorted((name, model_id) for model_id, names in waiting.items() for name in names):
            self._ports.report(ModelPhase(model=model_id, phase="fetching", detail=name))
        from concurrent.futures import ThreadPoolExecutor  # most runs prepare nothing

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="test") as tests:
            blobs = threading.Thread(target=self._move_blobs, name="blobs", daemon=True)
            blobs.start()
            try:
                for model in [model for model in work if not waiting[model.id]]:
                    tests.submit(self._prepare, model)
                for ready in self._ended(work, waiting, tests):
                    yield Batch(prepared=ready, damaged=frozenset(self._damaged))
            except BaseException:
                self._ports.fetcher.close()  # a transfer may take hours, a test job minutes, and nobody waits for them any more
                self._ports.tester.close()
                raise
            finally:
                self._stop.set()
                tests.shutdown(wait=True, cancel_futures=True)
                blobs.join()
        yield Batch(prepared=[], damaged=frozenset(self._damaged))  # of copies that no model of the work waited for

    def _needed(self, model: LockedModel) -> set[str]:
        """Return the digests that must be there before *model*'s tree can be made."""
        tree = self._run.observed.trees.get(model.recipe)
        return {*model.blobs, *(tree.blobs if tree else ())} & self._planned

    def _move_blobs(self) -> None:
        """Fetch, restore or hash every blob of the plan, in a thread of its own; each one's end is a message."""
        try:
            missing = [change.digest for change in self._run.plan.blobs if change.op == "fetch"]
            local = [change for change in self._run.plan.blobs if change.op != "fetch"]
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as hashing:
                checked = [(change.digest, hashing.submit(self._check_local, change.digest, change.op)) for change in local]
                self._fetch(missing)
                damaged = [name for name, good in checked if not good.result()]
            self._fetch(damaged)
        except ReconcileError as error:
            self._fail_rest(error)
        except Exception as error:  # noqa: BLE001  a bug here must not leave the run waiting for ever
            self._fail_rest(self._ports.housekeeping.report_bug(error, ""))

    def _check_local(self, name: str, op: str) -> bool:
        """Restore or hash a blob that the node has; return whether it is good."""
        try:
            good = self._ports.blobs.check(name) if op == "check" else self._restored(name)
        except ReconcileError as error:
            self._messages.put(BlobResult(digest=name, error=error))
            return True
        if good:
            self._messages.put(BlobResult(digest=name))
        else:
            if op == "check":
                self._damaged.add(name)
            self._ports.report(Incident(kind="blob-damaged", blob=name, detail="its bytes have changed"))
        return good

    def _restored(self, name: str) -> bool:
        try:
            self._ports.blobs.restore(name)
        except BlobDamaged:
            return False
        return True

    def _fetch(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._run.lock.blob]
        for name in unknown:  # a member of an archive: unpacking makes it again
            self._messages.put(BlobResult(digest=name))
        wants = [self._want(name) for name in names if name in self._run.lock.blob]
        if not wants or self._stop.is_set():
            return
        outcomes, together = self._ports.fetcher.fetch(wants, self._ports.report), list[Fetched | FetchFailed]()
        for outcome in outcomes:
            together.append(outcome)
            if outcome.more:
                continue
            self._adopt(together)
            together = []
            if self._stop.is_set():
                _close(outcomes)
                return
        self._adopt(together)

    def _want(self, name: str) -> Want:
        blob = self._run.lock.blob[name]
        own = self._run.policy.fallback if self._run.lock.allow_node_fallback else ()
        return Want(digest=name, size=blob.size, sources=(*blob.sources, *plans.expand_templates(own, name)))

    def _adopt(self, together: list[Fetched | FetchFailed]) -> None:
        """Give what was fetched its name; each one's end is a message."""
        fetched = [one for one in together if isinstance(one, Fetched)]
        failures = self._ports.blobs.adopt(fetched)
        failures |= {one.digest: one.error for one in together if isinstance(one, FetchFailed)}
        for one in fetched:
            if one.digest not in failures:
                self._ports.report(BlobReady(digest=one.digest, size=one.size, sources=one.sources))
        for outcome in together:
            self._messages.put(BlobResult(digest=outcome.digest, error=failures.get(outcome.digest)))

    def _fail_rest(self, error: ReconcileError) -> None:
        for change in self._run.plan.blobs:
            self._messages.put(BlobResult(digest=change.digest, error=error))

    # -- 5: trees and tests ------------------------------------------------------------------------

    def _ended(self, work: list[LockedModel], waiting: dict[str, set[str]], tests: ThreadPoolExecutor) -> Iterator[list[Prepared]]:
        """Take messages until every model of *work* has ended."""
        open_ = {model.id for model in work}
        users: dict[str, list[LockedModel]] = {}
        for model in work:
            for name in waiting[model.id]:
                users.setdefault(name, []).append(model)
        while open_:
            ready: list[Prepared] = []
            for message in _all_waiting(self._messages):
                if isinstance(message, Prepared):
                    ready.append(message)
                else:
                    ready += self._after(message, users.get(message.digest, []), waiting, tests)
            open_ -= {prepared.model.id for prepared in ready}
            if ready:
                yield ready

    def _after(
        self, brought: BlobResult, users: list[LockedModel], waiting: dict[str, set[str]], tests: ThreadPoolExecutor
    ) -> list[Prepared]:
        """Start those of the *users* of a blob for which it was the last one; return those that fail with it."""
        ended = []
        for model in users:
            if brought.digest not in waiting[model.id]:
                continue
            waiting[model.id].discard(brought.digest)
            if brought.error is not None:
                waiting[model.id].clear()
                ended.append(Prepared(model=model, error=brought.error))
            elif not waiting[model.id]:
                tests.submit(self._prepare, model)
        return ended

    def _prepare(self, model: LockedModel) -> None:
        self._messages.put(self._prepared(model))

    def _prepared(self, model: LockedModel) -> Prepared:
        try:
            return self._made(model)
        except SandboxUnavailable as error:  # an archive is unpacked in one too: nobody is at fault, and it is tried again
            return Prepared(model=model, report=TestReport(verdict="unable", reason=f"{error.name}: {error.message}"))
        except ReconcileError as error:
            return Prepared(model=model, error=error)
        except Exception as error:  # noqa: BLE001  a bug in one model's path must not leave the run waiting for ever
            return Prepared(model=model, error=self._ports.housekeeping.report_bug(error, model.id))

    def _is_standing(self, model: LockedModel) -> bool:
        """Return whether the tree of *model* is there and its blobs are what they were: no archive is unpacked again for a test."""
        tree = self._run.observed.trees.get(model.recipe)
        if tree is None or tree.damaged or self._run.changes[model.id].op == "repair":
            return False
        return self._replaced.isdisjoint(tree.blobs) and self._damaged.isdisjoint(tree.blobs)

    def _made(self, model: LockedModel) -> Prepared:
        report = self._ports.report
        standing = self._is_standing(model)
        if not standing and any(artifact.unpack for artifact in model.artifact):
            report(ModelPhase(model=model.id, phase="unpacking"))
        tree = self._ports.trees.assemble(model.recipe, model.artifact, model.entrypoint, standing=standing)
        if not model.serves or self._run.changes[model.id].op == "enable":
            return Prepared(model=model, tree=tree)
        return Prepared(model=model, tree=tree, report=self._tested(model, tree))

    def _tested(self, model: LockedModel, tree: TreeSeen) -> TestReport:
        """Run the test job of *model*, unless this run has the report of the same job on the same tree: only the id differs."""
        key = (tree.digest, lifecycle.smoke_digest(model), model.runtime.engine)
        known = self._reports.get(key)
        if known is not None:
            self._ports.report(ModelPhase(model=model.id, phase="tested", detail="the same content passed the same test in this run"))
            return known
        self._ports.report(ModelPhase(model=model.id, phase="testing"))
        tested = self._ports.tester.test(
            TestJob(
                model=model.id,
                tree=self._ports.tree_path(tree.digest),
                digest=tree.digest,
                entrypoint=model.entrypoint,
                runtime=model.runtime,
                smoke=model.smoke,
                roles=model.file_roles,
                gpu_memory=model.gpu_memory,
                memory=model.memory,
            )
        )
        if tested.verdict == "passed":
            self._reports[key] = tested
        detail = tested.reason or f"{tested.tokens} tokens on {tested.device}"
        self._ports.report(ModelPhase(model=model.id, phase="tested", detail=detail))
        return tested


def _all_waiting(messages: queue.Queue[BlobResult | Prepared]) -> Iterator[BlobResult | Prepared]:
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
