"""
The difference between what a lock asks for and what a node has: what will be done to each model, and why.

Rules that hold here:

1. A plan is a value: printed, compared, saved to a file; it holds no handle and the same arguments give the same plan.
2. It names the lock, the generation and the snapshot that it was made against; a stale one is refused, never reinterpreted.
3. What the store lost or gained by itself (drift) is listed apart from what the snapshot changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Literal

import msgspec
from msgspec import Struct

from reconciler.core import digest, lifecycle, units, urls
from reconciler.core import disk as disks
from reconciler.core.disk import Disk
from reconciler.core.errors import StalePlan
from reconciler.core.lifecycle import Desired, Observed, Op
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.state import ModelState, NodeState, with_current

BlobOp = Literal["fetch", "check", "restore"]


class ModelChange(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """What is done with one model, and why."""

    id: str  #: Model id.
    op: Op  #: What is done.
    from_: ModelState
    to: ModelState
    reason: str  #: Why; begins with a word of a closed list.
    #: Bytes that are fetched for it; a blob shared by several models counts for the first.
    download_bytes: int = 0
    #: Bytes of GPU memory that it needs, where it will be loaded; of `gpu_bytes`.
    gpu_memory: int = 0

    @property
    def changes(self) -> bool:
        """Whether anything comes of it: a model that cannot run here and is not here is no change."""
        return self.op != "keep" and not (self.op == "reject" and self.from_ == self.to)


class BlobChange(Struct, frozen=True, kw_only=True):
    """What is done with one blob: fetched, hashed again, or brought back from cold storage."""

    digest: str  #: The blob.
    op: BlobOp  #: What is done.
    bytes: int  #: Its size.


class ActiveChange(Struct, frozen=True, kw_only=True):
    """
    What is done with the set that serves before anything is fetched.

    ``stop``: *id* leaves it. ``announce``: an interrupted run swapped it, and neither servers nor hooks were told. ``rebuild``: its
    folder differs from its index and is written anew.
    """

    op: Literal["stop", "announce", "rebuild"]  #: What is done.
    reason: str  #: Why.
    id: str = ""  #: Model id, for `stop`.


class Plan(Struct, frozen=True, kw_only=True):
    """Everything that ``apply`` will do."""

    schema: Literal[1] = 1  #: Version of this form.
    lock: str  #: Digest of the lock.
    generation: int  #: The active generation that it was made for.
    #: Digest of the snapshot that the lock was compiled from.
    snapshot: str
    changes: bool  #: Whether there is anything to do.
    summary: dict[str, int]  #: How many models for each operation, and `download_bytes`, `disk_bytes`.
    disk: Disk  #: What it needs of the disk.
    models: tuple[ModelChange, ...]  #: Every model, with what is done to it.
    blobs: tuple[BlobChange, ...]  #: What is done to blobs.
    #: What is done with the active set itself, in this order, before the models.
    active: tuple[ActiveChange, ...] = ()
    drift: tuple[str, ...] = ()  #: What differs from what the last run left.
    warnings: tuple[str, ...] = ()  #: What a person should read before.
    gpu_bytes: int = 0  #: GPU memory that one model may have on this node.


def diff(lock: Lock, lock_digest: str, state: NodeState, node: NodeFacts, policy: Policy, *, now: datetime) -> Plan:
    """Return the plan that takes *state* to *lock* on *node* under *policy*, at *now*."""
    blobs: dict[str, BlobChange] = {}
    given = lifecycle.PlanInput(lock=lock, state=state, node=node, policy=policy, now=now)
    listed = [_listed(model, given, blobs) for model in lock.model]
    _mark_kept_copies_unverified(listed, state, blobs)
    models = tuple(sorted([*listed, *_unlisted(lock, state, policy, now)], key=lambda change: change.id))
    installed = {change.id for change in models if change.op in {"install", "repair", "restore"}}
    arriving = {change.digest: change.bytes for change in blobs.values() if change.op in {"fetch", "restore"}}
    disk = disks.need(lock, state, node, policy, installed, arriving)
    active = tuple(_active_changes(models, given))
    ordered = tuple(sorted(blobs.values(), key=lambda change: change.digest))
    return Plan(
        lock=lock_digest,
        generation=state.active.number,
        snapshot=lock.snapshot.digest,
        changes=any(change.changes for change in models) or bool(blobs) or state.unfinished or bool(active),
        summary=_summary(models, ordered, disk),
        disk=disk,
        models=models,
        blobs=ordered,
        active=active,
        drift=state.drift,
        warnings=_warnings(models, state, disk),
        gpu_bytes=node.gpu_bytes,
    )


def encode(plan: Plan) -> bytes:
    """Return *plan* as one JSON document."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def decode(data: bytes) -> Plan:
    """
    Return a saved plan.

    Raises:
        StalePlan: not a plan of this version.
    """
    try:
        return msgspec.json.decode(data, type=Plan)
    except msgspec.DecodeError as error:
        raise StalePlan(f"not a saved plan: {error}") from None


