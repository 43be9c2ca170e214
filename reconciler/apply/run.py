"""
Carries out a plan. The order of effects is the safety proof; each line is one step (``STEPS``), and other modules cite its number:

1. ``activate.stop``: what may not serve leaves the active set in one swap, before anything is fetched.
2. ``_begin``: the ledger remembers that a run is going on. Staging is cleared of what an interrupted run left.
3. ``install.relink``: models that need only their link again come back, which waits for nothing.
4. ``_refuse_without_room``: a plan for which the disk has no room is refused before the first byte is fetched. What serves and is
   damaged stops all the same.
5. ``records.reject``: models that this node cannot run are recorded.
6. ``install.install``: blobs are fetched, restored or hashed again; a blob gets its name only when its digest was checked. As soon as all
   blobs of a model are there, its tree is made, its test job runs, and it is activated by one swap, while others are still on their way.
7. ``retire.stop_archived``: archived models leave the active set, once their successors serve.
8. ``activate.rebuild``: an active generation that still differs from its index is written anew.
9. ``activate.announce``: the servers and the hooks are told of the set; where the node is not healthy with it, the set before comes back.
10. ``retire.archive``: archived models go to cold storage.
11. ``retire.remove``: models whose grace period is over are forgotten.
12. ``records.correct``: records that an interrupted run left behind their effects are corrected.
13. ``_collect``: what no listed model, kept generation or grace period needs is deleted.
14. ``_end``: the ledger remembers that the run ended.

At every instant ``active`` leads to a complete generation of verified and tested models. Whatever step is interrupted, what it left is
observed like everything else, the next plan contains the difference, and the same steps finish it.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from reconciler.apply import activate, install, records, retire
from reconciler.apply.run_state import RunState, start
from reconciler.core import plan as plans
from reconciler.core import units
from reconciler.core.disk import INODES_HINT
from reconciler.core.errors import DiskFull
from reconciler.core.events import Incident, Notice, RunEnded, RunStarted
from reconciler.core.lock import Lock
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import Plan
from reconciler.core.state import NodeState
from reconciler.ports import Ports


class Outcome(Struct, frozen=True, kw_only=True):
    """How a run ended: the active generation, and the models that failed, or could not be fetched or tested now."""

    lock: str
    generation: int
    active: tuple[str, ...]
    failed: tuple[str, ...]
    untested: tuple[str, ...]
    #: Models of which no source gave the bytes.
    unfetched: tuple[str, ...] = ()
    #: Models that a bug of this program met; they are as they were.
    internal_errors: tuple[str, ...] = ()
    changed: bool


def execute(plan: Plan, lock: Lock, state: NodeState, node: NodeFacts, policy: Policy, ports: Ports) -> Outcome:
    """
    Carry out *plan*, which was made from the other arguments, and return how it ended.

    Raises:
        DiskFull: there is no room for what is planned; nothing was fetched.
        StoreError: the disk refused; the next run finishes what this one began.
    """
    run = start(plan, lock, state, node, policy, now=ports.now())
    _report_start(run, ports)
    for step in STEPS:
        run = step(run, ports)
    return _outcome(run, ports)


def _report_start(run: RunState, ports: Ports) -> None:
    plan = run.plan
    downloads = plan.summary["download_bytes"]
    ports.report(RunStarted(lock=plan.lock, generation=plan.generation, models=len(plan.models), download_bytes=downloads))
    mass_removal = plans.mass_removal_warning(plan.models, len(run.serving))
    for warning in plan.warnings:
        is_removal = warning == mass_removal
        ports.report(Incident(kind="removed-unlisted", detail=warning) if is_removal else Notice(level="warning", text=warning))


def _begin(run: RunState, ports: Ports) -> RunState:
    ports.ledger.set_running(running=True)
    if run.observed.unfinished:
        ports.report(Incident(kind="crash-recovered", detail="the last run was interrupted; this one finishes it"))
    ports.housekeeping.recover()
    return run


def _refuse_without_room(run: RunState, ports: Ports) -> RunState:
    if not run.plan.disk.shortage:
        return run
    run = retire.remove(run, ports)  # what nothing needs may be all that is in the way of the next run
    ports.housekeeping.collect_garbage()
    run = install.stop_bad_copies(run, ports)
    run = activate.announce(activate.rebuild(run, ports), ports)
    ports.ledger.set_running(running=False)
    raise _no_room(run, ports)


def _no_room(run: RunState, ports: Ports) -> DiskFull:
    """Log that there is no room, in words that are the same in the next run; return the error, which says how the rest may be had."""
    disk = run.plan.disk
    coming = sorted((change for change in run.plan.models if change.download_bytes), key=lambda change: -change.download_bytes)
    names = ", ".join(change.id for change in coming[:3]) + ("…" if coming[3:] else "")
    wanted = f" needed{' for ' if names else ''}{names}"
    what = f"space: {units.human_size(disk.needed)}{wanted}, {units.human_size(disk.reserve)} kept in reserve"
    what = what if disk.short else f"inodes: {disk.inodes_needed:,}{wanted}"
    ports.report(Incident(kind="disk-full", detail=f"not enough {what}; nothing was downloaded"))
    rest = f", or do the rest with `reconcile apply --except {coming[0].id}`" if coming[1:] else ""
    free = f"free {units.human_size(disk.short)} (`reconcile gc --dry-run` shows what can go)" if disk.short else INODES_HINT
    return DiskFull(disk.shortage, hint=free + rest)


def _collect(run: RunState, ports: Ports) -> RunState:
    ports.housekeeping.collect_garbage()
    return run


def _end(run: RunState, ports: Ports) -> RunState:
    ports.ledger.set_running(running=False)
    return run


def _outcome(run: RunState, ports: Ports) -> Outcome:
    generation, unfetched = ports.generations.current(), run.ended("unfetched")
    waiting = {change.id for change in run.planned("keep") if change.from_ == "failed" and change.reason.startswith("failed-before")}
    failed = tuple(sorted({*run.ended("failed", "refused"), *waiting}))
    changed = any(change.changes for change in run.plan.models) or bool(run.plan.blobs)
    seconds = (ports.now() - run.began).total_seconds()
    active = tuple(generation.entries)
    ports.report(
        RunEnded(
            lock=run.plan.lock,
            generation=generation.number,
            active=len(active),
            failed=len(failed),
            unfetched=len(unfetched),
            changed=changed,
            seconds=seconds,
        )
    )
    return Outcome(
        lock=run.plan.lock,
        generation=generation.number,
        active=active,
        failed=failed,
        untested=run.ended("untested"),
        unfetched=unfetched,
        internal_errors=run.ended("internal-error"),
        changed=changed,
    )


#: The order of effects; the module's docstring says what each step is for.
STEPS: tuple[Callable[[RunState, Ports], RunState], ...] = (
    activate.stop,
    _begin,
    install.relink,
    _refuse_without_room,
    records.reject,
    install.install,
    retire.stop_archived,
    activate.rebuild,
    activate.announce,
    retire.archive,
    retire.remove,
    records.correct,
    _collect,
    _end,
)
