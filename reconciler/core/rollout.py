"""
Rollouts: which nodes of a network a model is for yet (SPEC 4); and the moment at which each of many nodes begins.

Rules that hold here:

1. A node's place is a hash of network, rollout and node id: the same for every step of a rollout, so that a wider step takes a model
   away from nobody, and another order of nodes for each rollout, so that it is not always the same nodes that go first.
2. For a node that is not in, the model is as if it were not listed, and nothing is replaced by it: what it would replace is ``enabled``
   there although the snapshot retires or archives it. What the network disabled stays disabled.
3. The lock is the same on every node. What a node makes of it follows from the lock and the node's id and cohorts alone.
4. A node without an id comes last: no place of its own can be computed for it.
5. Nodes that start together do not ask together: each begins at a moment that follows from its id, and keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from msgspec import structs

from reconciler.core.lock import Lock, LockedModel
from reconciler.core.snapshot import Rollout

PLACES = 10_000


def place(network: str, rollout: str, node: str) -> int:
    """Return the place of *node* in *rollout*, from 0 to 9,999: it is in where that is below ``per_10000``."""
    if not node:
        return PLACES - 1
    message = b"\0".join(text.encode() for text in (network, rollout, node))
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "big") % PLACES


def start_delay(node: str, span_seconds: float) -> float:
    """Return how long the node *node* waits, from 0 to below *span_seconds*; without an id, not at all."""
    if not node:
        return 0.0
    place = int.from_bytes(hashlib.sha256(b"start\0" + node.encode()).digest()[:8], "big")
    return span_seconds * place / 2**64


def is_in(network: str, name: str, rollout: Rollout, node: str, cohorts: Collection[str]) -> bool:
    """Return whether a model that *rollout* names is for *node*."""
    return place(network, name, node) < rollout.per_10000 or not set(rollout.cohorts).isdisjoint(cohorts)


def for_node(lock: Lock, node: str, cohorts: Collection[str]) -> Lock:
    """Return what *lock* asks of *node*: without the models of rollouts that it is not in."""
    left_out = {
        model
        for name, rollout in lock.rollouts.items()
        if not is_in(lock.network, name, rollout, node, cohorts)
        for model in rollout.models
    }
    listed = [model for model in lock.model if model.id not in left_out]
    if len(listed) == len(lock.model):
        return lock
    again = _enabled_again([model for model in lock.model if model.id in left_out], listed)
    models = tuple(structs.replace(model, state="enabled") if model.id in again else model for model in listed)
    needed = {name for model in models for name in model.blobs}
    blobs = {name: blob for name, blob in lock.blob.items() if name in needed}
    return structs.replace(lock, model=models, blob=blobs)


def _enabled_again(left_out: list[LockedModel], listed: list[LockedModel]) -> set[str]:
    """Return the *listed* models that count as enabled because what would replace them is *left_out*, and nothing else does."""
    awaited = {old for model in left_out for old in model.replaces}
    waiting = {model.id for model in listed if model.id in awaited and model.state in {"retired", "archived"}}
    serving = waiting | {model.id for model in listed if model.state == "enabled"}
    return {model for model in waiting if not _replacing(model, listed) & serving}


def _replacing(model: str, listed: list[LockedModel]) -> set[str]:
    """Return the *listed* models that replace *model*, directly or through a chain."""
    found: set[str] = set()
    pending = [model]
    while pending:
        old = pending.pop()
        newer = {one.id for one in listed if old in one.replaces} - found
        found |= newer
        pending += newer
    return found
