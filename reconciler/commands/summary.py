"""
How a node is, in one sentence for people: the gravest thing alone, and what to do about it.

From the gravest: the lock may not be acted on; the network's snapshot is refused; none can be fetched; models failed or wait; the store was
changed by others; changes are to be made; the activated hook fails; a rollback holds; all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from reconciler.commands import fetch_record
from reconciler.commands.fetch_record import FetchStatus
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core import errors, units
from reconciler.core.errors import Expired, ReconcileError
from reconciler.core.plan import ModelChange, Plan

_TEST_CONNECTION = "`reconcile doctor` tests the connection"


def sentence(
    made: Plan, found: VerifiedLock, refusal: ReconcileError | None, fetches: FetchStatus, now: datetime, *, hook_error: str = ""
) -> str:
    """
    Return the sentence of a node with the lock *found*, for which *made* is planned.

    *refusal* is why the lock may not be acted on, *hook_error* how the activated hook failed last.
    """
    snapshot = found.lock.snapshot
    if refusal is not None:
        is_unreachable = isinstance(refusal, Expired) and fetches.unreachable
        do = f"{fetch_record.describe_failure(fetches, now)}; {_TEST_CONNECTION}" if is_unreachable else refusal.hint
        return f"Nothing new is installed, because the lock is refused ({refusal.name}: {refusal.message}): {do}."
    if fetches.refused is not None:
        stays = f"snapshot {snapshot.version} stays in use"
        return f"{_capital(fetch_record.describe_refusal(fetches, now))}; {stays}: {errors.hint_of(fetches.refused.name)}."
    if fetches.unreachable is not None:
        stays = f"snapshot {snapshot.version} stays in use until {units.rfc3339(snapshot.expires_at)}"
        return f"{_capital(fetch_record.describe_failure(fetches, now))}; {stays}: {_TEST_CONNECTION}."
    return _of_models(made, snapshot.version, hook_error) + (f"; last fetched at {units.rfc3339(fetches.last)}." if fetches.last else ".")


def _capital(clause: str) -> str:
    return clause[:1].upper() + clause[1:]


def _of_models(made: Plan, version: int, hook_error: str) -> str:
    active = sum(change.from_ == "active" for change in made.models)
    if troubled := [change for change in made.models if change.from_ in {"failed", "pending"} or change.reason.startswith("source-failed")]:
        one = f"`reconcile status {troubled[0].id}` shows why"
        return f"Failed, not fetched or not tested yet: {_names(troubled)}; the next sync tries again, and {one}"
    if made.drift:
        return f"The store is not as the last run left it, in {units.count(len(made.drift), 'place')}: run `reconcile verify --repair`"
    if changed := [change for change in made.models if change.changes]:
        return f"What snapshot {version} asks for is not done yet for {_names(changed)}: run `reconcile apply`"
    if hook_error:
        return f"The activated hook {hook_error}: correct [hooks] activated; the next sync runs it again"
    if held := [change for change in made.models if change.reason.startswith("held:")]:
        return f"A rollback holds back what snapshot {version} asks for {_names(held)}: `reconcile resume` ends that"
    return f"All is well, with {units.count(active, 'model')} active, as snapshot {version} asks"


def _names(changes: Sequence[ModelChange]) -> str:
    shown = ", ".join(change.id for change in changes[:3])
    return f"{units.count(len(changes), 'model')} ({shown}{', …' if len(changes) > 3 else ''})"
