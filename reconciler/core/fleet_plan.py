"""
What a change of the snapshot does to nodes that are described by profiles, and which rules it breaks: what CI asks before a merge.

Rules that hold here:

1. A node that is compared with a base holds what the base asks of it, tested: the plan from there is the very plan that the node will make.
   Without a base it is empty.
2. An outage is a model that serves there, stops at once, and has nothing that takes its place in the same swap: no model that replaces it,
   and no other version of its name that serves before and after.
3. A rule that is broken is a failure with a sentence; which rules are asked is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core import lifecycle, plan, rollout, units
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import ModelChange, Plan
from reconciler.core.snapshot import Runtime
from reconciler.core.state import ActiveModel, BlobSeen, Generation, NodeState, Passed, Record, TreeSeen, with_current

Rule = Literal["reject", "reject-any", "outage", "disk", "larger-than"]


class DescribedNode(Struct, frozen=True, kw_only=True):
    """A node as its profile describes it."""

    name: str  #: For people.
    facts: NodeFacts  #: What it has.
    reserve_bytes: int  #: Space that is never used.
    disk_known: bool = True  #: Whether the facts say how much disk there is.
    id: str = ""  #: Its id, from which its place in a rollout follows; empty: the profile stands for nodes in every place.
    cohorts: tuple[str, ...] = ()  #: The groups that a rollout names.


class Notice(Struct, frozen=True, kw_only=True):
    """A model, and what is to be said of it."""

    id: str  #: Model id.
    reason: str  #: What is to be said.


class NodePlan(Struct, frozen=True, kw_only=True):
    """What the change does to one node."""

    node: str  #: The name of its profile.
    plan: Plan  #: The plan that it will make.
    rejected: tuple[Notice, ...]  #: Enabled models that it cannot run, and by how much.
    outages: tuple[Notice, ...]  #: Models that stop serving there at once, with nothing in their place.
    shortage: str  #: What its disk lacks for all that is listed; empty where nothing.
    download_bytes: int  #: What it downloads.


class Failure(Struct, frozen=True, kw_only=True):
    """A rule that is broken."""

    rule: Rule  #: Which.
    text: str  #: How, in a sentence.
    node: str = ""  #: On which node; empty: on all.
    model: str = ""  #: By which model; empty: by none alone.


class SnapshotSide(Struct, frozen=True, kw_only=True):
    """One side of the comparison: the snapshot and the root of the base, or of the change."""

    version: int  #: Version of the snapshot.
    digest: str  #: SHA-256 of its payload.
    issued_at: datetime  #: When it was signed.
    expires_at: datetime  #: Until when it may be acted on.
    models: int  #: How many it lists.
    root: int  #: Version of the trust root.


class Comparison(Struct, frozen=True, kw_only=True):
    """What the change says in comparison with the base."""

    name: str  #: How the base was named.
    base: SnapshotSide | None  #: The base; null where it has no snapshot.
    added: tuple[str, ...] = ()  #: Models that the base does not list.
    removed: tuple[str, ...] = ()  #: Models that the change does not list any more.
    changed: tuple[str, ...] = ()  #: Models of which the list says something else.
    keys: tuple[str, ...] = ()  #: How who may sign changes, in sentences.
    warnings: tuple[str, ...] = ()  #: What a person should read before the merge.


class FleetPlan(Struct, frozen=True, kw_only=True):
    """What a change does to the nodes that profiles describe."""

    schema: int = 1  #: Version of this form.
    network: str  #: The network's name.
    lock: str  #: Digest of the lock.
    snapshot: SnapshotSide  #: The snapshot that the change brings.
    against: Comparison | None  #: The comparison with the base; null where none was named.
    nodes: tuple[NodePlan, ...]  #: What it does to each node.
    failures: tuple[Failure, ...]  #: The rules that it breaks.

    @property
    def changes(self) -> bool:
        """Whether any node has something to do."""
        return any(one.plan.changes for one in self.nodes)


class Rules(Struct, frozen=True, kw_only=True):
    """Which rules are asked."""

    asked: frozenset[Rule] = frozenset({"reject", "outage", "disk"})
    #: For `larger-than`: the most bytes that a node may have to download.
    most_bytes: int = 0


RULES: dict[Rule, str] = {
    "reject": "a listed model that none of the nodes can run",
    "reject-any": "a listed model that one of the nodes cannot run",
    "outage": "a model that stops serving at once with nothing in its place",
    "disk": "a node without the space for all that is listed",
    "larger-than": "a node that downloads more than SIZE, as in larger-than=50GiB",
}


def rules(texts: Iterable[str]) -> Rules:
    """
    Return the rules that *texts* name, each a list with commas; an empty one names none.

    Raises:
        ValueError: it names something else.
    """
    asked: set[Rule] = set()
    most = 0
    for word in (word.strip() for text in texts for word in text.split(",")):
        name, _, size = word.partition("=")
        found = next((rule for rule in RULES if rule == name), None)
        if word and (found is None or (found == "larger-than") != bool(size)):
            raise ValueError(f"{word!r} is no rule; rules are {', '.join(RULES)} (larger-than=50GiB)")
        if found:
            asked.add(found)
        most = units.size(size) if found == "larger-than" else most
    return Rules(asked=frozenset(asked), most_bytes=most)


# -- planning --------------------------------------------------------------------------------------


def any_node(locks: Sequence[Lock]) -> DescribedNode:
    """Return a node that has every engine of *locks*; together with ``without_needs``, one that can run every model."""
    engines = {model.runtime.engine: "1" for lock in locks for model in lock.model}
    return DescribedNode(name="any node", facts=NodeFacts(engines=engines), reserve_bytes=0, disk_known=False)


def without_needs(lock: Lock) -> Lock:
    """Return *lock* with models that need no version of an engine and no memory: what is asked then is what the list alone decides."""
    models = (replace(model, gpu_memory=0, memory=0, runtime=Runtime(engine=model.runtime.engine)) for model in lock.model)
    return replace(lock, model=tuple(models))


def diff(lock: Lock, lock_digest: str, base: Lock | None, node: DescribedNode, *, now: datetime) -> NodePlan:
    """
    Return what *lock* does on *node*, which holds what *base* asks of it; without a base, nothing.

    Where there are rollouts, the plan is that of the very node if the profile has an id; of a node of its cohorts that comes last in each
    rollout if it has cohorts; else of a node that is in every rollout. Without an id, the profile stands for nodes in every place: what the
    first or the last of them loses is an outage. Which models it cannot run is asked of all that are listed, for a rollout grows.
    """
    first = _diff(lock, lock_digest, base, node, now)
    if not (lock.rollouts or (base and base.rollouts)):
        return first
    asked, had = rollout.for_node(lock, node.id, node.cohorts), rollout.for_node(base, node.id, node.cohorts) if base else None
    own = replace(_diff(asked, lock_digest, had, node, now), rejected=first.rejected)
    if node.id:
        return own
    lost = {one.id: one for one in (*own.outages, *first.outages)}
    shown = own if node.cohorts else first
    return replace(shown, outages=tuple(lost[model] for model in sorted(lost)), shortage=first.shortage or own.shortage)


def _diff(lock: Lock, lock_digest: str, base: Lock | None, node: DescribedNode, now: datetime) -> NodePlan:
    policy = Policy(reserve_bytes=node.reserve_bytes)
    state = converged(base, node.facts, now) if base else NodeState()
    held = sum(blob.size for blob in state.blobs.values())
    facts = replace(node.facts, disk_free_bytes=max(0, node.facts.disk_free_bytes - held)) if node.disk_known else _unlimited(node.facts)
    made = plan.diff(lock, lock_digest, state, facts, policy, now=now)
    misfits = [(model, lifecycle.incompatible(model, facts)) for model in lock.model if model.state == "enabled"]
    return NodePlan(
        node=node.name,
        plan=made,
        rejected=tuple(Notice(id=model.id, reason=why) for model, why in misfits if why),
        outages=tuple(_outages(made.models)),
        shortage=made.disk.shortage or (_shortage(lock, node) if node.disk_known else ""),
        download_bytes=made.summary["download_bytes"],
    )


def _unlimited(facts: NodeFacts) -> NodeFacts:
    return replace(facts, disk_total_bytes=1 << 62, disk_free_bytes=1 << 62)


def _shortage(lock: Lock, node: DescribedNode) -> str:
    """Return what the whole disk lacks for everything that is listed for this node, were it installed anew; empty where nothing."""
    needed = sum(lock.blob[name].size for name in {name for model in lock.model if _holds(model, node.facts) for name in model.blobs})
    missing = needed + node.reserve_bytes - node.facts.disk_total_bytes
    if missing <= 0:
        return ""
    had = f"{units.human_size(node.facts.disk_total_bytes)} there, {units.human_size(node.reserve_bytes)} of it kept in reserve"
    return f"not enough space for all that is listed: {units.human_size(needed)} needed, {had}: {units.human_size(missing)} short"


def _holds(model: LockedModel, facts: NodeFacts) -> bool:
    return model.state == "enabled" and not lifecycle.incompatible(model, facts)


def _outages(changes: Sequence[ModelChange]) -> Iterator[Notice]:
    def name(change: ModelChange) -> str:
        return change.id.partition(":")[0]

    staying = {name(change) for change in changes if change.from_ == change.to == "active"}
    for change in changes:
        stops = change.from_ == "active" and change.to != "active" and not change.reason.startswith("replaced")
        if stops and name(change) not in staying:
            yield Notice(id=change.id, reason=f"it serves now, and stops at once ({change.reason})")


def converged(lock: Lock, facts: NodeFacts, now: datetime) -> NodeState:
    """Return the state of a node with *facts* that has done what *lock* asks for: what it can run is there, tested and active."""
    able = [model for model in lock.model if not lifecycle.incompatible(model, facts)]
    enabled = {model.id for model in able if model.state == "enabled"}
    known = NodeState(records={model.id: Record(id=model.id, state="active") for model in able})  # else retired ones are not looked up
    waiting = lifecycle.replacements(lock, known)
    kept = {model.id for model in able if model.state == "retired" and not waiting.get(model.id, frozenset()) & enabled}
    serving = [model for model in able if model.id in enabled | kept]
    entries = {model.id: _entry(model, _bytes(model, lock)) for model in serving}
    return NodeState(
        active=Generation(number=1, entries=with_current(entries, lock.names, waiting)),
        blobs={name: BlobSeen(size=lock.blob[name].size, verified_at=now) for model in serving for name in model.blobs},
        trees={model.recipe: _tree(model, lock) for model in serving},
        records={model.id: Record(id=model.id, state="active", recipe=model.recipe, blobs=model.blobs, since=now) for model in serving},
        passed={model.id: _passed(model, facts, now) for model in serving},
    )


def _tree(model: LockedModel, lock: Lock) -> TreeSeen:
    return TreeSeen(digest=model.recipe, recipe=model.recipe, blobs=model.blobs, bytes=_bytes(model, lock))


def _bytes(model: LockedModel, lock: Lock) -> int:
    return sum(lock.blob[name].size for name in model.blobs)


def _entry(model: LockedModel, size: int) -> ActiveModel:
    return ActiveModel(
        id=model.id,
        tasks=model.tasks,
        runtime=model.runtime,
        path=f"models/{model.id.replace(':', '/')}",
        entrypoint=model.entrypoint,
        bytes=size,
        tree=model.recipe,
    )


def _passed(model: LockedModel, facts: NodeFacts, now: datetime) -> Passed:
    engine = model.runtime.engine
    return Passed(
        tree=model.recipe,
        smoke=lifecycle.smoke_digest(model),
        engine=engine,
        engine_version=facts.engines.get(engine, ""),
        device=facts.device,
        at=now,
    )


# -- rules -----------------------------------------------------------------------------------------


def failures(nodes: Sequence[NodePlan], asked: Rules) -> tuple[Failure, ...]:
    """Return the rules of *asked* that are broken on *nodes*."""
    found = [*_rejected(nodes, asked)]
    for one in nodes:
        found += _lost(one) if "outage" in asked.asked else ()
        if "disk" in asked.asked and one.shortage:
            found.append(Failure(rule="disk", node=one.node, text=f"{one.node}: {one.shortage}"))
        if "larger-than" in asked.asked and one.download_bytes > asked.most_bytes:
            more = f"{units.human_size(one.download_bytes)}, more than {units.human_size(asked.most_bytes)}"
            found.append(Failure(rule="larger-than", node=one.node, text=f"{one.node}: it downloads {more}"))
    return tuple(found)


def _lost(one: NodePlan) -> Iterator[Failure]:
    for lost in one.outages:
        yield Failure(rule="outage", node=one.node, model=lost.id, text=f"{one.node}: {lost.id}: {lost.reason}")


def _rejected(nodes: Sequence[NodePlan], asked: Rules) -> Iterator[Failure]:
    by_model: dict[str, list[tuple[str, str]]] = {}
    for one in nodes:
        for misfit in one.rejected:
            by_model.setdefault(misfit.id, []).append((one.node, misfit.reason))
    for model, where in sorted(by_model.items()):
        if "reject-any" in asked.asked:
            yield from (Failure(rule="reject-any", node=node, model=model, text=f"{node}: {model}: {why}") for node, why in where)
        elif "reject" in asked.asked and len(where) == len(nodes):
            each = "; ".join(f"{node}: {why}" for node, why in where)
            yield Failure(rule="reject", model=model, text=f"{model} runs on none of the nodes ({each})")
