"""What tidies: gc, rollback, retry."""

from __future__ import annotations

import contextlib

import msgspec

from reconciler.engine import confirm, network, wiring
from reconciler.engine.options import Clock, wall_clock
from reconciler.errors import StoreError, UsageError
from reconciler.ports import Reporter, Swapped
from reconciler.settings import Settings
from reconciler.state import Generation, NodeState
from reconciler.store import generations, observe
from reconciler.store.keeper import Keeper, Waste
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger

# -- gc --------------------------------------------------------------------------------------------


def waste(settings: Settings, *, clock: Clock = wall_clock) -> tuple[Waste, ...]:
    """Return what ``gc`` would delete, and why. Changes nothing."""
    found, layout = confirm.confirm(settings), confirm.layout_of(settings)
    with Ledger.reading(layout.ledger) as ledger:
        return Keeper(layout, ledger, found.lock, settings.policy, clock).waste()


def gc(
    settings: Settings, *, at_most: int | None = None, lock_timeout_seconds: float = 0.0, clock: Clock = wall_clock
) -> tuple[Waste, ...]:
    """
    Delete what nobody needs, at most about *at_most* bytes of it; return what went.

    Raises:
        StoreBusy, StoreError, TrustError: as their names say.
    """
    layout = confirm.layout_of(settings)
    with network.held_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        found = confirm.confirm(settings)
        keeper = Keeper(layout, ledger, found.lock, settings.policy, clock)
        before = keeper.waste()
        keeper.free(before, at_most=at_most)
        left = {(one.kind, one.name) for one in keeper.waste()}
    return tuple(one for one in before if (one.kind, one.name) not in left)


# -- rollback --------------------------------------------------------------------------------------


def rollback(
    settings: Settings, report: Reporter, number: int | None = None, *, lock_timeout_seconds: float = 0.0, clock: Clock = wall_clock
) -> Generation:
    """
    Return to generation *number*, or to the one before the active one.

    Raises:
        UsageError: there is no such generation.
        StoreError: it holds a model that the current snapshot does not list as enabled: what the network took away stays away; or
            one whose bytes are not known to be good.
    """
    layout = confirm.layout_of(settings)
    with network.held_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        found = confirm.confirm(settings)
        current = generations.serving(layout)
        target = _target(layout, current.number, number)
        enabled = {model.id: model.recipe for model in found.lock.model if model.state == "enabled"}
        trees = {recipe: tree for recipe, (tree, _) in ledger.trees().items()}
        strange = [model for model, entry in target.entries.items() if trees.get(enabled.get(model, "")) != entry.tree]
        if strange:
            raise StoreError(
                f"generation {target.number} holds what the current snapshot does not list: {', '.join(sorted(strange))}",
                hint="`reconcile history` shows the others",
            )
        doubtful = target.entries.keys() - _whole(observe.node_state(layout, ledger), target)
        if doubtful:
            raise StoreError(
                f"generation {target.number} holds bytes that are not known to be good: {', '.join(sorted(doubtful))}",
                hint="`reconcile verify` hashes them",
            )
        store = generations.Generations(layout)
        touched = generations.strayed(layout, target) or generations.planted(layout, target)
        made = store.swap(target.entries) if touched else store.reactivate(target.number)
        wiring.gate(settings, layout, report).activated(made)
        _log(ledger, current, made, found.lock_digest, clock)
        report(Swapped(generation=made.number, what="rollback"))
    return made


def _whole(state: NodeState, target: Generation) -> set[str]:
    """Return the models of *target* whose files are there and were hashed as they are now."""
    good = {name for name, seen in state.blobs.items() if seen.verified_at is not None and not seen.damaged}
    trees = {tree.digest for tree in state.trees.values() if not tree.damaged and good.issuperset(tree.blobs)}
    return {model for model, entry in target.entries.items() if entry.tree in trees}


def _target(layout: Layout, current: int, number: int | None) -> Generation:
    """Return generation *number*, or the newest whole one before *current*; before none, where what is active is damaged."""
    found = generations.numbers(layout)
    if number is not None and number not in found:
        raise UsageError(f"there is no generation {number}", hint=f"there are: {', '.join(map(str, found)) or 'none'}")
    if number is not None:
        return generations.read(layout, number)
    for one in reversed(found):
        with contextlib.suppress(generations.Damaged):
            if one < current or not current:
                return generations.read(layout, one)
    raise UsageError("there is no earlier generation", hint="`reconcile history` shows them")


def _log(ledger: Ledger, before: Generation, after: Generation, lock: str, clock: Clock) -> None:
    ledger.changed(
        Change(
            at=clock(),
            generation=after.number,
            actor="rollback",
            what=f"rolled back from {before.number}",
            lock=lock,
            added=tuple(sorted(after.entries.keys() - before.entries.keys())),
            removed=tuple(sorted(before.entries.keys() - after.entries.keys())),
        )
    )


# -- retry -----------------------------------------------------------------------------------------


def retry(settings: Settings, model: str, *, lock_timeout_seconds: float = 0.0) -> None:
    """
    Forget that *model* failed, so that the next apply begins with it anew.

    Raises:
        UsageError: there is no such model, or it did not fail.
    """
    with network.held_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        record = ledger.records().get(model)
        if record is None or record.state != "failed":
            failed = sorted(one.id for one in ledger.records().values() if one.state == "failed")
            raise UsageError(f"{model!r} did not fail", hint=f"failed: {', '.join(failed) or 'none'}")
        ledger.put(msgspec.structs.replace(record, state="pending", attempts=0, last_error="", reason="not-tested: asked for by a person"))

