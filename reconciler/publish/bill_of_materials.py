"""
A bill of materials of models: CycloneDX 1.6 (ECMA-424), with the extra ``sbom``.

Each model is a component of the type ``machine-learning-model``, its files are components of the type ``file`` within it, with their hashes
and where they come from. Two documents of one snapshot are the same but for nothing: serial number and time follow from it.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from reconciler import __version__
from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Artifact, Model, Snapshot

_HASHES = {"sha256": "SHA_256", "sha512": "SHA_512", "blake3": "BLAKE3"}


def cyclonedx(found: Snapshot, digest: str) -> str:
    """
    Return the models that *found*, the snapshot with this *digest*, lists, as a CycloneDX document in JSON.

    Raises:
        PublishError: the library is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError:
        raise PublishError("CycloneDX needs a library that is not installed", hint="pip install 'reconcile-models[sbom]'") from None
    itself = Component(name=found.network, version=str(found.version), type=ComponentType.DATA, bom_ref=f"snapshot:{digest}")
    tool = Component(name="reconcile", version=__version__, type=ComponentType.APPLICATION)
    metadata = BomMetaData(component=itself, tools=[tool], timestamp=_utc(found.issued_at))
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:reconcile:{found.network}:{digest}")
    bom = Bom(serial_number=serial, metadata=metadata, components=[_model(model) for model in found.models])
    bom.register_dependency(itself, list(bom.components))
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)
    return text


def _utc(at: datetime) -> datetime:
    return at.replace(microsecond=0)


def _model(model: Model) -> Any:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    facts = {
        "state": model.state, "engine": f"{model.runtime.engine} {model.runtime.version}".strip(), "tasks": ",".join(model.tasks),
        "gpu_memory": str(model.gpu_memory), "memory": str(model.memory), "entrypoint": model.entrypoint,
    }  # fmt: skip
    return Component(
        name=model.name,
        version=model.version,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=model.id,
        properties=[Property(name=f"reconcile:{name}", value=value) for name, value in facts.items()],
        components=[_file(model, artifact) for artifact in model.artifacts],
    )


def _file(model: Model, artifact: Artifact) -> Any:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
    from cyclonedx.model.component import Component, ComponentType

    algorithm, _, digits = artifact.digest.partition(":")
    return Component(
        name=artifact.path,
        type=ComponentType.FILE,
        bom_ref=f"{model.id}/{artifact.path}",
        hashes=[HashType(alg=HashAlgorithm[_HASHES[algorithm]], content=digits)] if algorithm in _HASHES else [],
        properties=[
            Property(name="reconcile:size", value=str(artifact.size)),
            Property(name="reconcile:role", value=artifact.role or "model"),
        ],
        external_references=[ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(url)) for url in artifact.urls],
    )
