"""
Plan, apply, sync: the main job.

Rules that hold here:

1. A plan does not hold the store and leaves no trace.
2. An apply holds the store, verifies the lock again, advances the trust state, makes its own plan and carries that out.
   A plan that was made before is compared with it, never trusted.
3. Where the snapshot cannot be fetched, the last accepted lock is applied. That is a warning at first, and an error after
   ``[network] quiet_after``, or at once where none was ever fetched from the address in the settings.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from reconciler.commands import fetch_record, load_lock, node_trust
from reconciler.commands import lock as lock_command
from reconciler.commands.context import Clock, NodeContext, RunOptions, hold_store, measure_node, remember_engines
from reconciler.commands.fetch_record import FetchStatus
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core import plan as plans
from reconciler.core.errors import FetchError, NetworkSilent, ReconcileError, RuntimeMissing, UsageError
from reconciler.core.events import Event, Incident, Notice
from reconciler.core.lock import Lock
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import Plan
from reconciler.core.state import NodeState
from reconciler.ports import Reporter
from reconciler.store import clock, observe, trust_state
from reconciler.store.ledger import Ledger

if TYPE_CHECKING:
    from reconciler.apply.run import Outcome

_OPTIONS = RunOptions()


class Preview(Struct, frozen=True, kw_only=True):
    """A plan with all that it was made from."""

    plan: Plan
    verified_lock: VerifiedLock
    state: NodeState
    node: NodeFacts
    policy: Policy
    #: What the attempts to fetch the snapshot met.
    fetches: FetchStatus = FetchStatus()
    #: Bytes of what is to be fetched that are here of downloads that were cut short.
    partly_here: int = 0


def preview(context: NodeContext, options: RunOptions = _OPTIONS) -> Preview:
    """
    Return what ``apply`` would do now. Changes nothing.

    Raises:
        TrustError: the lock may not be acted on now.
        StoreError: the store cannot be read.
    """
    now, layout = context.clock(), context.layout
    found = load_lock.load_verified_lock(context)
    with Ledger.reading(layout.ledger) as ledger:
        found.check_fresh(trust_state.read(layout, ledger), now=now, limits=context.limits)
        state, fetches = observe.node_state(layout, ledger), fetch_record.read(context, ledger)
    seen = _preview(context, options, found, state, now)
    wanted = {change.digest: change.bytes for change in seen.plan.blobs if change.op == "fetch"}
    partly = sum(observe.partial_bytes(layout, wanted).values()) if wanted else 0
    return msgspec.structs.replace(seen, fetches=fetches, partly_here=partly)


def _preview(context: NodeContext, options: RunOptions, found: VerifiedLock, state: NodeState, now: datetime) -> Preview:
    options = _with_ids(options, {*(model.id for model in found.lock.model), *state.records, *state.active.entries})
    node = measure_node(context)
    policy = msgspec.structs.replace(context.policy, only=options.only, excluded=options.excluded)
    made = plans.diff(found.lock, found.lock_digest, state, node, policy, now=now)
    return Preview(plan=made, verified_lock=found, state=state, node=node, policy=policy)


def _with_ids(options: RunOptions, known: set[str]) -> RunOptions:
    """
    Return *options* with the ids of *known* in place of names without a version.

    Raises:
        UsageError: a model is not among *known*: a typing error would be a silent success.
    """
    only = tuple(model for text in options.only for model in ids_of(text, known))
    excluded = tuple(model for text in options.excluded for model in ids_of(text, known))
    return msgspec.structs.replace(options, only=only, excluded=excluded)


def ids_of(text: str, known: set[str]) -> tuple[str, ...]:
    """Return *text* if it is an id among *known*, else all ids of the name *text*; raises UsageError where there is none."""
    found = (text,) if text in known else tuple(sorted(model for model in known if model.partition(":")[0] == text))
    if not found:
        import difflib

        near = difflib.get_close_matches(text, known, n=1)
        raise UsageError(f"there is no model {text!r}", hint=f"did you mean {near[0]!r}?" if near else "`reconcile status` lists them")
    return found


def apply(
    context: NodeContext, report: Reporter, options: RunOptions = _OPTIONS, *, saved: Plan | None = None, actor: str = "apply"
) -> Outcome:
    """
    Carry out what the lock asks for, and return the outcome. *actor* is what the history names as its cause.

    Raises:
        TrustError: the lock may not be acted on now; what is active stays active.
        StalePlan: *saved* is not what would be done now.
        StoreBusy, StoreError, DiskFull, RuntimeMissing: as their names say.
    """
    from reconciler.apply import run as applying
    from reconciler.commands import wiring  # the downloader and the engines come with it, and a plan needs neither

    with hold_store(context, timeout_seconds=options.lock_timeout_seconds) as ledger:
        context = msgspec.structs.replace(context, clock=clock.run_clock(context.clock))
        remember_engines(context)
        now = context.clock()
        report = _with_incidents_logged(report, ledger, context.clock)
        found = _accept_lock(context, ledger, now)
        clock.follow(context.layout, ledger, now, clock.boot_time())
        ledger.limit_times(now)
        if saved is not None and saved.lock == found.lock_digest:  # it is carried out as it was asked for
            options = msgspec.structs.replace(options, excluded=(*options.excluded, *plans.excluded_models(saved)))
        seen = _preview(context, options, found, observe.node_state(context.layout, ledger), now)
        if saved is not None:
            plans.check_fresh(saved, seen.plan)
        _refuse_without_runtime(seen.plan, found.lock, seen.node)
        with wiring.ports(context, options, found, ledger, report, actor) as ports:
            return applying.execute(seen.plan, found.lock, seen.state, seen.node, seen.policy, ports)


def _accept_lock(context: NodeContext, ledger: Ledger, now: datetime) -> VerifiedLock:
    """Return the committed lock, verified, as it holds for this node; it is recorded as the newest accepted one before anything is done."""
    with node_trust.refusals_logged(ledger, now):
        files = load_lock.read_files(context)
        found = load_lock.verify_files(context, files)
        node_trust.record_accepted(context, found.verified, found.root, ledger, now)
    load_lock.cache_verified_lock(context, files, found)
    return load_lock.for_node(context, found)


def _with_incidents_logged(report: Reporter, ledger: Ledger, clock: Clock) -> Reporter:
    """Return a reporter that also writes incidents to the ledger."""

    def both(event: Event) -> None:
        if isinstance(event, Incident):
            try:
                ledger.log_incident(event, clock())
            except ReconcileError as error:  # a full disk must not silence the run
                report(Notice(level="warning", text=f"an incident could not be logged: {error.message}"))
        report(event)

    return both


def _refuse_without_runtime(made: Plan, lock: Lock, node: NodeFacts) -> None:
    """Refuse a run that can install nothing at all because no engine is installed: one error, not one for each of a hundred models."""
    wanted = {model.runtime.engine for model in lock.model if model.state == "enabled"}
    if wanted and not wanted & node.engines.keys() and all(change.op in {"reject", "keep"} for change in made.models):
        names = ", ".join(sorted(wanted))
        raise RuntimeMissing(f"none of the engines that the snapshot's models need is installed: {names}")


def sync(context: NodeContext, report: Reporter, options: RunOptions = _OPTIONS, *, actor: str = "sync") -> Outcome:
    """
    Fetch the latest snapshot, then apply it.

    Raises:
        TrustError: the document at the snapshot's address is not one that the network signed, or the last lock may not be acted on.
        NetworkSilent: no snapshot could be fetched for longer than ``[network] quiet_after``; the last lock was applied without a failure.
        FetchError: none was ever fetched from this address; the last lock was applied, if there is one.
        and whatever ``apply`` raises.
    """
    missed = None if options.locked or options.offline else _fetch_or_warn(context, report, options)
    outcome = apply(context, report, msgspec.structs.replace(options, patient=True), actor=actor)
    failed = outcome.failed or outcome.unfetched or outcome.internal_errors  # says more than a silence does
    if missed is not None and not (failed and isinstance(missed, NetworkSilent)):
        raise missed
    return outcome


def _fetch_or_warn(context: NodeContext, report: Reporter, options: RunOptions) -> FetchError | None:
    """Fetch the latest snapshot; where that fails and there is a lock to apply, warn, and return the error with which the sync ends."""
    try:
        lock_command.update_lock(
            context,
            lock_timeout_seconds=options.lock_timeout_seconds,
            roots_every_seconds=node_trust.ROOTS_EVERY_SECONDS,
            patient=True,
        )
    except FetchError as error:
        missed = fetch_record.failure(context, error, context.clock())
        if not load_lock.has_verified_lock(context):
            raise error if missed is None or isinstance(missed, NetworkSilent) else missed from None
        report(
            Notice(level="warning", text=f"no snapshot could be fetched ({error.message}); the lock that was accepted last stays in use")
        )
        return missed
    return None
