"""
The active set. Every change of what serves is one swap of the whole set (``swap``); nothing else touches generations.

Where a swap adds a model, the operator's ``healthy`` hook is asked about it; where the node is not healthy with it, what served before is
swapped in again. Then the ``activated`` hook is told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec import structs

from reconciler.apply import records
from reconciler.apply.run_state import RunState
from reconciler.core import names
from reconciler.core.errors import SmokeFailed
from reconciler.core.events import Incident, Swapped
from reconciler.core.plan import OLDER_COPY_DAMAGED
from reconciler.core.state import ActiveModel, Generation
from reconciler.ports import Ports

_NOT_WHOLE = "what was active was not whole"


def stop(run: RunState, ports: Ports) -> RunState:
    """Take out of service, in one swap, what may not serve; record what the snapshot disabled or no longer lists."""
    stops = [change for change in run.plan.active if change.op == "stop"]
    for change in stops:
        if change.reason == OLDER_COPY_DAMAGED:
            ports.report(Incident(kind="blob-damaged", model=change.id, detail=change.reason.partition(": ")[2]))
    damaged = all(change.reason.startswith("damaged") for change in stops)
    what = _NOT_WHOLE if not stops else "damaged" if damaged else "removed or disabled by the snapshot"
    # What only needs its link again comes back in one swap: a reader whose paths still work must not meet a smaller set before.
    rebuild = bool(run.observed.misdirected) or not run.planned("enable")
    run, _ = swap(run, ports, {}, [change.id for change in stops], what, rebuild=rebuild)
    for disabled in run.planned("disable"):
        run = records.settle(run, ports, disabled.id, "inactive", disabled.reason)
    for removed in run.planned("remove"):
        listed = run.models.get(removed.id)
        if listed is None or removed.reason.startswith("replaced"):
            run = records.unlist(run, ports, removed.id, removed.reason)
    return run


def announce(run: RunState, ports: Ports) -> RunState:
    """
    Ask the hooks about what an interrupted run swapped in without asking.

    If the node is not healthy with it, what it took the place of serves again, and so do the models that it replaced.
    """
    announced = run.observed.announced
    if announced is None:
        return run
    added = {model for model, entry in run.serving.items() if announced.tree_of(model) != entry.tree}
    current = ports.generations.current()
    why = ports.hooks.healthy(current) if added else ""
    if not why:
        removed = announced.entries.keys() - run.serving.keys()
        _tell(ports, current, added, removed, "swapped in by a run that was interrupted")
        return run
    replaced = {change.id for change in run.planned("archive")}
    returning = {model: entry for model, entry in announced.entries.items() if model in added | replaced}
    kept = {model: entry for model, entry in run.serving.items() if model not in added}
    before = names.with_current(kept | returning, run.lock.names, run.replacements)
    return unhealthy(_go_back(run, ports, Generation(entries=before), current, set(), why), ports, added, why)


def rebuild(run: RunState, ports: Ports) -> RunState:
    """Leave no reader with an active set that differs from its index."""
    return swap(run, ports, {}, (), _NOT_WHOLE, rebuild=True)[0]


def swap(
    run: RunState,
    ports: Ports,
    added: dict[str, ActiveModel],
    gone: Collection[str],
    what: str,
    *,
    replaced: Collection[str] = (),
    rebuild: bool = False,
) -> tuple[RunState, str]:
    """
    Swap in the set with *added* and without *gone* and *replaced*; return why the node is not healthy with it, or an empty text.

    Where it is not healthy, what *replaced* names serves on: it left only for what was added. The same set is swapped in again only to
    *rebuild* an active generation that is not whole.
    """
    left = {*gone, *replaced}
    following = {model: entry for model, entry in (run.serving | added).items() if model not in left}
    following = names.with_current(following, run.lock.names, run.replacements)
    if following == run.serving and not (rebuild and run.rebuild):
        return run, ""
    before = ports.generations.current()
    made = ports.generations.swap(following)
    run = structs.replace(run, rebuild=False)
    why = ports.hooks.healthy(made) if added else ""
    if why:
        return _go_back(run, ports, before, made, set(gone), why), why
    _tell(ports, made, added, left & run.serving.keys(), what)
    return structs.replace(run, serving=following), ""


def unhealthy(run: RunState, ports: Ports, added: Iterable[str], why: str) -> RunState:
    """Record that the node was not healthy with the models that were *added*."""
    for model in sorted(added):
        run = records.fail(run.with_fate(model, "failed"), ports, model, SmokeFailed(f"the node was not healthy with it: {why}"))
    return run


def _go_back(run: RunState, ports: Ports, before: Generation, made: Generation, gone: set[str], why: str) -> RunState:
    """Return to what served before; what may not serve any more stays out of it."""
    ports.report(Incident(kind="smoke-failed", detail=f"generation {made.number} is not healthy: {why}"))
    rest = {model: entry for model, entry in before.entries.items() if model not in gone}
    rest = names.with_current(rest, run.lock.names, run.replacements)
    unchanged = before.number and rest == before.entries
    back = ports.generations.reactivate(before.number) if unchanged else ports.generations.swap(rest)
    _tell(ports, back, (), (), f"went back: not healthy: {why}")
    return structs.replace(run, serving=dict(back.entries))


def _tell(ports: Ports, made: Generation, added: Iterable[str], removed: Iterable[str], what: str) -> None:
    ports.report(Swapped(generation=made.number, added=tuple(sorted(added)), removed=tuple(sorted(removed)), what=what))
    ports.hooks.activated(made)
