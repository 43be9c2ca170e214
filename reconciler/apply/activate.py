"""
The active set. Every change of what serves is one swap of the whole set (``swap``); nothing else touches generations.

Rules that hold here:

1. A run swaps as often as it must, and announces once (``announce``), after its last swap: first the servers that follow the active set,
   then the ``activated`` hook, and where a model was added the ``healthy`` hook, which judges a node whose servers have the new set.
2. Where the node is not healthy, the set that was announced before comes back, and is announced in the same way. Only what may not serve
   any more stays out of it.
3. What an interrupted run swapped and did not announce, the next one announces; both are one step of the history.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec import structs

from reconciler.apply import records
from reconciler.apply.run_state import RunState
from reconciler.core.errors import SmokeFailed
from reconciler.core.events import Announced, Incident, Swapped
from reconciler.core.plan import OLDER_COPY_DAMAGED
from reconciler.core.state import ActiveModel, Generation, with_current
from reconciler.ports import Ports

_NOT_WHOLE = "the active set was damaged"


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
    run = swap(run, ports, {}, [change.id for change in stops], what, rebuild=rebuild)
    for disabled in run.planned("disable"):
        run = records.settle(run, ports, disabled.id, "inactive", disabled.reason)
    for removed in run.planned("remove"):
        listed = run.models.get(removed.id)
        if listed is None or removed.reason.startswith("replaced"):
            run = records.unlist(run, ports, removed.id, removed.reason)
    return run


def rebuild(run: RunState, ports: Ports) -> RunState:
    """Leave no reader with an active set that differs from its index."""
    return swap(run, ports, {}, (), _NOT_WHOLE, rebuild=True)


def swap(
    run: RunState,
    ports: Ports,
    added: dict[str, ActiveModel],
    gone: Collection[str],
    what: str,
    *,
    replaced: Collection[str] = (),
    rebuild: bool = False,
) -> RunState:
    """
    Swap in the set with *added* and without *gone* and *replaced*, and return the run after it.

    *gone* may not serve any more; *replaced* left only for what was added. The same set is swapped in again only to *rebuild* an active
    generation that is not whole.
    """
    left = {*gone, *replaced}
    following = {model: entry for model, entry in (run.serving | added).items() if model not in left}
    following = with_current(following, run.lock.names, run.replacements)
    if following == run.serving and not (rebuild and run.rebuild):
        return run
    made = ports.generations.swap(following)
    removed = tuple(sorted(left & run.serving.keys()))
    ports.report(Swapped(generation=made.number, added=tuple(sorted(added)), removed=removed, what=what))
    stopped = (run.stopped | set(gone)) - added.keys()
    return structs.replace(run, rebuild=False, serving=following, stopped=stopped, causes=(*run.causes, what))


def announce(run: RunState, ports: Ports) -> RunState:
    """
    Tell the servers and the hooks what serves now, and return to what was announced before where the node is not healthy with it.

    A server or a hook that has not taken the set yet is told again, also where this run changed nothing.
    """
    before, current = run.announced, ports.generations.current()
    run = structs.replace(run, is_lagging=tell(ports, current))
    if current.number == before.number:
        return run
    added = sorted(model for model, entry in current.entries.items() if before.tree_of(model) != entry.tree)
    why = ports.hooks.healthy(current) if added else ""
    if why:
        return _go_back(run, ports, current, added, why)
    what = "; ".join(dict.fromkeys(run.causes)) or "swapped in by a run that was interrupted"
    report_announced(ports, before, current, what)
    return structs.replace(run, announced=current)


def tell(ports: Ports, current: Generation) -> bool:
    """Tell the servers and then the ``activated`` hook what serves now; return whether a server lags behind it (rule 1)."""
    states = ports.servers.follow(current)
    ports.hooks.activated(current)
    return any(state.generation != current.number for state in states)


def report_announced(ports: Ports, before: Generation, current: Generation, what: str) -> None:
    """Report that *current* was announced after *before*, and why; the history has it from then on."""
    added = tuple(sorted(model for model, entry in current.entries.items() if before.tree_of(model) != entry.tree))
    removed = tuple(sorted(before.entries.keys() - current.entries.keys()))
    ports.report(Announced(generation=current.number, added=added, removed=removed, what=what))


def _go_back(run: RunState, ports: Ports, current: Generation, added: list[str], why: str) -> RunState:
    """Return from *current* to what was announced before. What was *added* has failed, and is remembered for that."""
    ports.report(Incident(kind="smoke-failed", detail=f"generation {current.number} is not healthy: {why}"))
    error = SmokeFailed(f"the node was not healthy with it: {why}")
    for model in added:
        run = records.fail(run.with_fate(model, "failed"), ports, model, error, unhealthy=True)
    before = run.announced
    # What serves with the same bytes is described as the snapshot describes it now.
    entries = {model: run.serving[model] if _is_same(run, model, entry) else entry for model, entry in before.entries.items()}
    rest = {model: entry for model, entry in entries.items() if _may_return(run, model, entry)}
    rest = with_current(rest, run.lock.names, run.replacements)
    same = before.number and rest == before.entries
    back = ports.generations.reactivate(before.number) if same else ports.generations.swap(rest)
    returned = sorted(back.entries.keys() - current.entries.keys())
    ports.report(Swapped(generation=back.number, added=tuple(returned), removed=tuple(added), what="not healthy"))
    run = structs.replace(run, serving=dict(back.entries))
    for model in returned:
        run = records.settle(run.without_fate(model), ports, model, "active", run.changes[model].reason)
    run = structs.replace(run, is_lagging=tell(ports, back))
    report_announced(ports, before, back, f"went back from {current.number}: not healthy: {why}")
    return structs.replace(run, announced=back)


def _is_same(run: RunState, model: str, entry: ActiveModel) -> bool:
    return model in run.serving and run.serving[model].tree == entry.tree


def _may_return(run: RunState, model: str, entry: ActiveModel) -> bool:
    """Return whether a model that served before may serve again: the snapshot approves of it, and nothing bad is known of its bytes."""
    listed = run.models.get(model)
    if (
        listed is None
        or listed.state not in {"enabled", "retired", "archived"}
        or model in run.stopped
        or run.changes[model].op == "reject"
    ):
        return False
    if entry.tree in run.made or _is_same(run, model, entry):
        return True
    blobs = {name for tree in run.trees.values() if tree.digest == entry.tree for name in tree.blobs}
    return not run.damaged & blobs and entry.tree not in run.observed.damaged_trees
