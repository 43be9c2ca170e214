"""
``plan --node`` and ``plan --against``: what a change does to nodes that are described by profiles, and compared with a base in git.

Rules that hold here:

1. No store is read and none is made: the answer follows from the committed files, the base, the profiles and the time.
2. The change must be acceptable to a node that has accepted the base: an older snapshot, or another one of the same version, is refused
   with the error that a node would give.
3. The base is read from git, or from a file or folder. It is verified against its own root, so that a change of keys is seen.
"""

from __future__ import annotations

import subprocess
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from reconciler.commands import documents, load_lock, profiles
from reconciler.commands.context import NodeContext
from reconciler.commands.load_lock import VerifiedLock
from reconciler.core import fleet_plan, trust
from reconciler.core import lock as locks
from reconciler.core.errors import BadRootChain, LockMismatch, UsageError
from reconciler.core.fleet_plan import Comparison, FleetPlan, Rules, SnapshotSide
from reconciler.core.lock import Lock
from reconciler.core.trust import TrustRoot, TrustState, Verified

_GIT_SECONDS = 60.0


class Base(Struct, frozen=True, kw_only=True):
    """What a node that runs the base has accepted."""

    lock: Lock
    verified: Verified
    root: TrustRoot


def preview(context: NodeContext, *, files: tuple[Path, ...], against: str, rules: Rules) -> FleetPlan:
    """
    Return what the committed lock does to the nodes of the profiles in *files*, from the base *against*; without *files*, to any node.

    Raises:
        TrustError: the lock may not be acted on, or not by a node that accepted the base.
        SettingsError: a file is no profile.
        UsageError: there is no such base.
    """
    now = context.clock()
    nodes = tuple(profiles.read(path) for place in files for path in profiles.files(place))
    found = _committed(context)
    base = read_base(context, against, found.root) if against else None
    check_follows(context, found, base, now)
    lock, before = found.lock, base.lock if base else None
    if not nodes:
        nodes = (fleet_plan.any_node((lock, *([before] if before else []))),)
        lock, before = fleet_plan.without_needs(lock), fleet_plan.without_needs(before) if before else None
    made = tuple(fleet_plan.diff(lock, found.lock_digest, before, node, now=now) for node in nodes)
    return FleetPlan(
        network=found.lock.network,
        lock=found.lock_digest,
        snapshot=_side(found.lock, found.root),
        against=_compare(against, found, base) if against else None,
        nodes=made,
        failures=fleet_plan.failures(made, rules),
    )


def _committed(context: NodeContext) -> VerifiedLock:
    """Return the committed lock with the models of every rollout: a gate speaks of all nodes, and not of the one that it runs on."""
    return load_lock.verify_files(context, load_lock.read_files(context))


def check_against(context: NodeContext, against: str) -> None:
    """Check that a node that has accepted the base *against* accepts the committed lock, where there is one; raises as ``preview``."""
    try:
        found = _committed(context)
    except LockMismatch:  # `lock --check` tells of it
        return
    check_follows(context, found, read_base(context, against, found.root), context.clock())


def check_follows(context: NodeContext, found: VerifiedLock, base: Base | None, now: datetime) -> None:
    """
    Check that a node that has accepted *base* accepts *found*.

    Raises:
        TrustError: it refuses it: an older snapshot, another of the same version, an older root, or one that may not be used at *now*.
    """
    accepted = trust.advance_state(TrustState(), base.verified) if base else TrustState()
    if base and found.root.version < base.root.version:
        raise BadRootChain(
            f"the trust root is {found.root.version}, and the base has {base.root.version}: nodes never go back to an older root",
            hint="bring the newer root.json back from the base",
        )
    found.check_fresh(accepted, now=now, limits=context.limits)


# -- the base --------------------------------------------------------------------------------------


