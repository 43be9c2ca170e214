"""``status --format cyclonedx``: the models whose files are on this node, as a bill of materials."""

from __future__ import annotations

from typing import Any

from reconciler.commands import documents, load_lock
from reconciler.commands import status as status_command
from reconciler.commands.context import NodeContext
from reconciler.commands.status import ModelStatus
from reconciler.core.lock import Lock, LockedModel
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
