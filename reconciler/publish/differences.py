"""
What changes from one snapshot to another: in people's words first, then value by value.

Rules that hold here:

1. Each value that differs is named, whether this version knows its field or not, and no other. The order of models and artifacts is no
   difference: nodes do not see it.
2. The sentences say what nodes will do: what starts, what stops and when, what changes its content, what must be downloaded from where.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core import snapshot, trust, units
from reconciler.core.errors import WrongNetwork
from reconciler.core.snapshot import Model, Rollout, Snapshot
from reconciler.core.swarm import Swarm
from reconciler.publish import contents, envelopes
from reconciler.publish.contents import Value

#: What every change of a snapshot changes; these are told apart from the rest.
_HEADER = ("version", "issued_at", "expires_at")


class Changed(Struct, frozen=True, kw_only=True):
    """One value of a model, or of the snapshot itself (then ``id`` is empty), before and after."""

    id: str
    field: str
    before: Any
    after: Any
    #: ``add``: there was none before. ``remove``: there is none after.
    op: Literal["add", "remove", "change"] = "change"


class Difference(Struct, frozen=True, kw_only=True):
    """What changes from one snapshot to another."""

    before: int
    after: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    #: Enabled and retired models that stop serving at once, on every node.
    stopped: tuple[str, ...]
    #: What nodes will do, as sentences.
    summary: tuple[str, ...]
    #: Values of the snapshot itself, and of models that are in both; its version and times stand apart.
    changed: tuple[Changed, ...]
    #: All values of the models that are added or removed.
    listed: tuple[Changed, ...]
    issued_at: tuple[datetime, datetime]
    expires_at: tuple[datetime, datetime]


def diff(before: bytes, after: bytes) -> Difference:
    """
    Return what changed from the snapshot in *before* to the one in *after*, signed or not.

    Raises:
        TrustError: one is no snapshot, or they are of two networks.
    """
    (old, was), (new, now_is) = _read(before), _read(after)
    if old.network != new.network:
        raise WrongNetwork(f"one snapshot is for network {old.network!r}, the other for {new.network!r}")
    old_ids, new_ids = ({model.id for model in found.models} for found in (old, new))
    both = old_ids & new_ids
    every = [change for change in _changes(was, now_is) if change.id or change.field not in _HEADER]
    return Difference(
        before=old.version,
        after=new.version,
        added=tuple(sorted(new_ids - old_ids)),
        removed=tuple(sorted(old_ids - new_ids)),
        stopped=stopped_at_once(old, new),
        summary=tuple(_summary(old, new)),
        changed=tuple(change for change in every if not change.id or change.id in both),
        listed=tuple(change for change in every if change.id and change.id not in both),
        issued_at=(old.issued_at, new.issued_at),
        expires_at=(old.expires_at, new.expires_at),
    )


def _read(data: bytes) -> tuple[Snapshot, dict[str, Value]]:
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    found = snapshot.decode(document.payload)
    return found, {one.place: one for one in contents.values(document.payload, found) if one.place != "models"}


def _changes(was: dict[str, Value], now_is: dict[str, Value]) -> list[Changed]:
    """Return every value that is not the same in both, those of the snapshot itself first, then by model and field."""
    found = []
    for place in was.keys() | now_is.keys():
        old, new = was.get(place), now_is.get(place)
        if old is not None and new is not None and contents.shown(old.value) == contents.shown(new.value):  # in Python, 1 equals true
            continue
        one = new or old
        assert one
        op: Literal["add", "remove", "change"] = "add" if old is None else "remove" if new is None else "change"
        found.append(Changed(id=one.model, field=one.field, before=old and old.value, after=new and new.value, op=op))
    return sorted(found, key=lambda change: (change.id, change.field, change.op))


def stopped_at_once(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Return the models that every node stops serving as soon as it has *after* in the place of *before*: no other takes over first."""
    listed = {model.id: model for model in after.models}
    replaced = {old for model in after.models for old in model.replaces or ()}
    names = {model.name for model in after.models if model.state == "enabled"}
    gone = []
    for model in before.models:
        state = listed[model.id].state if model.id in listed else "unlisted"
        waits = state == "archived" and (model.id in replaced or model.name in names)
        if model.state in {"enabled", "retired"} and state not in {"enabled", "retired"} and not waits:
            gone.append(model.id)
    return tuple(sorted(gone))


