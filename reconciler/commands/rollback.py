"""
Rollback: the set of an earlier run serves again, and is held until a person resumes.

Rules that hold here:

1. One run is one step: without a number, ``rollback`` returns to the set that was announced before the active one (SPEC 8).
2. Only what the current snapshot approves, in these very bytes, comes back. What cannot is named, each model with its reason.
3. Bytes in cold storage are restored and hashed first; no byte serves that is not known to be good.
4. What a rollback takes out of service is held before the swap, so that no later run undoes it.
"""

from __future__ import annotations

import contextlib
from datetime import datetime

from msgspec import Struct

from reconciler.apply import activate
from reconciler.commands import load_lock, wiring
from reconciler.commands.context import NodeContext, RunOptions, hold_store
from reconciler.core import plan as plans
from reconciler.core.errors import BlobDamaged, StoreError, UsageError
from reconciler.core.events import Swapped
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.state import Generation, NodeState
from reconciler.ports import Ports, Reporter
from reconciler.store import generations, observe
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger


class Step(Struct, frozen=True, kw_only=True):
    """A set that a run ended with, and whether a rollback may return to it."""

    generation: int  #: Its number.
    at: datetime | None  #: When it was announced; None where the history does not know it.
    actor: str  #: The command that made it.
    what: str  #: Why the set changed.
    models: tuple[str, ...]  #: Model ids.
    active: bool  #: It serves now.
    #: Why a rollback to it is refused; empty if it is not.
    refusal: str = ""


def steps(context: NodeContext) -> tuple[Step, ...]:
    """
    Return the sets that runs ended with and that are still kept, the newest first. Changes nothing.

    Raises:
        TrustError, StoreError: the lock cannot be read, or the store.
    """
    lock = load_lock.load_verified_lock(context).lock
    with Ledger.reading(context.layout.ledger) as ledger:
        state = observe.node_state(context.layout, ledger)
        changes = {change.generation: change for change in ledger.history()}
        found = generations.steps(generations.numbers(context.layout), ledger)
    made = []
    for number in reversed(found):
        with contextlib.suppress(generations.DamagedGeneration):
            held, change = generations.read(context.layout, number), changes.get(number)
            made.append(
                Step(
                    generation=number,
                    at=change.at if change else None,
                    actor=change.actor if change else "",
                    what=change.what if change else "",
                    models=tuple(held.entries),
                    active=number == state.active.number,
                    refusal="; ".join(_refusals(held, lock, state).values()),
                )
            )
    return tuple(made)


def rollback(context: NodeContext, report: Reporter, number: int | None = None, *, lock_timeout_seconds: float = 0.0) -> Generation:
    """
    Return to generation *number*, or to the set that served before the last run.

    Raises:
        UsageError: there is no such generation.
        StoreError: a model of it may not serve or is not on this node any more; or the healthy hook fails with it, and the set that
            served before serves again.
    """
    layout = context.layout
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        found = load_lock.load_verified_lock(context)
        with wiring.ports(context, RunOptions(offline=True), found, ledger, report, "rollback") as ports:
            before = generations.current_or_empty(layout)
            target = _target(layout, ledger, before.number, number)
            state = observe.node_state(layout, ledger)
            _refuse(target, _refusals(target, found.lock, state))
            ledger.set_running(running=True)  # a rollback that is cut short from here on is finished by the next run: hooks and history
            _restore(target, found.lock, state, ports)
            ledger.set_fact("held", state.held | _taken_back(before, target, found.lock))
            unhealthy = _activate(layout, before, target, ports)
            if unhealthy:
                ledger.set_fact("held", state.held)
            ledger.set_running(running=state.unfinished)
    if unhealthy:
        raise StoreError(
            f"the node is not healthy with generation {target.number}: {unhealthy}",
            hint="what served before serves again; `reconcile rollback --list` shows the others",
        )
    return generations.current(layout)


def _activate(layout: Layout, before: Generation, target: Generation, ports: Ports) -> str:
    """Let *target* serve and announce it; where the node is not healthy with it, *before* serves again. Return why, or an empty text."""
    touched = generations.misdirected(layout, target) or generations.unexpected_entries(layout, target)
    made = ports.generations.swap(target.entries) if touched else ports.generations.reactivate(target.number)
    ports.report(Swapped(generation=made.number, what="rollback"))
    activate.tell(ports, made)
    brings_models = any(before.tree_of(model) != entry.tree for model, entry in made.entries.items())
    unhealthy = ports.hooks.healthy(made) if brings_models else ""
    if not unhealthy:
        activate.report_announced(ports, before, made, f"rolled back from {before.number}")
        return ""
    serving = ports.generations.reactivate(before.number) if before.number else ports.generations.swap({})
    activate.tell(ports, serving)
    activate.report_announced(ports, before, serving, f"went back from {made.number}: not healthy: {unhealthy}")
    return unhealthy