def read_base(context: NodeContext, against: str, root: TrustRoot) -> Base | None:
    """
    Return the base that *against* names: a folder, an envelope's file, or a commit in git; None where it has no snapshot.

    *root* verifies it where it has no root of its own.

    Raises:
        UsageError: there is no such base.
        TrustError: it is not a snapshot that its network signed.
    """
    envelope, own_root = _base_files(context, against)
    if envelope is None:
        return None
    with documents.named(f"the base {against}", "compare with a commit whose root.json and snapshot.json belong together", envelope):
        root = trust.pin(own_root, limits=context.limits) if own_root is not None else root
        verified = trust.open_snapshot(envelope, root, limits=context.limits)
    return Base(lock=locks.compile(verified), verified=verified, root=root)


def _base_files(context: NodeContext, against: str) -> tuple[bytes | None, bytes | None]:
    place = Path(against)
    if place.is_dir():
        return _read(place / context.envelope_path.name), _read(place / context.root_path.name)
    if place.is_file():
        return _read(place), None
    folder = context.lock_path.parent
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{against}^{{commit}}")
    if commit is None:
        raise UsageError(
            f"there is no file, folder or commit {against!r}",
            hint="fetch it first: `git fetch origin`; in CI, check out with history (fetch-depth: 0)",
        )
    name = commit.decode().strip()
    return _show(folder, name, context.envelope_path), _show(folder, name, context.root_path)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _show(folder: Path, commit: str, path: Path) -> bytes | None:
    """Return the bytes of *path* in *commit*; None where it is not there, or outside of the folder's work tree."""
    try:
        name = path.resolve().relative_to(folder.resolve())
    except ValueError:
        return None
    return _git(folder, "cat-file", "blob", f"{commit}:./{name.as_posix()}")


def _git(folder: Path, *words: str) -> bytes | None:
    """Return what git says in *folder*; None where it refuses."""
    command = ["git", "-C", str(folder), *words]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UsageError("git is not installed", hint="install git, or name the base as a file or folder") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"git did not answer within {_GIT_SECONDS:.0f} seconds") from None
    return ran.stdout if ran.returncode == 0 else None


# -- the comparison --------------------------------------------------------------------------------


def _side(lock: Lock, root: TrustRoot) -> SnapshotSide:
    header = lock.snapshot
    return SnapshotSide(
        version=header.version,
        digest=header.digest,
        issued_at=header.issued_at,
        expires_at=header.expires_at,
        models=len(lock.model),
        root=root.version,
    )


def _compare(name: str, found: VerifiedLock, base: Base | None) -> Comparison:
    if base is None:
        return Comparison(name=name, base=None, added=tuple(model.id for model in found.lock.model))
    before, after = ({model.id: model for model in lock.model} for lock in (base.lock, found.lock))
    return Comparison(
        name=name,
        base=_side(base.lock, base.root),
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(sorted(model for model in after.keys() & before.keys() if after[model] != before[model])),
        keys=_key_changes(base.root, found.root),
        warnings=_warnings(found, base),
    )


def _key_changes(before: TrustRoot, after: TrustRoot) -> tuple[str, ...]:
    said = []
    for role in ("root", "snapshot"):
        old, new = getattr(before.roles, role), getattr(after.roles, role)
        said += [f"{after.named(key, 16)} may sign {role}s" for key in sorted({*new.keyids} - {*old.keyids})]
        said += [f"{before.named(key, 16)} may no longer sign {role}s" for key in sorted({*old.keyids} - {*new.keyids})]
        if old.threshold != new.threshold:
            said.append(f"{role}s need {new.threshold} signatures, {old.threshold} before")
    return tuple(said)


def _warnings(found: VerifiedLock, base: Base) -> tuple[str, ...]:
    said = []
    if found.lock.snapshot.expires_at < base.lock.snapshot.expires_at:
        said.append("the snapshot expires earlier than that of the base")
    if found.root.version > base.root.version:
        said.append(
            f"the pinned trust root goes from {base.root.version} to {found.root.version}: "
            "compare its fingerprint with the one that the network's operator gives you"
        )
    return tuple(said)
