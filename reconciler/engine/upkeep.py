"""What tidies: verify, gc, rollback, retry."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler.engine import confirm, network, wiring
from reconciler.engine.options import Clock, wall_clock
from reconciler.errors import StoreError, UsageError
from reconciler.fetch.verify import Checked, Hashers
from reconciler.ports import Incident, Notice, Reporter, Swapped
from reconciler.settings import Settings
from reconciler.state import Generation, NodeState
from reconciler.store import generations, observe
from reconciler.store.keeper import Keeper, Waste
from reconciler.store.layout import Layout
from reconciler.store.ledger import Change, Ledger, Verification
from reconciler.store.trees import files_of, is_linked

Progress = Callable[[str, int, int], None]


class Damage(Struct, frozen=True, kw_only=True):
    """Something in the store that is not what it was."""

    kind: str
    name: str
    detail: str


class Verified(Struct, frozen=True, kw_only=True):
    """What a scrub found."""

    schema: int = 1
    checked: int
    bytes: int
    damage: tuple[Damage, ...]
    repaired: bool = False


# -- verify ----------------------------------------------------------------------------------------


def verify(
    settings: Settings,
    report: Reporter,
    progress: Progress | None = None,
    *,
    sample: float = 1.0,
    rate: int = 0,
    workers: int | None = None,
    lock_timeout_seconds: float = 0.0,
    clock: Clock = wall_clock,
) -> Verified:
    """
    Hash the store, or a *sample* of it, the longest unchecked first, and remember what was found. Never asks the network.

    What is damaged loses its standing: the next plan says ``repair``, and so does ``status``. *rate* is bytes a second, 0: no limit.

    Raises:
        TrustError: there is a lock, and it is not the network's word; one that has merely expired is.
        StoreBusy, StoreError: as their names say.
    """
    layout = confirm.layout_of(settings)
    with network.held_store(settings, timeout_seconds=lock_timeout_seconds) as ledger:
        if settings.path(settings.network.lockfile).exists():
            with network.logged_refusals(ledger, clock()):
                confirm.confirm(settings)
        else:
            report(Notice(level="warning", text="there is no lock: what the store holds is compared with the names of its blobs alone"))
        state = observe.node_state(layout, ledger)
        files = _chosen([(name, seen.size, layout.blob(name)) for name, seen in state.blobs.items()], ledger, sample)
        damage = [*_lost(layout, ledger, state), *_torn(layout, ledger), *_misled(layout, state)]
        total = 0
        with contextlib.closing(Hashers(workers)) as hashers:
            for done in hashers.check_many(files, progress, rate):
                total += done.size
                damage += _recorded(done, ledger, report, clock)
    return Verified(checked=len(files), bytes=total, damage=tuple(damage))


def _misled(layout: Layout, state: NodeState) -> Iterator[Damage]:
    """Yield what is wrong with ``active``."""
    gone = ["it is gone"] if not os.path.lexists(layout.active) and generations.numbers(layout) else []
    for text in (*gone, *(text for text in state.drift if "active" in text)):
        yield Damage(kind="active", name="active", detail=text)


def _chosen(files: list[tuple[str, int, Path]], ledger: Ledger, sample: float) -> list[tuple[str, int, Path]]:
    """Return the share of *files* that was not hashed for longest; those never hashed come first."""
    known = ledger.verifications()
    random.shuffle(files)  # among equals: a store whose blobs came together must not always begin with the same
    files.sort(key=lambda file: known[file[0]].verified_at.timestamp() if file[0] in known else 0.0)
    return files[: max(1, round(len(files) * sample))] if files else []


def _recorded(done: Checked, ledger: Ledger, report: Reporter, clock: Clock) -> list[Damage]:
    if done.ok:
        seen = Verification(size=done.size, inode=done.inode, mtime_ns=done.mtime_ns, verified_at=clock())
        ledger.verified(done.digest, seen)
        return []
    # A size that no file has marks the blob as damaged until it is replaced: the file itself stays, to be looked at.
    ledger.verified(done.digest, Verification(size=-1, inode=0, mtime_ns=0, verified_at=clock()))
    detail = done.error or f"its bytes hash to {done.found}"
    incident = Incident(kind="blob-damaged", blob=done.digest, detail=detail)
    ledger.incident(incident, clock())
    report(incident)
    return [Damage(kind="blob", name=done.digest, detail=detail)]


def _lost(layout: Layout, ledger: Ledger, state: NodeState) -> Iterator[Damage]:
    """Yield what was here, or what the active links lead to, and is gone."""
    for name in sorted(ledger.verifications().keys() - state.blobs.keys()):
        yield Damage(kind="blob", name=name, detail="it is gone")
    known = {tree for tree, _ in ledger.trees().values()}
    for tree in sorted(known | {entry.tree for entry in state.active.entries.values()}):
        if not layout.tree(tree).is_dir():
            yield Damage(kind="tree", name=tree, detail="it is gone")


def _torn(layout: Layout, ledger: Ledger) -> Iterator[Damage]:
    for tree, listing in dict(ledger.trees().values()).items():
        folder = layout.tree(tree)
        if not folder.is_dir():
            continue
        for entry in listing:
            if not is_linked(folder / entry.path, layout.blob(entry.digest)):
                yield Damage(kind="tree", name=tree, detail=f"{entry.path} is not the blob {entry.digest}")
        for extra in sorted({*files_of(folder)} - {entry.path for entry in listing}):
            yield Damage(kind="tree", name=tree, detail=f"{extra} does not belong there")


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

