"""
One run as a value: what it was given, and how far it is.

Rules that hold here:

1. A step takes this value and returns the next one; nothing else carries anything from one step to another.
2. What became of a model in this run is one value, its fate. A model without one was not worked on yet.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from msgspec import Struct, structs

from reconciler.core import lifecycle
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.plan import ModelChange, Plan
from reconciler.core.state import ActiveModel, Generation, NodeState, Record, TreeSeen

#: ``passed``: installed, tested or re-linked. ``replaced``: it left for a model that replaces it. ``failed``: the model is at fault.
#: ``refused``: the disk is. ``unfetched``: no source answered. ``untested``: this node could not run the test now. ``internal-error``:
#: this program is at fault, and the model stays as it was.
Fate = Literal["passed", "replaced", "failed", "refused", "unfetched", "untested", "internal-error"]


class RunState(Struct, frozen=True, kw_only=True):
    """A run between two of its steps."""

    plan: Plan
    lock: Lock
    observed: NodeState
    node: NodeFacts
    policy: Policy
    began: datetime
    #: Listed models, and what is planned for each model, by id.
    models: dict[str, LockedModel]
    changes: dict[str, ModelChange]
    #: For each replaced model the ids of those that replace it.
    replacements: dict[str, frozenset[str]]
    #: The set that servers and hooks were told of last.
    announced: Generation
    #: The models that serve now, by id.
    serving: dict[str, ActiveModel]
    #: Models that this run took out of service because they may not serve any more.
    stopped: frozenset[str] = frozenset()
    #: Why this run changed what serves, for people.
    causes: tuple[str, ...] = ()
    #: The active generation differs from its index: it is written anew even where the same models serve.
    rebuild: bool
    #: Trees by recipe: those that were observed, and those that this run made.
    trees: dict[str, TreeSeen]
    #: Digests of the trees that this run made, mended or found whole.
    made: frozenset[str] = frozenset()
    #: Blobs that this run hashed and found damaged.
    damaged: frozenset[str] = frozenset()
    #: A server has not taken the set that was announced: it still reads from trees of an earlier one.
    is_lagging: bool = False
    fates: dict[str, Fate] = {}
    #: What is remembered of each model, by id.
    records: dict[str, Record]

    def planned(self, *ops: str) -> list[ModelChange]:
        """Return the changes with one of *ops*, in the order of the plan."""
        return [change for change in self.plan.models if change.op in ops]

    def serves_as_listed(self, model: LockedModel, made: TreeSeen | None = None) -> bool:
        """Return whether *model* is active with the very content that the snapshot lists; *made* is its tree, where this run made it."""
        entry, tree = self.serving.get(model.id), made or self.trees.get(model.recipe)
        return entry is not None and tree is not None and tree.digest == entry.tree

    def with_fate(self, model: str, fate: Fate) -> RunState:
        """Return the run in which *model* has ended with *fate*."""
        return structs.replace(self, fates={**self.fates, model: fate})

    def without_fate(self, model: str) -> RunState:
        """Return the run in which nothing has become of *model* yet."""
        return structs.replace(self, fates={known: fate for known, fate in self.fates.items() if known != model})

    def ended(self, *fates: Fate) -> tuple[str, ...]:
        """Return the models that ended with one of *fates*, sorted."""
        return tuple(sorted(model for model, fate in self.fates.items() if fate in fates))


def start(plan: Plan, lock: Lock, observed: NodeState, node: NodeFacts, policy: Policy, *, now: datetime) -> RunState:
    """Return the run that is to carry out *plan*, before its first step."""
    return RunState(
        plan=plan,
        lock=lock,
        observed=observed,
        node=node,
        policy=policy,
        began=now,
        models={model.id: model for model in lock.model},
        changes={change.id: change for change in plan.models},
        replacements=lifecycle.replacements(lock, observed),
        announced=observed.announced or observed.active,
        serving=dict(observed.active.entries),
        rebuild=any(change.op == "rebuild" for change in plan.active),
        trees=dict(observed.trees),
        records=dict(observed.records),
    )
