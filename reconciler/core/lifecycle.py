"""
The state machine of a model: from what is observed and what is wanted to what is done.

Rules that hold here:

1. The table is total: every pair has an answer, and a test counts them.
2. Nothing else decides: ``classify`` finds the row of a model, ``plan`` the column, and ``apply`` does what the cell says.

The states are those of the specification (pending, active, inactive, failed, archived) and ``absent``. Rows tell apart what a state
alone does not: an active model whose listed content is another (``outdated``), whose test is no longer good (``due``), or a copy that
is damaged (``damaged``).
"""

from __future__ import annotations

import functools
from datetime import datetime, timedelta
from typing import Literal

import msgspec
from msgspec import Struct

from reconciler.core import digest, units
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.node import NodeFacts, Policy
from reconciler.core.state import ActiveModel, ModelState, NodeState, Passed, TreeSeen, is_damaged

Observed = Literal["absent", "pending", "active", "outdated", "due", "damaged", "inactive", "failed", "archived"]
#: ``retired``: it serves here and nothing that replaces it does; ``standby``: nor does it itself. A retired model that is replaced is
#: treated as an unlisted one.
#: ``unreadable``: its state is one that this version does not know, or it is disabled and has other words that it does not know.
Desired = Literal["enabled", "disabled", "archived", "unlisted", "incompatible", "retired", "standby", "unreadable"]
Op = Literal["install", "repair", "retest", "enable", "disable", "archive", "restore", "remove", "reject", "keep"]

OPS: tuple[Op, ...] = ("install", "repair", "retest", "enable", "disable", "archive", "restore", "remove", "reject", "keep")
OBSERVED: tuple[Observed, ...] = ("absent", "pending", "active", "outdated", "due", "damaged", "inactive", "failed", "archived")
DESIRED: tuple[Desired, ...] = ("enabled", "disabled", "archived", "unlisted", "incompatible", "retired", "standby", "unreadable")

#: What is done, by what is observed (rows) and what is wanted (columns, in the order of ``DESIRED``).
TABLE: dict[Observed, tuple[Op, Op, Op, Op, Op, Op, Op, Op]] = {
    #            enabled    disabled   archived   unlisted  incompatible  retired   standby   unreadable
    "absent":   ("install", "keep",    "keep",    "keep",   "reject",     "keep",   "keep",   "reject"),  # retired: never installed anew
    "pending":  ("retest",  "disable", "archive", "remove", "reject",     "retest", "retest", "reject"),
    "active":   ("keep",    "disable", "archive", "remove", "keep",       "keep",   "keep",   "reject"),  # only the network takes it away
    "outdated": ("install", "disable", "archive", "remove", "reject",     "keep",   "keep",   "reject"),
    "due":      ("retest",  "disable", "archive", "remove", "keep",       "retest", "retest", "reject"),
    "damaged":  ("repair",  "repair",  "remove",  "remove", "reject",     "repair", "remove", "reject"),
    "inactive": ("enable",  "keep",    "archive", "remove", "reject",     "enable", "enable", "reject"),
    "failed":   ("install", "keep",    "remove",  "remove", "reject",     "remove", "remove", "reject"),
    "archived": ("restore", "restore", "keep",    "remove", "reject",     "keep",   "keep",   "reject"),
}  # fmt: skip

#: The first word of every reason, and what it says to people.
REASONS = {
    "up-to-date": "nothing to do",
    "not-installed": "listed, and not installed on this node yet",
    "not-listed": "the snapshot does not list it any more",
    "content-changed": "the snapshot lists other content under this id",
    "disabled-by-snapshot": "the network disabled it",
    "enabled-by-snapshot": "the network enabled it",
    "archived-by-snapshot": "the network archived it",
    "retired-by-snapshot": "the network retired it: it serves until what replaces it is active here",
    "replaced": "what replaces it is active here",
    "serves-again": "what replaced it is not active here any more",
    "listed-again": "the network lists it again",
    "not-tested": "no test job has passed on this node",
    "test-changed": "the network asks for another test job",
    "index-changed": "the index describes it otherwise than the snapshot does",
    "runtime-changed": "the engine's version is another than when it was tested",
    "device-changed": "the device is another than when it was tested",
    "retest-due": "its last test is older than the network allows",
    "unverified": "its bytes are not verified yet, and are hashed again",
    "failed-before": "the last try failed",
    "source-failed": "no source gave its bytes on the last try",
    "damaged": "its bytes on disk have changed",
    "incompatible": "this node cannot run it",
    "held": "it was rolled back; `reconcile resume` activates it again",
    "excluded": "left out on the command line",
}


