"""
The difference between what a lock asks for and what a node has: what will be done to each model, and why.

Rules that hold here:

1. A plan is a value: printed, compared, saved to a file; it holds no handle and the same arguments give the same plan.
2. It names the lock, the generation and the snapshot that it was made against; a stale one is refused, never reinterpreted.
3. What the store lost or gained by itself (drift) is listed apart from what the snapshot changed.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

import msgspec
from msgspec import Struct

from reconciler.core import digest, lifecycle, snapshot, units
from reconciler.core.errors import StalePlan
from reconciler.core.lifecycle import Desired, Observed, Op
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.state import ActiveModel, BlobSeen, ModelState, NodeState, Passed, TreeSeen

BlobOp = Literal["fetch", "check", "restore"]


class ModelChange(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """What is done with one model, and why."""

    id: str
    op: Op
    from_: ModelState
    to: ModelState
    reason: str
    #: Bytes that are fetched for it; a blob shared by several models counts for the first.
    download_bytes: int = 0

    @property
    def changes(self) -> bool:
        """Whether anything comes of it: a model that cannot run here and is not here is no change."""
        return self.op != "keep" and not (self.op == "reject" and self.from_ == self.to)


class BlobChange(Struct, frozen=True, kw_only=True):
    """What is done with one blob: fetched, hashed again, or brought back from cold storage."""

    digest: str
    op: BlobOp
    bytes: int


class Disk(Struct, frozen=True, kw_only=True):
    """Space in bytes: what the plan needs, what is free, and what stays free whatever happens."""

    needed: int
    free: int
    reserve: int

    @property
    def short(self) -> int:
        """Return the bytes that are missing, or 0."""
        return max(0, self.needed + self.reserve - self.free) if self.needed else 0


class Plan(Struct, frozen=True, kw_only=True):
    """Everything that ``apply`` will do."""

    schema: Literal[1] = 1
    lock: str
    generation: int
    #: Digest of the snapshot that the lock was compiled from.
    snapshot: str
    changes: bool
    summary: dict[str, int]
    disk: Disk
    models: tuple[ModelChange, ...]
    blobs: tuple[BlobChange, ...]
    drift: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class PlanInput(Struct, frozen=True, kw_only=True):
    """What a plan is computed from."""

    lock: Lock
    state: NodeState
    node: NodeFacts
    policy: Policy
    now: datetime


def diff(lock: Lock, lock_digest: str, state: NodeState, node: NodeFacts, policy: Policy, *, now: datetime) -> Plan:
    """Return the plan that takes *state* to *lock* on *node* under *policy*, at *now*."""
    blobs: dict[str, BlobChange] = {}
    scene = PlanInput(lock=lock, state=state, node=node, policy=policy, now=now)
    listed = [_listed(model, scene, blobs) for model in lock.model]
    _doubt_kept_copies(listed, state, blobs)
    models = tuple(sorted([*listed, *_unlisted(lock, state, policy, now)], key=lambda change: change.id))
    disk = Disk(needed=_disk_bytes(lock, models, blobs, state), free=node.disk_free_bytes, reserve=policy.reserve_bytes)
    ordered = tuple(sorted(blobs.values(), key=lambda change: change.digest))
    return Plan(
        lock=lock_digest,
        generation=state.active.number,
        snapshot=lock.snapshot.digest,
        changes=any(change.changes for change in models) or state.unfinished or state.broken or bool(state.misdirected),
        summary=_summary(models, ordered, disk),
        disk=disk,
        models=models,
        blobs=ordered,
        drift=state.drift,
        warnings=_warnings(models, state, disk),
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


def _listed(model: LockedModel, scene: PlanInput, blobs: dict[str, BlobChange]) -> ModelChange:
    misfit = incompatible(model, scene.node)
    desired: Desired = "incompatible" if model.state == "enabled" and misfit else model.state
    observed, why = observe(model, scene)
    op = lifecycle.decide(observed, desired)
    before = _state_of(model.id, observed, scene.state)
    if op != "keep" and _left_out(model.id, scene.policy):
        if before != "active" or model.state == "enabled":
            return ModelChange(id=model.id, op="keep", from_=before, to=before, reason=lifecycle.reason("excluded"))
        op = "disable" if op == "repair" else op  # what the network takes away stops all the same; no work is done on it
    wanted = op in {"install", "repair", "retest", "enable", "restore"}
    return ModelChange(
        id=model.id,
        op=op,
        from_=before,
        to=_goal(op, model, before),
        reason=_why(op, desired, why, misfit),
        download_bytes=_add_blobs(model, scene, blobs, distrusted=observed == "failed") if wanted else 0,
    )


def _left_out(model: str, policy: Policy) -> bool:
    return model in policy.excluded or bool(policy.only and model not in policy.only)


def observe(model: LockedModel, scene: PlanInput) -> tuple[Observed, str]:
    """Return the row of the table that *model* is in, with the word of why."""
    state = scene.state
    tree = state.trees.get(model.recipe)
    active = state.active.tree_of(model.id)
    record = state.records.get(model.id)
    said = record.state if record is not None and record.recipe == model.recipe else None
    if active is not None and (tree is None or tree.digest != active):
        return _without_its_tree(said, known=record is not None)
    if tree is not None and _is_damaged(model, tree, scene):
        forgotten = model.state == "archived" and active is None and record is None  # it was removed; a kept generation holds its tree
        return ("absent", "not-installed") if forgotten else ("damaged", "damaged")
    if said == "failed" and (active is None or model.state != "disabled"):  # a run that was cut short let it serve: that ends first
        return "failed", "failed-before"
    if tree is None or (said == "archived" and active is None):  # a tree that is there then is another model's with the same files
        return _without_tree(model, scene, said)
    doubt = _doubt(model, scene)
    if active is not None:
        doubt = doubt or _misdescribed(model, tree, state.active.entries[model.id])
        return ("due", doubt) if doubt else ("active", "up-to-date")
    settled = said == "inactive" and model.state != "enabled"  # nobody is served by it: its test can wait until it is enabled
    return ("pending", doubt) if doubt and not settled else ("inactive", "up-to-date")


def _without_its_tree(said: ModelState | None, *, known: bool) -> tuple[Observed, str]:
    """Return the row of a model that is active with another tree than the listed one, or whose listed tree is gone."""
    if said == "failed":
        return "outdated", "failed-before"
    if said == "active":
        return "damaged", "damaged"
    if said is not None:  # its new content is here and could not be tested yet
        return "outdated", "not-tested"
    return "outdated", "content-changed" if known else "unverified"


def _is_damaged(model: LockedModel, tree: TreeSeen, scene: PlanInput) -> bool:
    """
    Return whether a copy is not intact.

    On its way to cold storage a copy comes apart: its blobs move one by one, then its tree goes. What has arrived is not lost.
    """
    state = scene.state
    if model.state == "archived" and model.id not in state.active.entries:
        return any(_damaged(name, state.blobs) and _damaged(name, state.archived) for name in model.blobs)
    return tree.damaged or any(_damaged(name, state.blobs) for name in (*tree.blobs, *model.blobs))


def _misdescribed(model: LockedModel, tree: TreeSeen, entry: ActiveModel) -> str:
    """Return why the index must be written anew for an active model: the snapshot says other things of it, or the file was changed."""
    said = (entry.tasks, entry.runtime, entry.entrypoint, entry.bytes)
    return "" if said == (model.tasks, model.runtime, model.entrypoint, tree.bytes) else "index-changed"


def _without_tree(model: LockedModel, scene: PlanInput, said: ModelState | None) -> tuple[Observed, str]:
    needed, state = model.blobs, scene.state
    cold = said == "archived" or any(name in state.archived for name in needed)
    if cold and all(name in state.archived or name in state.blobs for name in needed):
        if model.state == "archived" and _left_behind(model, scene):
            return "inactive", "up-to-date"
        return "archived", "listed-again"
    if model.state == "disabled" and not any(_damaged(name, state.blobs) for name in needed):  # the ledger was lost, or others share it all
        return ("inactive", "up-to-date") if said == "inactive" else ("pending", "not-tested")
    return "absent", "not-installed"


def _left_behind(model: LockedModel, scene: PlanInput) -> bool:
    """Return whether a blob of an archived model never reached cold storage, and nobody else holds it back any more."""
    state = scene.state
    here = {name for name in model.blobs if name in state.blobs and name not in state.archived}
    return bool(here) and not here <= blobs_still_needed(scene.lock, state.trees, state.active.entries)


def blobs_still_needed(lock: Lock, trees: dict[str, TreeSeen], active: dict[str, ActiveModel]) -> set[str]:
    """Return the blobs that no archived model takes along: what others are made of, members of archives too, and what serves."""
    others = [model for model in lock.model if model.state != "archived"]
    listed = {model.id for model in lock.model}  # what is not listed has stopped serving before anything moves
    recipes, serving = {model.recipe for model in others}, {entry.tree for entry in active.values() if entry.id in listed}
    found = {name for tree in trees.values() if tree.recipe in recipes or tree.digest in serving for name in tree.blobs}
    return found.union(*(model.blobs for model in others))


def _damaged(name: str, blobs: dict[str, BlobSeen]) -> bool:
    seen = blobs.get(name)
    return seen is None or seen.damaged


def _doubt(model: LockedModel, scene: PlanInput) -> str:
    """Return why *model*, whose tree is there, must be tested again; empty if its last test is still good."""
    state = scene.state
    tree = state.trees[model.recipe]
    seen = [state.blobs.get(name) for name in (*tree.blobs, *model.blobs)]  # archives too
    if any(blob is None or blob.verified_at is None for blob in seen):
        return "unverified"
    passed = state.passed.get(model.id)
    if passed is None or passed.tree != tree.digest:
        return "not-tested"
    return _stale(passed, model, scene)


def _stale(passed: Passed, model: LockedModel, scene: PlanInput) -> str:
    node = scene.node
    if passed.smoke != smoke_digest(model):
        return "test-changed"
    if (passed.engine, passed.engine_version) != (model.runtime.engine, node.engines.get(model.runtime.engine)):
        return "runtime-changed"
    if passed.device != node.device:
        return "device-changed"
    after = scene.lock.retest_after
    if after and scene.now >= passed.at + timedelta(seconds=units.seconds(after)):
        return "retest-due"
    return ""


def smoke_digest(model: LockedModel) -> str:
    """Return the digest of *model*'s test job and of what it may ask of the device: another one calls for a new test."""
    return digest.of(msgspec.json.encode((model.smoke, model.entrypoint, model.gpu_memory)))


