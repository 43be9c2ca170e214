"""What is remembered of models: the state in which a run leaves each, and why."""

from __future__ import annotations

from msgspec import structs

from reconciler.core.errors import ReconcileError
from reconciler.core.lock import Lock
from reconciler.core.state import ModelState, Record
from reconciler.ports import ModelDone, Ports


class Records:
    """The records of a node's models. Only the thread that carries out the plan writes them."""

    def __init__(self, known: dict[str, Record], lock: Lock, ports: Ports) -> None:
        self._known = dict(known)
        self._lock = lock
        self._models = {model.id: model for model in lock.model}
        self._ports = ports

    def get(self, model: str) -> Record | None:
        """Return what is remembered of *model*."""
        return self._known.get(model)

    def settle(self, model: str, state: ModelState, reason: str, *, attempts: int = 0, last_error: str = "") -> None:
        """Remember and report the state in which this run leaves *model*."""
        known, listed = self._known.get(model), self._models.get(model)
        same = known is not None and known.state == state
        record = Record(
            id=model,
            state=state,
            recipe=listed.recipe if listed else known.recipe if known else "",
            blobs=listed.blobs if listed else known.blobs if known else (),
            reason=reason,
            attempts=attempts,
            last_error=last_error,
            since=known.since if known and same else self._ports.now(),
        )
        if record != known:
            self._put(record)
        self._ports.report(ModelDone(model=model, state=state, reason=reason))

    def fail(self, model: str, error: ReconcileError) -> None:
        """Remember and report that *model*, which is listed, failed, and how often it has."""
        known = self._known.get(model)
        attempts = known.attempts + 1 if known and known.recipe == self._models[model].recipe else 1
        text = f"{error.name}: {error.message}"
        self.settle(model, "failed", f"failed-before: {text}", attempts=attempts, last_error=text)

    def unlist(self, model: str, reason: str) -> None:
        """Remember since when *model* is not listed."""
        known = self._known.get(model) or Record(id=model, state="inactive")
        self._put(structs.replace(known, state="inactive", reason=reason, unlisted_since=self._ports.now()))
        self._ports.report(ModelDone(model=model, state="inactive", reason=reason))

    def forget(self, model: str, reason: str) -> None:
        """Remember nothing of *model*."""
        self._ports.ledger.forget(model)
        self._known.pop(model, None)
        self._ports.report(ModelDone(model=model, state="absent", reason=reason))

    def _put(self, record: Record) -> None:
        self._known[record.id] = record
        self._ports.ledger.put(record)
