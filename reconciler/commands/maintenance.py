"""Commands that tidy: gc and retry. Each holds the store."""

from __future__ import annotations

import msgspec

from reconciler.commands import load_lock
from reconciler.commands.context import NodeContext, hold_store
from reconciler.core.errors import UsageError
from reconciler.store import clock
from reconciler.store.garbage import Garbage, GarbageCollector
from reconciler.store.ledger import Ledger

# -- gc --------------------------------------------------------------------------------------------


def garbage(context: NodeContext) -> tuple[Garbage, ...]:
    """Return what ``gc`` would delete, and why. Changes nothing."""
    found = load_lock.load_verified_lock(context)
    with Ledger.reading(context.layout.ledger) as ledger:
        return GarbageCollector(context.layout, ledger, found.lock, context.policy, context.clock).garbage()


def gc(context: NodeContext, *, at_most: int | None = None, lock_timeout_seconds: float = 0.0) -> tuple[Garbage, ...]:
    """
    Delete files that nothing needs, at most about *at_most* bytes of them; return what was deleted.

    Raises:
        StoreBusy, StoreError, TrustError: as their names say.
    """
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        found = load_lock.load_verified_lock(context)
        clock.follow(context.layout, ledger, context.clock(), clock.boot_time())
        collector = GarbageCollector(context.layout, ledger, found.lock, context.policy, context.clock)
        before = collector.garbage()
        collector.free(before, at_most=at_most)
        left = {(one.kind, one.name) for one in collector.garbage()}
    return tuple(one for one in before if (one.kind, one.name) not in left)


# -- retry -----------------------------------------------------------------------------------------


def retry(context: NodeContext, model: str, *, lock_timeout_seconds: float = 0.0) -> None:
    """
    Clear *model*'s failure record, so that the next apply retries it immediately.

    Raises:
        UsageError: there is no such model, or it did not fail.
    """
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        record = ledger.records().get(model)
        if record is None or record.state != "failed":
            failed = sorted(one.id for one in ledger.records().values() if one.state == "failed")
            raise UsageError(f"{model!r} did not fail", hint=f"failed: {', '.join(failed) or 'none'}")
        ledger.put(
            msgspec.structs.replace(
                record, state="pending", attempts=0, last_error="", unhealthy_at=None, reason="not-tested: asked for by a person"
            )
        )