# -- sentences -------------------------------------------------------------------------------------


def _summary(old: Snapshot, new: Snapshot) -> Iterator[str]:
    was, now_is = ({model.id: model for model in found.models} for found in (old, new))
    for name in sorted(now_is):
        model, before = now_is[name], was.get(name)
        if model.state == "enabled" and (before is None or before.state != "enabled"):
            yield f"{name} starts{_in_place_of(model)}: {_size(model)}, {', '.join(model.tasks)}, {model.runtime.engine}"
        if before is not None and _content(before) != _content(model):
            grown = _bytes(model) - _bytes(before)
            sign = "grows" if grown > 0 else "shrinks" if grown < 0 else "keeps its size"
            by = f" by {units.human_size(abs(grown))}" if grown else ""
            yield f"{name} changes its content under the same id, and {sign}{by}"
        if before is not None and model.state == "retired" != before.state:
            yield f"{name} is retired: each node serves it until what replaces it is active there"
        if before is not None and before.smoke != model.smoke:
            yield f"{name} is tested again on every node: its test job changes"
    yield from _rollout_steps(old, new)
    yield from _swarm_steps(old, new)
    yield from (f"{name} stops serving at once on every node" for name in stopped_at_once(old, new))
    if fresh := _blobs(new).keys() - _blobs(old).keys():
        yield f"nodes download at most {units.human_size(sum(_blobs(new)[name] for name in fresh))} that no model had before"
    if hosts := sorted(_hosts(new) - _hosts(old)):
        yield f"nodes may ask hosts that they did not ask before: {', '.join(hosts)}"
    if new.expires_at < old.expires_at:
        yield f"it expires earlier than the one before, at {units.rfc3339(new.expires_at)}"


def _rollout_steps(old: Snapshot, new: Snapshot) -> Iterator[str]:
    was, now_is = old.rollouts or {}, new.rollouts or {}
    for name in sorted(was.keys() | now_is.keys()):
        before, after = was.get(name), now_is.get(name)
        if before == after:
            continue
        models = ", ".join((after or before or Rollout()).models)
        if after is None:
            yield f"{models} goes to all nodes: rollout {name} ends"
            continue
        cohorts = f" and cohorts {', '.join(after.cohorts)}" if after.cohorts else ""
        earlier = f", after {before.per_10000 / 100:g} %" if before else ""
        yield f"{models} goes to {after.per_10000 / 100:g} % of nodes{cohorts} in rollout {name}{earlier}; the others keep what it replaces"


def _swarm_steps(old: Snapshot, new: Snapshot) -> Iterator[str]:
    was, now_is = old.swarm or Swarm(), new.swarm or Swarm()
    if was.torrents and not now_is.torrents:
        yield "nodes no longer fetch from each other"
    elif was.torrents != now_is.torrents or was.trackers != now_is.trackers:
        trackers = ", ".join(now_is.trackers) or "no tracker"
        yield f"nodes that permit it fetch {units.count(len(now_is.torrents), 'file')} from each other, through {trackers}"


def _in_place_of(model: Model) -> str:
    return f" in place of {', '.join(model.replaces)}" if model.replaces else ""


def _content(model: Model) -> tuple[object, ...]:
    return tuple(sorted((one.path, one.digest, one.unpack or "") for one in model.artifacts))


def _bytes(model: Model) -> int:
    return sum({one.digest: one.size for one in model.artifacts}.values())


def _size(model: Model) -> str:
    return units.human_size(_bytes(model))


def _blobs(found: Snapshot) -> dict[str, int]:
    return {one.digest: one.size for model in found.models for one in model.artifacts}


def _hosts(found: Snapshot) -> set[str]:
    urls = [url for model in found.models for one in model.artifacts for url in one.urls]
    if found.swarm:
        urls += [*found.swarm.trackers, *(url for entry in found.swarm.torrents.values() for url in entry.urls)]
    return {(urlsplit(url).hostname or "").rstrip(".") for url in (*urls, *found.sources.fallback)}
