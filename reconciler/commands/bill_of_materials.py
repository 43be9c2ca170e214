"""Bills of materials: of the models whose files are on this node, and of those that a snapshot lists."""

from __future__ import annotations

from typing import Any

from reconciler.commands import documents, load_lock
from reconciler.commands import status as status_command
from reconciler.commands.context import NodeContext
from reconciler.commands.status import ModelStatus
from reconciler.core.lock import Lock, LockedModel
from reconciler.core.snapshot import Model, Snapshot
from reconciler.report import cyclonedx
from reconciler.report.cyclonedx import BomFile, BomModel


def bill_of_materials(context: NodeContext) -> dict[str, Any]:
    """
    Return the bill of materials of this node as built-in values.

    Raises:
        TrustError: the lock is not one that the network signed.
    """
    found, lock = status_command.status(context), load_lock.load_verified_lock(context).lock
    listed = {model.id: model for model in lock.model}
    held = [one for one in found.models if one.tree and one.id in listed]
    return cyclonedx.document(
        network=found.network,
        snapshot=f"{found.snapshot.version} {found.snapshot.digest}",
        lock=found.lock,
        active_digest=found.active_digest,
        models=[_model(one, listed[one.id], lock, found.node.engines) for one in held],
        now=context.clock(),
    )


def _model(one: ModelStatus, listed: LockedModel, lock: Lock, engines: dict[str, str]) -> BomModel:
    return BomModel(
        id=one.id,
        state=one.state,
        tasks=one.tasks,
        tree=one.tree or "",
        engine=listed.runtime.engine,
        engine_version=engines.get(listed.runtime.engine, ""),
        entrypoint=listed.entrypoint,
        files=tuple(
            BomFile(
                path=artifact.path,
                digest=artifact.digest,
                size=lock.blob[artifact.digest].size,
                sources=tuple(map(documents.redacted, lock.blob[artifact.digest].sources)),
            )
            for artifact in listed.artifact
        ),
    )


def of_snapshot(found: Snapshot, digest: str) -> dict[str, Any]:
    """Return the bill of materials of the models that *found*, the snapshot with this *digest*, lists; its time is the time of issue."""
    return cyclonedx.document(
        network=found.network,
        snapshot=f"{found.version} {digest}",
        lock="",
        active_digest="",
        models=[_listed(model) for model in found.models],
        now=found.issued_at,
        of_node=False,
    )


def _listed(model: Model) -> BomModel:
    return BomModel(
        id=model.id,
        state=model.state,
        tasks=model.tasks,
        tree="",
        engine=model.runtime.engine,
        engine_version=model.runtime.version,
        entrypoint=model.entrypoint,
        files=tuple(
            BomFile(path=one.path, digest=one.digest, size=one.size, sources=tuple(map(documents.redacted, one.urls)))
            for one in model.artifacts
        ),
    )