def excluded_models(saved: Plan) -> tuple[str, ...]:
    """Return the models that *saved* says nothing is done with because they were excluded, or others were chosen."""
    word = lifecycle.reason("excluded")
    return tuple(change.id for change in saved.models if change.reason == word)


def check_fresh(saved: Plan, current: Plan) -> None:
    """
    Check that *saved* is still what would be planned now.

    Raises:
        StalePlan: the lock, the generation, the snapshot or what is to be done has moved.
    """
    for what in ("lock", "generation", "snapshot", "models", "blobs"):
        if getattr(saved, what) != getattr(current, what):
            raise StalePlan(f"the saved plan's {what} is not the current one")


# -- listed models ---------------------------------------------------------------------------------


def _listed(model: LockedModel, given: lifecycle.PlanInput, blobs: dict[str, BlobChange]) -> ModelChange:
    misfit = lifecycle.incompatible(model, given.node)
    desired = lifecycle.desired(model, given, misfit)
    if desired == "replaced":
        known = model.id in given.state.records or model.id in given.state.active.entries
        if known:
            return _leaving(model.id, given.state, given.policy, given.now, "replaced")
        why = lifecycle.reason("retired-by-snapshot", "it is not installed anew")
        return ModelChange(id=model.id, op="keep", from_="absent", to="absent", reason=why)
    observed, why = lifecycle.classify(model, given)
    op = lifecycle.decide(observed, desired)
    before = _state_of(model.id, observed, given.state)
    if op != "keep" and _left_out(model.id, given.policy):
        if before != "active" or model.serves:
            return ModelChange(id=model.id, op="keep", from_=before, to=before, reason=lifecycle.reason("excluded"))
        op = "disable" if op == "repair" else op  # what the snapshot removes stops all the same; no work is done on it
    if op in WORK and is_held(model, given.state):
        return ModelChange(id=model.id, op="keep", from_=before, to=before, reason=lifecycle.reason("held"))
    if op in WORK and model.id in given.paused:
        why = lifecycle.reason("failed-before", given.paused[model.id])
        return ModelChange(id=model.id, op="keep", from_=before, to=before, reason=why)
    wanted = op in WORK
    not_understood = op == "keep" and misfit and model.unknown_words
    return ModelChange(
        id=model.id,
        op=op,
        from_=before,
        to=_goal(op, model, before),
        reason=_why(op, "incompatible" if not_understood else desired, why, misfit or _awaited(model, given)),
        download_bytes=_add_blobs(model, given, blobs, distrusted=observed == "failed") if wanted else 0,
        gpu_memory=model.gpu_memory if wanted else 0,
    )


def is_held(model: LockedModel, state: NodeState) -> bool:
    """Return whether a rollback took back this very content of *model*: it is not brought again until a person resumes (SPEC 8)."""
    return state.held.get(model.id) == model.recipe and model.id not in state.active.entries


def _left_out(model: str, policy: Policy) -> bool:
    return model in policy.excluded or bool(policy.only and model not in policy.only)


