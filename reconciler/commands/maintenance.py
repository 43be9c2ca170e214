"""Commands that tidy: gc, rollback, retry. Each holds the store."""

from __future__ import annotations

import contextlib
from datetime import datetime

import msgspec

from reconciler.commands import load_lock, wiring
from reconciler.commands.context import NodeContext, hold_store
from reconciler.core import plan as plans
from reconciler.core.errors import StoreError, UsageError
from reconciler.core.events import Swapped
from reconciler.core.lock import Lock
from reconciler.core.state import Generation, NodeState
from reconciler.ports import Reporter
from reconciler.store import clock, generations, observe
from reconciler.store.garbage import Garbage, GarbageCollector
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger

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


# -- rollback --------------------------------------------------------------------------------------


def rollback(context: NodeContext, report: Reporter, number: int | None = None, *, lock_timeout_seconds: float = 0.0) -> Generation:
    """
    Return to generation *number*, or to the one that served before the active one.

    Raises:
        UsageError: there is no such generation.
        StoreError: it holds a model that the current snapshot does not list as enabled, or one whose bytes are not verified; or the
            healthy hook fails with it, and the generation that served before serves again.
    """
    layout = context.layout
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        found = load_lock.load_verified_lock(context)
        before = generations.current_or_empty(layout)
        target = _rollback_target(layout, ledger, before.number, number)
        _refuse_unlisted(target, found.lock, ledger)
        state = observe.node_state(layout, ledger)
        _refuse_unverified(target, state)
        store = generations.Generations(layout)
        touched = generations.misdirected(layout, target) or generations.unexpected_entries(layout, target)
        ledger.set_running(running=True)  # a rollback that is cut short from here on is finished by the next run: hooks and history
        ledger.set_fact("held", state.held | _taken_back(before, target, found.lock))  # before the swap: no later run may undo it
        made = store.swap(target.entries) if touched else store.reactivate(target.number)
        hooks = wiring.hooks(context, report)
        brings_models = any(before.tree_of(model) != entry.tree for model, entry in made.entries.items())
        unhealthy = hooks.healthy(made) if brings_models else ""
        serving = _reactivate(store, before) if unhealthy else made
        what = f"went back from {made.number}: not healthy: {unhealthy}" if unhealthy else f"rolled back from {before.number}"
        ledger.record_change(_change(before, serving, what, found.lock_digest, context.clock()))
        if unhealthy:
            ledger.set_fact("held", state.held)
        ledger.set_running(running=state.unfinished)
        report(Swapped(generation=serving.number, what="rollback"))
        hooks.activated(serving)
    if unhealthy:
        raise StoreError(
            f"the node is not healthy with generation {made.number}: {unhealthy}",
            hint=f"generation {serving.number} serves; `reconcile history` shows the others",
        )
    return made


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


def _refuse_unlisted(target: Generation, lock: Lock, ledger: Ledger) -> None:
    """Refuse a generation with a model that the current snapshot does not list as enabled, in these very bytes."""
    recipes = {model.id: model.recipe for model in lock.model if model.serves}
    trees = {recipe: tree for recipe, (tree, _) in ledger.trees().items()}
    unlisted = [model for model, entry in target.entries.items() if trees.get(recipes.get(model, "")) != entry.tree]
    if unlisted:
        raise StoreError(
            f"generation {target.number} holds what the current snapshot does not list: {', '.join(sorted(unlisted))}",
            hint="`reconcile history` shows the others",
        )


def _refuse_unverified(target: Generation, state: NodeState) -> None:
    """Refuse a generation with a model whose files are not all there and verified as they are now."""
    good = {name for name, seen in state.blobs.items() if seen.verified_at is not None and not seen.damaged}
    trees = {tree.digest for tree in state.trees.values() if not tree.damaged and good.issuperset(tree.blobs)}
    unverified = [model for model, entry in target.entries.items() if entry.tree not in trees]
    if unverified:
        raise StoreError(
            f"generation {target.number} holds bytes that are not known to be good: {', '.join(sorted(unverified))}",
            hint="`reconcile verify` hashes them",
        )


def _reactivate(store: generations.Generations, before: Generation) -> Generation:
    """Activate *before* again, or an empty set where it was damaged and has no number."""
    return store.reactivate(before.number) if before.number else store.swap({})


def _rollback_target(layout: Layout, ledger: Ledger, current: int, number: int | None) -> Generation:
    """
    Return generation *number*; without one, the newest readable one before *current*, or of all where the active one is damaged.

    A generation that the history does not list never served: the node was not healthy with it. Where the ledger was lost, the history
    lists none, and every generation may be returned to.
    """
    found = generations.numbers(layout)
    if number is not None and number not in found:
        raise UsageError(f"there is no generation {number}", hint=f"there are: {', '.join(map(str, found)) or 'none'}")
    if number is not None:
        return generations.read(layout, number)
    served = {change.generation for change in ledger.history()}
    for one in reversed(found):
        if (current and one >= current) or (served and one > min(served) and one not in served):
            continue
        with contextlib.suppress(generations.DamagedGeneration):
            return generations.read(layout, one)
    raise UsageError("there is no earlier generation", hint="`reconcile history` shows them")


def _change(before: Generation, after: Generation, what: str, lock: str, at: datetime) -> Change:
    return Change(
        at=at,
        generation=after.number,
        actor="rollback",
        what=what,
        lock=lock,
        added=tuple(sorted(after.entries.keys() - before.entries.keys())),
        removed=tuple(sorted(before.entries.keys() - after.entries.keys())),
    )


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
        ledger.put(msgspec.structs.replace(record, state="pending", attempts=0, last_error="", reason="not-tested: asked for by a person"))
