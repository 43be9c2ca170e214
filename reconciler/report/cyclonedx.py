"""
Models of a node, or of a snapshot, as a CycloneDX bill of materials (ECMA-424, version 1.6), for inventories and searches by digest.

Rules that hold here:

1. Each model is a component of type ``machine-learning-model``; each of its files is one of type ``file`` inside it, with its digest.
2. Models are listed of which the node holds verified files, whatever their state; the state is a property.
3. The same active set of the same lock gives the same document but for its time: the serial number follows from them.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from reconciler import __version__
from reconciler.core import units

SPEC_VERSION = "1.6"
_ALGORITHMS = {"sha256": "SHA-256", "sha512": "SHA-512", "blake3": "BLAKE3"}
_NAMESPACE = uuid.UUID("7d1f5a52-7f0c-5c0e-9d3a-6d5a3f1c0b1e")


class BomFile(Struct, frozen=True, kw_only=True):
    """One artifact of a model, as it was downloaded."""

    path: str
    digest: str
    size: int
    sources: tuple[str, ...] = ()


class BomModel(Struct, frozen=True, kw_only=True):
    """One model whose files are on the node."""

    id: str
    state: str
    tasks: tuple[str, ...]
    tree: str
    engine: str
    engine_version: str
    entrypoint: str
    files: tuple[BomFile, ...]


def document(
    *, network: str, snapshot: str, lock: str, active_digest: str, models: Sequence[BomModel], now: datetime, of_node: bool = True
) -> dict[str, Any]:
    """Return the document as built-in values: of a node, or of a snapshot's list."""
    subject = {"type": "platform", "bom-ref": "node", "name": f"inference node of {network}"}
    if not of_node:
        subject = {"type": "data", "bom-ref": "snapshot", "name": f"snapshot {snapshot} of {network}"}
    serving = "active" if of_node else "enabled"
    ordered = sorted(models, key=lambda model: model.id)
    made_of = "\n".join([network, lock, active_digest, *(f"{model.id} {model.state}" for model in ordered)])
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, made_of)}",
        "version": 1,
        "metadata": {
            "timestamp": units.rfc3339(now),
            "tools": {"components": [{"type": "application", "name": "reconcile", "version": __version__}]},
            "component": subject,
            "properties": _properties({"network": network, "snapshot": snapshot, "lock": lock, "active_digest": active_digest}),
        },
        "components": [_model(model) for model in ordered],
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": [model.id for model in ordered if model.state == serving]}],
    }


def _model(model: BomModel) -> dict[str, Any]:
    name, _, version = model.id.partition(":")
    about = {field: getattr(model, field) for field in ("state", "tree", "engine", "engine_version", "entrypoint")}
    links = sorted({source for file in model.files for source in file.sources})
    return {
        "type": "machine-learning-model",
        "bom-ref": model.id,
        "name": name,
        "version": version,
        **({"externalReferences": [{"type": "distribution", "url": link} for link in links]} if links else {}),
        "components": [_file(model.id, file) for file in sorted(model.files, key=lambda file: file.path)],
        "modelCard": {"modelParameters": {"task": ", ".join(model.tasks)}},
        "properties": _properties(about),
    }


def _file(model: str, file: BomFile) -> dict[str, Any]:
    algorithm, _, digits = file.digest.partition(":")
    return {
        "type": "file",
        "bom-ref": f"{model}/{file.path}",
        "name": file.path,
        "hashes": [{"alg": _ALGORITHMS[algorithm], "content": digits}] if algorithm in _ALGORITHMS else [],
        "properties": _properties({"bytes": str(file.size)}),
    }


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": f"reconcile:{name}", "value": value} for name, value in values.items() if value]