def expand_templates(templates: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the URLs that fallback *templates* give for the blob *name*."""
    algorithm, digits = digest.parse(name)
    return tuple(urls.expand(template, algorithm, digits) for template in templates)


def _add_blobs(model: LockedModel, given: lifecycle.PlanInput, blobs: dict[str, BlobChange], *, distrusted: bool) -> int:
    """
    Add what becomes of a model's blobs to *blobs*, and return how many bytes are fetched for it.

    The blobs of a model that failed are *distrusted*, and hashed again whatever is remembered of them.
    """
    lock, state = given.lock, given.state
    tree = state.trees.get(model.recipe)
    fetched = 0
    for name in {*model.blobs, *(tree.blobs if tree else ())}:
        if name in blobs:
            continue
        seen = state.blobs.get(name)
        if name in lock.blob and (seen is None or seen.damaged):
            op: BlobOp = "restore" if name in state.archived and not state.archived[name].damaged else "fetch"
            blobs[name] = BlobChange(digest=name, op=op, bytes=lock.blob[name].size)
            fetched += lock.blob[name].size if op == "fetch" else 0
        elif seen is not None and (distrusted or seen.verified_at is None):
            blobs[name] = BlobChange(digest=name, op="check", bytes=seen.size)
    return fetched


def _mark_kept_copies_unverified(listed: list[ModelChange], state: NodeState, blobs: dict[str, BlobChange]) -> None:
    """Have copies hashed that serve on without work: an older content, a version that awaits its successor, what cannot run here now."""
    serving = {state.active.tree_of(change.id) for change in listed if change.op in {"install", "archive"} or _is_left_serving(change)}
    for tree in state.trees.values():
        for name in tree.blobs if tree.digest in serving else ():
            seen = state.blobs.get(name)
            if seen is not None and seen.verified_at is None and not seen.damaged and name not in blobs:
                blobs[name] = BlobChange(digest=name, op="check", bytes=seen.size)


def _is_left_serving(change: ModelChange) -> bool:
    """Return whether a model serves on, and something else is to be said of it than that it is up to date, or left out by a person."""
    return change.op == "keep" and change.from_ == "active" and not change.reason.startswith(("up-to-date", "excluded"))


def _state_of(model: str, observed: Observed, state: NodeState) -> ModelState:
    if model in state.active.entries:
        return "active"
    match observed:
        case "damaged":
            record = state.records.get(model)
            return record.state if record and record.state != "active" else "pending"
        case "outdated" | "due" | "active":
            return "active"
        case _:
            return observed


def _goal(op: Op, model: LockedModel, before: ModelState) -> ModelState:
    match op:
        case "install" | "retest" | "enable":
            return "active"
        case "repair" | "restore":
            return "active" if model.serves else "inactive"
        case "disable":
            return "inactive"
        case "archive":
            return "archived"
        case "remove":
            return "absent"
        case "reject":
            return "inactive" if before == "active" else before
        case "keep":
            return before


_BY_SNAPSHOT: dict[str, str] = {"disable": "disabled-by-snapshot", "archive": "archived-by-snapshot", "enable": "enabled-by-snapshot"}


def _awaited(model: LockedModel, given: lifecycle.PlanInput) -> str:
    """Return until when a retired or archived model serves, for people; empty where nothing replaces it."""
    coming = sorted(given.enabled & given.replacements.get(model.id, frozenset()))
    return f"it serves until {' or '.join(coming)} is active here" if coming else ""


def _why(op: Op, desired: Desired, word: str, detail: str) -> str:
    if op == "reject" or desired == "incompatible":
        return lifecycle.reason("incompatible", detail)
    if desired in {"retired", "standby"} and op in {"keep", "enable"}:
        serves_again = op == "enable" and desired == "standby"
        return lifecycle.reason("serves-again" if serves_again else "retired-by-snapshot", "" if desired == "standby" else detail)
    if op == "keep" and desired != "enabled":
        return lifecycle.reason(f"{desired}-by-snapshot")
    if op == "remove":
        return lifecycle.reason(word)
    return lifecycle.reason(_BY_SNAPSHOT.get(op, word))


# -- unlisted models -------------------------------------------------------------------------------


def _unlisted(lock: Lock, state: NodeState, policy: Policy, now: datetime) -> list[ModelChange]:
    listed = {model.id for model in lock.model}
    known = {*state.records, *state.active.entries} - listed
    return [_leaving(model, state, policy, now, "not-listed") for model in sorted(known)]


def _leaving(model: str, state: NodeState, policy: Policy, now: datetime, word: Literal["not-listed", "replaced"]) -> ModelChange:
    """Return what is done with an unlisted or replaced model: it stops being active at once, its bytes go after the grace period."""
    record = state.records.get(model)
    before: ModelState = "active" if model in state.active.entries else record.state if record else "absent"
    if before == "active" and model not in state.active.entries:  # a run was cut short between its swap and the record
        before = "inactive"
    if record is None or record.unlisted_since is None or model in state.active.entries:
        stay = f"its bytes stay for {units.human_time(policy.grace_seconds)}"
        return ModelChange(id=model, op="remove", from_=before, to="absent", reason=f"{word}: {stay}")
    if units.age_seconds(record.unlisted_since, now) < policy.grace_seconds:
        gone = min(record.unlisted_since, now) + timedelta(seconds=policy.grace_seconds)
        reason = f"{word}: its bytes go after {units.rfc3339(gone)}"
        return ModelChange(id=model, op="keep", from_=before, to=before, reason=reason)
    return ModelChange(id=model, op="remove", from_=before, to="absent", reason=f"{word}: its grace period is over, its bytes go")


# -- the active set --------------------------------------------------------------------------------

#: Operations that fetch, make or test something.
WORK: frozenset[Op] = frozenset({"install", "repair", "retest", "enable", "restore"})
OLDER_COPY_DAMAGED = "damaged: its older copy is damaged and is not served any more"


def _active_changes(models: tuple[ModelChange, ...], given: lifecycle.PlanInput) -> Iterator[ActiveChange]:
    state = given.state
    listed, changes = {model.id: model for model in given.lock.model}, {change.id: change for change in models}
    for model in sorted(state.active.entries):
        why = _stop_reason(changes[model], listed.get(model), state)
        if why:
            yield ActiveChange(op="stop", id=model, reason=why)
    if state.announced is not None:
        yield ActiveChange(op="announce", reason="unannounced: swapped in by a run that was interrupted")
    entries = state.active.entries
    if state.active_damaged or state.misdirected:
        yield ActiveChange(op="rebuild", reason="damaged: what is active differs from its index")
    elif with_current(entries, given.lock.names, given.replacements) != entries:
        yield ActiveChange(op="rebuild", reason="index-changed: a name leads to another version now")


def _stop_reason(change: ModelChange, listed: LockedModel | None, state: NodeState) -> str:
    """Return why an active model stops serving at once, whatever else is done with it; empty if it serves on."""
    taken = change.op in {"remove", "disable", "reject"} or (change.op in WORK and listed is not None and listed.state == "disabled")
    if taken or listed is None:
        return change.reason if taken else ""
    entry = state.active.entries[change.id]
    own = state.trees.get(listed.recipe)
    if own is not None and own.digest == entry.tree:  # what the snapshot lists is mended in its place
        return ""
    if change.id in state.misdirected:
        return "damaged: its link does not lead to its tree"
    stays = change.op == "install" or _is_left_serving(change)
    return OLDER_COPY_DAMAGED if stays and entry.tree in state.damaged_trees else ""


# -- the whole -------------------------------------------------------------------------------------


def _summary(models: tuple[ModelChange, ...], blobs: tuple[BlobChange, ...], disk: Disk) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(lifecycle.OPS, 0)
    for change in models:
        counts[change.op] += 1
    return counts | {"download_bytes": sum(change.bytes for change in blobs if change.op == "fetch"), "disk_bytes": disk.needed}


def mass_removal_warning(models: tuple[ModelChange, ...], active: int) -> str:
    """Return a warning where more than half of the *active* models leave: a valid signature can still be a mistake."""
    gone = [change for change in models if change.from_ == "active" and change.to in {"absent", "archived"}]
    leaving = sum(not change.reason.startswith("replaced") for change in gone)
    return f"this removes {leaving} of {active} active models" if 2 * leaving > active else ""


def _warnings(models: tuple[ModelChange, ...], state: NodeState, disk: Disk) -> tuple[str, ...]:
    found = [text] if (text := mass_removal_warning(models, len(state.active.entries))) else []
    if disk.shortage:
        found.append(disk.shortage)
    return tuple(found)