def _target(layout: Layout, ledger: Ledger, current: int, number: int | None) -> Generation:
    """Return generation *number*; without one, the set before *current*, or the newest of all where the active one is damaged."""
    found = generations.numbers(layout)
    if number is not None and number not in found:
        raise UsageError(f"there is no generation {number}", hint=f"there are: {', '.join(map(str, found)) or 'none'}")
    if number is not None:
        return generations.read(layout, number)
    for one in reversed(generations.steps(found, ledger)):
        if not current or one < current:
            with contextlib.suppress(generations.DamagedGeneration):
                return generations.read(layout, one)
    raise UsageError("there is no earlier generation", hint="`reconcile rollback --list` shows them")


def _taken_back(before: Generation, after: Generation, lock: Lock) -> dict[str, str]:
    """Return the recipes of the models that a rollback took out of service; the snapshot still lists them."""
    recipes = {model.id: model.recipe for model in lock.model}
    return {model: recipes[model] for model in before.entries if model in recipes and before.tree_of(model) != after.tree_of(model)}


def resume(context: NodeContext, *, lock_timeout_seconds: float = 0.0) -> tuple[str, ...]:
    """
    End the hold of earlier rollbacks, so that the next apply follows the snapshot again; return the models that were held.

    Raises:
        StoreBusy, StoreError, TrustError: as their names say.
    """
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        lock = load_lock.load_verified_lock(context).lock
        state = observe.node_state(context.layout, ledger)
        ledger.set_fact("held", None)
    return tuple(model.id for model in lock.model if plans.is_held(model, state))


# -- what may come back ----------------------------------------------------------------------------


def _refuse(target: Generation, refusals: dict[str, str]) -> None:
    if refusals:
        raise StoreError(
            f"generation {target.number} cannot serve again: {'; '.join(refusals.values())}",
            hint="`reconcile rollback --list` shows the others",
        )


def _refusals(target: Generation, lock: Lock, state: NodeState) -> dict[str, str]:
    """Return the models of *target* that may not serve again or whose bytes are not here, each with why, for people."""
    listed = {model.id: model for model in lock.model}
    found = {model: _refusal(model, entry.tree, listed.get(model), state) for model, entry in target.entries.items()}
    return {model: why for model, why in sorted(found.items()) if why}


def _refusal(model: str, tree: str, listed: LockedModel | None, state: NodeState) -> str:
    if listed is None:
        return f"the snapshot no longer lists {model}"
    if listed.state not in {"enabled", "retired", "archived"}:
        return f"the snapshot says of {model} that it is {listed.state}"
    seen = state.trees.get(listed.recipe)
    if seen is None:
        if any(other.digest == tree for other in state.trees.values()):
            return f"the snapshot lists other content of {model} now"
        here = all(name in state.archived or name in state.blobs for name in listed.blobs)
        return "" if here else f"the files of {model} are not on this node any more"
    if seen.digest != tree:
        return f"the snapshot lists other content of {model} now"
    good = {name for name, blob in state.blobs.items() if blob.verified_at is not None and not blob.damaged}
    whole = not seen.damaged and good.issuperset(seen.blobs)
    return "" if whole else f"bytes that are not verified: {model} (`reconcile verify` hashes them)"


def _restore(target: Generation, lock: Lock, state: NodeState, ports: Ports) -> None:
    """
    Bring the trees of *target* back that are not there: from cold storage, hashed.

    Raises:
        StoreError: what is there is not what served.
    """
    listed = {model.id: model for model in lock.model}
    for model, entry in target.entries.items():
        if listed[model].recipe in state.trees:
            continue
        damaged = [name for name in listed[model].blobs if not _is_in_store(name, state, ports)]
        if damaged:
            raise StoreError(f"{model} cannot be restored: {', '.join(damaged)} is damaged", hint="`reconcile apply` fetches it again")
        tree = ports.trees.assemble(listed[model].recipe, listed[model].artifact, listed[model].entrypoint)
        if tree.digest != entry.tree:
            raise StoreError(f"the snapshot lists other content of {model} than generation {target.number} has")


def _is_in_store(name: str, state: NodeState, ports: Ports) -> bool:
    """Return whether the blob *name* is in the store and good, from cold storage if it must be."""
    if name in state.blobs:
        return ports.blobs.check(name)
    try:
        ports.blobs.restore(name)
    except BlobDamaged:
        return False
    return True