def incompatible(model: LockedModel, node: NodeFacts) -> str:
    """Return why *node* cannot run *model*, and by how much; empty if it can."""
    version = node.engines.get(model.runtime.engine)
    if version is None:
        extra = f"; pip install 'reconciler[{model.runtime.engine}]'" if model.runtime.engine == "llama-cpp" else ""
        return f"engine {model.runtime.engine} is not installed{extra}"
    if model.runtime.version and not _satisfies(version, model.runtime.version):
        return f"engine {model.runtime.engine} is {version}, needs {model.runtime.version}"
    if model.gpu_memory > node.gpu_bytes:
        return f"needs {units.human_size(model.gpu_memory)} of GPU memory, the largest GPU has {units.human_size(node.gpu_bytes)}"
    if model.memory > node.memory_bytes:
        return f"needs {units.human_size(model.memory)} of memory, this node has {units.human_size(node.memory_bytes)}"
    return ""


def expand_templates(templates: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the URLs that fallback *templates* give for the blob *name*."""
    algorithm, digits = digest.parse(name)
    return tuple(snapshot.expand(template, algorithm, digits) for template in templates)


_SATISFIED: dict[tuple[str, str], bool] = {}


def _satisfies(version: str, specifier: str) -> bool:
    """Remember answers: a thousand models ask about one version and a few specifiers."""
    if (version, specifier) not in _SATISFIED:
        from packaging.specifiers import SpecifierSet

        _SATISFIED[version, specifier] = SpecifierSet(specifier).contains(version, prereleases=True)
    return _SATISFIED[version, specifier]


def _add_blobs(model: LockedModel, scene: PlanInput, blobs: dict[str, BlobChange], *, distrusted: bool) -> int:
    """
    Add what becomes of a model's blobs to *blobs*, and return how many bytes are fetched for it.

    The blobs of a model that failed are *distrusted*, and hashed again whatever is remembered of them.
    """
    lock, state = scene.lock, scene.state
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


def _doubt_kept_copies(listed: list[ModelChange], state: NodeState, blobs: dict[str, BlobChange]) -> None:
    """Have copies hashed that may go on serving although others are wanted: an older content, a version whose successor is awaited."""
    serving = {state.active.tree_of(change.id) for change in listed if change.op in {"install", "archive"}}
    for tree in state.trees.values():
        for name in tree.blobs if tree.digest in serving else ():
            seen = state.blobs.get(name)
            if seen is not None and seen.verified_at is None and not seen.damaged and name not in blobs:
                blobs[name] = BlobChange(digest=name, op="check", bytes=seen.size)


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
            return "active" if model.state == "enabled" else "inactive"
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


_WORDS: dict[str, str] = {"disable": "disabled-by-snapshot", "archive": "archived-by-snapshot", "enable": "enabled-by-snapshot"}


def _why(op: Op, desired: Desired, word: str, misfit: str) -> str:
    if op == "reject" or desired == "incompatible":
        return lifecycle.reason("incompatible", misfit)
    if op == "keep" and desired != "enabled":
        return lifecycle.reason(f"{desired}-by-snapshot")
    if op == "remove":
        return lifecycle.reason(word)
    return lifecycle.reason(_WORDS.get(op, word))


# -- unlisted models -------------------------------------------------------------------------------


def _unlisted(lock: Lock, state: NodeState, policy: Policy, now: datetime) -> list[ModelChange]:
    listed = {model.id for model in lock.model}
    known = {*state.records, *state.active.entries} - listed
    return [_leaving(model, state, policy, now) for model in sorted(known)]


def _leaving(model: str, state: NodeState, policy: Policy, now: datetime) -> ModelChange:
    """Return what is done with an unlisted model: it stops being active at once, its bytes go after the grace."""
    record = state.records.get(model)
    before: ModelState = "active" if model in state.active.entries else record.state if record else "absent"
    if before == "active" and model not in state.active.entries:  # a run was cut short between its swap and the record
        before = "inactive"
    if record is None or record.unlisted_since is None or model in state.active.entries:
        stay = f"its bytes stay for {units.human_time(policy.grace_seconds)}"
        return ModelChange(id=model, op="remove", from_=before, to="absent", reason=f"not-listed: {stay}")
    gone = record.unlisted_since + timedelta(seconds=policy.grace_seconds)
    if now < gone:
        reason = f"not-listed: its bytes go after {units.rfc3339(gone)}"
        return ModelChange(id=model, op="keep", from_=before, to=before, reason=reason)
    return ModelChange(id=model, op="remove", from_=before, to="absent", reason="not-listed: its grace is over, its bytes go")


# -- the whole -------------------------------------------------------------------------------------


def _disk_bytes(lock: Lock, models: tuple[ModelChange, ...], blobs: dict[str, BlobChange], state: NodeState) -> int:
    """Return the bytes that come to the store. An archive counts twice: its members lie beside it, about as large as it is."""
    coming = sum(change.bytes for change in blobs.values() if change.op in {"fetch", "restore"})
    acted = {change.id for change in models if change.op in {"install", "repair", "restore"}}
    unpacked = {
        artifact.digest
        for model in lock.model
        if model.id in acted and model.recipe not in state.trees
        for artifact in model.artifact
        if artifact.unpack
    }
    return coming + sum(lock.blob[name].size for name in unpacked)


def _summary(models: tuple[ModelChange, ...], blobs: tuple[BlobChange, ...], disk: Disk) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(lifecycle.OPS, 0)
    for change in models:
        counts[change.op] += 1
    return counts | {"download_bytes": sum(change.bytes for change in blobs if change.op == "fetch"), "disk_bytes": disk.needed}


def mass_removal_warning(models: tuple[ModelChange, ...], active: int) -> str:
    """Return a warning where more than half of the *active* models leave: a valid signature can still be a mistake."""
    leaving = sum(change.from_ == "active" and change.to in {"absent", "archived"} for change in models)
    return f"this takes away {leaving} of {active} active models" if 2 * leaving > active else ""


def _warnings(models: tuple[ModelChange, ...], state: NodeState, disk: Disk) -> tuple[str, ...]:
    found = [text] if (text := mass_removal_warning(models, len(state.active.entries))) else []
    if disk.short:
        found.append(
            f"not enough space: {units.human_size(disk.needed)} needed, {units.human_size(disk.free)} free, "
            f"{units.human_size(disk.reserve)} of it kept in reserve: {units.human_size(disk.short)} short"
        )
    return tuple(found)
