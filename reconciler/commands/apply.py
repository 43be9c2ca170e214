"""
Plan, apply, sync: the main job.

A plan holds nothing and leaves no trace. An apply holds the store, confirms the lock again, raises the floor, makes its own plan
under the hold, and carries that out: what a person saw before is compared, never trusted.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from reconciler.commands import load_lock, node_facts
from reconciler.commands import lock as lock_command
from reconciler.commands.load_lock import VerifiedLock
from reconciler.commands.options import Clock, Options, wall_clock
from reconciler.core import plan as plans
from reconciler.core.errors import FetchError, ReconcileError, RuntimeMissing, UsageError
from reconciler.core.lock import Lock
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import Plan
from reconciler.core.state import NodeState
from reconciler.ports import Event, Incident, Notice, Reporter
from reconciler.settings import Settings
from reconciler.store import observe, trust_state
from reconciler.store.ledger import Ledger

if TYPE_CHECKING:
    from reconciler.apply.run import Outcome

_OPTIONS = Options()


class Preview(Struct, frozen=True, kw_only=True):
    """A plan with all that it was made from."""

    plan: Plan
    verified_lock: VerifiedLock
    state: NodeState
    node: NodeFacts
    policy: Policy


def preview(settings: Settings, options: Options = _OPTIONS, *, clock: Clock = wall_clock) -> Preview:
    """
    Return what ``apply`` would do now. Changes nothing.

    Raises:
        TrustError: the lock may not be acted on now.
        StoreError: the store cannot be read.
    """
    now = clock()
    found = load_lock.load_verified_lock(settings)
    layout = load_lock.store_layout(settings)
    with Ledger.reading(layout.ledger) as ledger:
        found.check_fresh(trust_state.read(layout, ledger), now)
        state = observe.node_state(layout, ledger)
    return _preview(settings, options, found, state, now)


def _preview(settings: Settings, options: Options, found: VerifiedLock, state: NodeState, now: datetime) -> Preview:
    _refuse_strangers(options, {*(model.id for model in found.lock.model), *state.records, *state.active.entries})
    node, policy = node_facts.measure_node(settings), _policy(settings, options)
    made = plans.diff(found.lock, found.lock_digest, state, node, policy, now=now)
    return Preview(plan=made, verified_lock=found, state=state, node=node, policy=policy)


def _refuse_strangers(options: Options, known: set[str]) -> None:
    """Refuse a model id on the command line that nobody knows: a typo would be a silent success."""
    for model in (*options.only, *options.excluded):
        if model not in known:
            import difflib

            near = difflib.get_close_matches(model, known, n=1)
            raise UsageError(f"there is no model {model!r}", hint=f"did you mean {near[0]!r}?" if near else "`reconcile status` lists them")


def _policy(settings: Settings, options: Options) -> Policy:
    return msgspec.structs.replace(settings.policy, only=options.only, excluded=options.excluded)


def apply(
    settings: Settings,
    report: Reporter,
    options: Options = _OPTIONS,
    *,
    saved: Plan | None = None,
    actor: str = "apply",
    clock: Clock = wall_clock,
) -> Outcome:
    """
    Carry out what the lock asks for, and return how it ended.

    Raises:
        TrustError: the lock may not be acted on now; what is active stays active.
        StalePlan: *saved* is not what would be done now.
        StoreBusy, StoreError, DiskFull, RuntimeMissing: as their names say.
    """
    from reconciler.apply import run as applying
    from reconciler.commands import wiring  # the downloader and the engines come with it, and a plan needs neither

    with lock_command.open_store(settings, timeout_seconds=options.lock_timeout_seconds) as ledger:
        now = clock()
        report = _logged(report, ledger, clock)
        found = _raised(settings, ledger, now)
        layout = load_lock.store_layout(settings)
        if saved is not None and saved.lock == found.lock_digest:  # it is carried out as it was asked for
            options = msgspec.structs.replace(options, excluded=(*options.excluded, *plans.excluded_models(saved)))
        seen = _preview(settings, options, found, observe.node_state(layout, ledger), now)
        if saved is not None:
            plans.check_fresh(saved, seen.plan)
        _refuse_without_runtime(seen.plan, found.lock, seen.node)
        with wiring.ports(settings, options, found, ledger, report, actor, clock) as ports:
            return applying.execute(seen.plan, found.lock, seen.state, seen.node, seen.policy, ports)


def _raised(settings: Settings, ledger: Ledger, now: datetime) -> VerifiedLock:
    with lock_command.log_trust_errors(ledger, now):
        found = load_lock.load_verified_lock(settings)
        lock_command.record_accepted(settings, found, ledger, now)
    load_lock.cache_verified_lock(settings, found)
    return found


def _logged(report: Reporter, ledger: Ledger, clock: Clock) -> Reporter:
    """Return a reporter that also keeps incidents."""

    def both(event: Event) -> None:
        if isinstance(event, Incident):
            try:
                ledger.log_incident(event, clock())
            except ReconcileError as error:  # a full disk must not silence the run
                report(Notice(level="warning", text=f"an incident could not be logged: {error.message}"))
        report(event)

    return both


def _refuse_without_runtime(made: Plan, lock: Lock, node: NodeFacts) -> None:
    """Refuse a run that could install nothing at all for want of an engine: one missing extra, not a hundred unfit models."""
    wanted = {model.runtime.engine for model in lock.model if model.state == "enabled"}
    if wanted and not wanted & node.engines.keys() and all(change.op in {"reject", "keep"} for change in made.models):
        names = ", ".join(sorted(wanted))
        raise RuntimeMissing(f"no engine is installed that the network's models need: {names}")


def sync(settings: Settings, report: Reporter, options: Options = _OPTIONS, *, actor: str = "sync", clock: Clock = wall_clock) -> Outcome:
    """
    Hear the network, then apply. A network that does not answer is a warning: the last known lock is applied.

    Raises:
        TrustError: what the network's address holds is not its word, or the last known lock may not be acted on.
        and whatever ``apply`` raises.
    """
    if not (options.locked or options.offline):
        try:
            update_lock(settings, clock=clock, patience_seconds=options.lock_timeout_seconds)
        except FetchError as error:
            if not lock_command.has_usable_lock(settings):
                raise
            report(Notice(level="warning", text=f"the network does not answer ({error.message}); the last known lock stays"))
    return apply(settings, report, options, actor=actor, clock=clock)


def update_lock(
    settings: Settings, source: str = "", *, clock: Clock = wall_clock, patience_seconds: float = 0.0
) -> lock_command.FetchedSnapshot:
    """
    Hear the snapshot at *source*, or at the settings' place, and make it the node's own.

    Raises:
        FetchError: nobody answers; what was accepted before stays.
        TrustError: what is there is not the network's word.
    """
    now = clock()
    with lock_command.open_store(settings, timeout_seconds=patience_seconds) as ledger:
        lock_command.fetch_newer_roots(settings, ledger)
        with lock_command.log_trust_errors(ledger, now, source or settings.network.snapshot):
            heard = lock_command.fetch_snapshot(settings, source, now)
        lock_command.accept_snapshot(settings, heard, ledger, now)
    return heard
