"""What tidies: gc, rollback, retry."""

from __future__ import annotations

import contextlib

import msgspec

from reconciler.commands import load_lock, wiring
from reconciler.commands import lock as lock_command
from reconciler.commands.options import Clock, wall_clock
from reconciler.core.errors import StoreError, UsageError
from reconciler.core.state import Generation, NodeState
from reconciler.ports import Reporter, Swapped
from reconciler.settings import Settings
from reconciler.store import generations, observe
from reconciler.store.housekeeping import Garbage, StoreHousekeeping
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger

# -- gc --------------------------------------------------------------------------------------------


def garbage(settings: Settings, *, clock: Clock = wall_clock) -> tuple[Garbage, ...]:
    """Return what ``gc`` would delete, and why. Changes nothing."""
    found, layout = load_lock.load_verified_lock(settings), load_lock.store_layout(settings)
    with Ledger.reading(layout.ledger) as ledger:
        return StoreHousekeeping(layout, ledger, found.lock, settings.policy, clock).garbage()


def gc(
    settings: Settings, *, at_most: int | None = None, lock_timeout_seconds: float = 0.0, clock: Clock = wall_clock
) -> tuple[Garbage, ...]:
    """
    Delete what nobody needs, at most about *at_most* bytes of it; return what went.

    Raises:
        StoreBusy, StoreError, TrustError: as their names say.
    """
    layout = load_lock.store_layout(settings)
    with lock_command.open_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        found = load_lock.load_verified_lock(settings)
        housekeeping = StoreHousekeeping(layout, ledger, found.lock, settings.policy, clock)
        before = housekeeping.garbage()
        housekeeping.free(before, at_most=at_most)
        left = {(one.kind, one.name) for one in housekeeping.garbage()}
    return tuple(one for one in before if (one.kind, one.name) not in left)


# -- rollback --------------------------------------------------------------------------------------


def rollback(
    settings: Settings, report: Reporter, number: int | None = None, *, lock_timeout_seconds: float = 0.0, clock: Clock = wall_clock
) -> Generation:
    """
    Return to generation *number*, or to the one that served before the active one.

    Raises:
        UsageError: there is no such generation.
        StoreError: it holds a model that the current snapshot does not list as enabled: what the network took away stays away; or
            one whose bytes are not known to be good; or the operator's command says that the node is not healthy with it, and what
            served before serves again.
    """
    layout = load_lock.store_layout(settings)
    with lock_command.open_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        found = load_lock.load_verified_lock(settings)
        current = generations.current_or_empty(layout)
        target = _target(layout, ledger, current.number, number)
        enabled = {model.id: model.recipe for model in found.lock.model if model.state == "enabled"}
        trees = {recipe: tree for recipe, (tree, _) in ledger.trees().items()}
        strange = [model for model, entry in target.entries.items() if trees.get(enabled.get(model, "")) != entry.tree]
        if strange:
            raise StoreError(
                f"generation {target.number} holds what the current snapshot does not list: {', '.join(sorted(strange))}",
                hint="`reconcile history` shows the others",
            )
        state = observe.node_state(layout, ledger)
        doubtful = target.entries.keys() - _whole(state, target)
        if doubtful:
            raise StoreError(
                f"generation {target.number} holds bytes that are not known to be good: {', '.join(sorted(doubtful))}",
                hint="`reconcile verify` hashes them",
            )
        store = generations.Generations(layout)
        touched = generations.misdirected(layout, target) or generations.unexpected_entries(layout, target)
        ledger.set_running(running=True)  # cut short from here on, the next run asks and logs what is not asked and logged
        made = store.swap(target.entries) if touched else store.reactivate(target.number)
        hooks = wiring.hooks(settings, layout, report)
        comes = any(current.tree_of(model) != entry.tree for model, entry in made.entries.items())
        why = hooks.healthy(made) if comes else ""
        serving = _back(store, current) if why else made
        what = f"went back from {made.number}: not healthy: {why}" if why else f"rolled back from {current.number}"
        ledger.record_change(_change(current, serving, what, found.lock_digest, clock))
        ledger.set_running(running=state.unfinished)
        report(Swapped(generation=serving.number, what="rollback"))
        hooks.activated(serving)
    if why:
        raise StoreError(
            f"the node is not healthy with generation {made.number}: {why}",
            hint=f"generation {serving.number} serves; `reconcile history` shows the others",
        )
    return made


def _back(store: generations.Generations, before: Generation) -> Generation:
    """Let what served before serve again; nothing, where that was not whole."""
    return store.reactivate(before.number) if before.number else store.swap({})


def _whole(state: NodeState, target: Generation) -> set[str]:
    """Return the models of *target* whose files are there and were hashed as they are now."""
    good = {name for name, seen in state.blobs.items() if seen.verified_at is not None and not seen.damaged}
    trees = {tree.digest for tree in state.trees.values() if not tree.damaged and good.issuperset(tree.blobs)}
    return {model for model, entry in target.entries.items() if entry.tree in trees}


def _target(layout: Layout, ledger: Ledger, current: int, number: int | None) -> Generation:
    """
    Return generation *number*; without one, the newest whole one before *current*, or of all where what is active is damaged.

    What the history does not know never served: the node was not healthy with it. A ledger that was lost knows none, and bars none.
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


def _change(before: Generation, after: Generation, what: str, lock: str, clock: Clock) -> Change:
    return Change(
        at=clock(),
        generation=after.number,
        actor="rollback",
        what=what,
        lock=lock,
        added=tuple(sorted(after.entries.keys() - before.entries.keys())),
        removed=tuple(sorted(before.entries.keys() - after.entries.keys())),
    )


# -- retry -----------------------------------------------------------------------------------------


def retry(settings: Settings, model: str, *, lock_timeout_seconds: float = 0.0) -> None:
    """
    Forget that *model* failed, so that the next apply begins with it anew.

    Raises:
        UsageError: there is no such model, or it did not fail.
    """
    with lock_command.open_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        record = ledger.records().get(model)
        if record is None or record.state != "failed":
            failed = sorted(one.id for one in ledger.records().values() if one.state == "failed")
            raise UsageError(f"{model!r} did not fail", hint=f"failed: {', '.join(failed) or 'none'}")
        ledger.put(msgspec.structs.replace(record, state="pending", attempts=0, last_error="", reason="not-tested: asked for by a person"))