def decide(observed: Observed, desired: Desired) -> Op:
    """Return what is done with a model that is *observed* so and *desired* so."""
    return TABLE[observed][DESIRED.index(desired)]


def reason(word: str, detail: str = "") -> str:
    """Return a reason: a word of the closed list, and more for people."""
    return f"{word}: {detail or REASONS[word]}"


# -- which column a model is in --------------------------------------------------------------------


def replacements(lock: Lock, state: NodeState) -> dict[str, frozenset[str]]:
    """
    Return the listed models that replace a model, directly or through a chain, since a node may have missed versions.

    Only models that are enabled, or that the node knows, are looked up: of a long chain of retired versions it knows few.
    """
    direct: dict[str, set[str]] = {}
    for model in lock.model:
        for old in model.replaces:
            direct.setdefault(old, set()).add(model.id)
    known = {*state.records, *state.active.entries, *(model.id for model in lock.model if model.state == "enabled")}
    return {old: frozenset(_reached(direct, old)) for old in direct if old in known}


def _reached(edges: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    pending = [*edges.get(start, ())]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += edges.get(name, ())
    return found


def desired(model: LockedModel, given: PlanInput, misfit: str) -> Desired | Literal["replaced"]:
    """
    Return the column of the table that *model* is in; *misfit* says why this node cannot run it.

    ``replaced`` has none: such a model is treated as an unlisted one, and so is a retired model that the node does not know.
    """
    if model.state == "enabled":
        return "incompatible" if misfit else "enabled"
    if model.unknown_words and model.state not in {"archived", "retired"}:
        return "unreadable"
    replacing = given.replacements.get(model.id, frozenset())
    serves = model.id in given.state.active.entries
    if model.state == "archived" and replacing and serves:
        waiting: Desired = "incompatible" if model.unknown_words else "retired"
        return "archived" if replacing & given.serving else waiting
    if model.state != "retired":
        return "archived" if model.state == "archived" else "disabled"
    if replacing & given.serving or not (serves or model.id in given.state.records):
        return "replaced"
    if serves and not model.unknown_words:
        return "retired"
    return "incompatible" if misfit else "standby"


# -- which row a model is in -----------------------------------------------------------------------


class PlanInput(Struct, frozen=True, kw_only=True, dict=True):
    """What a plan is computed from, and what follows from it for every model alike."""

    lock: Lock
    state: NodeState
    node: NodeFacts
    policy: Policy
    now: datetime

    @functools.cached_property
    def replacements(self) -> dict[str, frozenset[str]]:
        """Return for each replaced model the ids of those that replace it, directly or through others."""
        return replacements(self.lock, self.state)

    @functools.cached_property
    def serving(self) -> frozenset[str]:
        """Return the active models that the lock permits to serve on."""
        return frozenset(model.id for model in self.lock.model if model.serves and model.id in self.state.active.entries)

    @functools.cached_property
    def enabled(self) -> frozenset[str]:
        """Return the models that the lock enables."""
        return frozenset(model.id for model in self.lock.model if model.state == "enabled")

    @functools.cached_property
    def paused(self) -> dict[str, str]:
        """Return the models with which the node was not healthy and that are not tried now, with why."""
        return paused(self.lock, self.state, self.now)

    @functools.cached_property
    def still_needed(self) -> set[str]:
        """Return the blobs that no archived model takes along."""
        return blobs_still_needed(self.lock, self.state.trees, self.state.active.entries)


#: A content with which the node was not healthy is tried again after this time, which doubles with each attempt up to a day.
_FIRST_PAUSE_SECONDS = 600.0
_LONGEST_PAUSE_SECONDS = 86400.0


def paused(lock: Lock, state: NodeState, now: datetime) -> dict[str, str]:
    """
    Return the models with which the node was not healthy and that are not tried *now*, with why, for people.

    Those whose pause is over are tried one in a run: of several that were added together, only one may be at fault.
    """
    recipes = {model.id: model.recipe for model in lock.model}
    waiting: dict[str, str] = {}
    over: list[tuple[datetime, str]] = []
    for record in state.records.values():
        if record.unhealthy_at is None or record.state != "failed" or recipes.get(record.id) != record.recipe:
            continue
        pause = min(_FIRST_PAUSE_SECONDS * 2.0 ** min(record.attempts - 1, 20), _LONGEST_PAUSE_SECONDS)
        again = min(record.unhealthy_at, now) + timedelta(seconds=pause)
        if again > now:
            at_once = f"or at once after `reconcile retry {record.id}`"
            waiting[record.id] = f"the node was not healthy with it; it is tried again after {units.rfc3339(again)}, {at_once}"
        else:
            over.append((again, record.id))
    others = {model: "the node was not healthy with it; it is tried again in a run of its own" for _, model in sorted(over)[1:]}
    return waiting | others


def classify(model: LockedModel, given: PlanInput) -> tuple[Observed, str]:
    """Return the row of the table that *model* is in, with the word of why."""
    state = given.state
    tree = state.trees.get(model.recipe)
    active = state.active.tree_of(model.id)
    record = state.records.get(model.id)
    recorded = record.state if record is not None and record.recipe == model.recipe else None
    unfetched = record is not None and recorded in {"absent", "pending"} and record.reason.startswith("source-failed")
    if active is not None and (tree is None or tree.digest != active):
        return ("outdated", "source-failed") if unfetched else _served_otherwise(recorded, known=record is not None)
    if tree is not None and _is_damaged(model, tree, given):
        forgotten = model.state == "archived" and active is None and record is None  # it was removed; a kept generation holds its tree
        return ("absent", "not-installed") if forgotten else ("damaged", "damaged")
    if recorded == "failed" and (active is None or model.state != "disabled"):  # a run that was cut short let it serve: that ends first
        return "failed", "failed-before"
    if tree is None or (recorded == "archived" and active is None):  # a tree that is there then is another model's with the same files
        observed, why = _without_tree(model, given, recorded)
        return observed, "source-failed" if unfetched and observed == "absent" else why
    retest = _retest_reason(model, given)
    if active is not None:
        retest = retest or _index_change(model, tree, state.active.entries[model.id])
        return ("due", retest) if retest else ("active", "up-to-date")
    settled = recorded == "inactive" and not model.serves  # nobody is served by it: its test can wait until it is enabled
    return ("pending", retest) if retest and not settled else ("inactive", "up-to-date")


def _served_otherwise(recorded: ModelState | None, *, known: bool) -> tuple[Observed, str]:
    """Return the row of a model that is active with another tree than the listed one, or whose listed tree is gone."""
    if recorded == "failed":
        return "outdated", "failed-before"
    if recorded == "active":
        return "damaged", "damaged"
    if recorded is not None:  # its new content is here and could not be tested yet
        return "outdated", "not-tested"
    return "outdated", "content-changed" if known else "unverified"


def _is_damaged(model: LockedModel, tree: TreeSeen, given: PlanInput) -> bool:
    """
    Return whether a copy is not intact.

    On its way to cold storage a copy comes apart: its blobs move one by one, then its tree goes. What has arrived is not lost.
    """
    state = given.state
    if model.state == "archived" and model.id not in state.active.entries:
        return any(is_damaged(name, state.blobs) and is_damaged(name, state.archived) for name in model.blobs)
    return tree.damaged or any(is_damaged(name, state.blobs) for name in (*tree.blobs, *model.blobs))


def _index_change(model: LockedModel, tree: TreeSeen, entry: ActiveModel) -> str:
    """Return why the index must be written anew for an active model: the snapshot says other things of it, or the file was changed."""
    described = (entry.tasks, entry.runtime, entry.entrypoint, entry.bytes)
    return "" if described == (model.tasks, model.runtime, model.entrypoint, tree.bytes) else "index-changed"


def _without_tree(model: LockedModel, given: PlanInput, recorded: ModelState | None) -> tuple[Observed, str]:
    needed, state = model.blobs, given.state
    cold = recorded == "archived" or any(name in state.archived for name in needed)
    if cold and all(name in state.archived or name in state.blobs for name in needed):
        if model.state == "archived" and _is_partly_archived(model, given):
            return "inactive", "up-to-date"
        return "archived", "listed-again"
    whole = not any(is_damaged(name, state.blobs) for name in needed)
    if model.state == "disabled" and whole:  # the ledger was lost, or others share it all
        return ("inactive", "up-to-date") if recorded == "inactive" else ("pending", "not-tested")
    return "absent", "not-installed"


def _is_partly_archived(model: LockedModel, given: PlanInput) -> bool:
    """Return whether a blob of an archived model never reached cold storage, and nobody else holds it back any more."""
    state = given.state
    here = {name for name in model.blobs if name in state.blobs and name not in state.archived}
    return bool(here) and not here <= given.still_needed


def blobs_still_needed(lock: Lock, trees: dict[str, TreeSeen], active: dict[str, ActiveModel]) -> set[str]:
    """Return the blobs that no archived model takes along: what others are made of, members of archives too, and what serves."""
    others = [model for model in lock.model if model.state != "archived"]
    listed = {model.id for model in lock.model}  # what is not listed has stopped serving before anything moves
    recipes, serving = {model.recipe for model in others}, {entry.tree for entry in active.values() if entry.id in listed}
    found = {name for tree in trees.values() if tree.recipe in recipes or tree.digest in serving for name in tree.blobs}
    return found.union(*(model.blobs for model in others))


def _retest_reason(model: LockedModel, given: PlanInput) -> str:
    """Return why *model*, whose tree is there, must be tested again; empty if its last test is still good."""
    state = given.state
    tree = state.trees[model.recipe]
    seen = [state.blobs.get(name) for name in (*tree.blobs, *model.blobs)]  # archives too
    if any(blob is None or blob.verified_at is None for blob in seen):
        return "unverified"
    passed = state.passed.get(model.id)
    found = "not-tested" if passed is None or passed.tree != tree.digest else _outdated_pass(passed, model, given)
    return found if found and same_content_pass(model, tree.digest, given) is None else ""


def same_content_pass(model: LockedModel, tree: str, given: PlanInput) -> Passed | None:
    """Return a pass that is still good, of the same *tree* with the same test job as *model*'s, or None; its model may have another id."""
    passed = given.state.newest_passes.get((tree, smoke_digest(model)))
    return passed if passed is not None and not _outdated_pass(passed, model, given) else None


def _outdated_pass(passed: Passed, model: LockedModel, given: PlanInput) -> str:
    node = given.node
    if passed.smoke != smoke_digest(model):
        return "test-changed"
    if (passed.engine, passed.engine_version) != (model.runtime.engine, node.engines.get(model.runtime.engine)):
        return "runtime-changed"
    if passed.device != node.device:
        return "device-changed"
    after = given.lock.retest_after
    if after and units.age_seconds(passed.at, given.now) >= units.seconds(after):
        return "retest-due"
    return ""


def smoke_digest(model: LockedModel) -> str:
    """Return the digest of *model*'s test job and of what it loads and asks of the device: another one calls for a new test."""
    job = (model.smoke, model.entrypoint, model.gpu_memory)
    roles = model.roles and {path: role for path, role in model.file_roles.items() if (path, role) != (model.entrypoint, "model")}
    return digest.of(msgspec.json.encode((*job, roles) if roles else job))  # without roles as it was before there were any


def incompatible(model: LockedModel, node: NodeFacts) -> str:
    """Return why *node* cannot run *model*, and by how much; empty if it can."""
    if words := model.unknown_words:
        return f"needs-newer: this version of reconcile does not know {', '.join(words)}"
    version = node.engines.get(model.runtime.engine)
    if version is None:
        extra = "; pip install llama-cpp-python" if model.runtime.engine == "llama-cpp" else ""
        return f"engine {model.runtime.engine} is not installed{extra}"
    if model.runtime.version and not _satisfies(version, model.runtime.version):
        return f"engine {model.runtime.engine} is {version}, needs {model.runtime.version}"
    if model.gpu_memory > node.gpu_bytes:
        return f"needs {units.human_size(model.gpu_memory)} of GPU memory, {node.gpu_bytes_in_words}{_if_split(model, node)}"
    if model.memory > node.memory_bytes:
        return f"needs {units.human_size(model.memory)} of memory, this node has {units.human_size(node.memory_bytes)}"
    return ""


def _if_split(model: LockedModel, node: NodeFacts) -> str:
    """Return what the node's operator can do where *model* fits only on several GPUs; empty where it does not, or is permitted."""
    together = sum(gpu.total_bytes for gpu in node.gpus)
    if node.split or model.gpu_memory > together:
        return ""
    return f"; it fits on {len(node.gpus)} together, if the settings say [runtime.llama-cpp] split = true"


_SATISFIED: dict[tuple[str, str], bool] = {}


def _satisfies(version: str, specifier: str) -> bool:
    """Remember answers: a thousand models ask about one version and a few specifiers."""
    if (version, specifier) not in _SATISFIED:
        from packaging.specifiers import SpecifierSet

        _SATISFIED[version, specifier] = SpecifierSet(specifier).contains(version, prereleases=True)
    return _SATISFIED[version, specifier]
