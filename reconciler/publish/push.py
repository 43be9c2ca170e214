"""
A signed snapshot, and its models' files, in an OCI registry, so that a network needs nothing else. With the library ``oras``.

The snapshot is the layer ``snapshot.json`` of an artifact under a tag, which moves with each version; nodes read it as ``oci://…``.
Files are layers too: a registry gives each blob by its digest, so the snapshot's fallback template finds them, and none is sent twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reconciler.core.errors import PublishError
from reconciler.core.text import printable
from reconciler.publish.sources.registry import Reference

SNAPSHOT_MEDIA = "application/vnd.dsse.envelope.v1+json"
EMPTY_MEDIA = "application/vnd.oci.empty.v1+json"
FILE_MEDIA = "application/vnd.reconciler.model.file"
ARTIFACT_TYPE = "application/vnd.reconciler.snapshot.v1"
_TITLE = "org.opencontainers.image.title"


def push(reference: Reference, snapshot: Path, files: Mapping[str, Path], login: tuple[str, str] | None) -> None:
    """
    Put *snapshot* and *files*, by their titles, into the registry under the tag of *reference*; *login* is a name and a password.

    Raises:
        PublishError: the library is not installed, or the registry refuses.
    """
    try:
        import oras.oci
        from oras.provider import Registry
    except ImportError:
        raise PublishError("oci:// needs oras, which is not installed", hint="`pip install oras` installs it") from None
    try:
        insecure = reference.api.startswith("http://")
        registry = Registry(hostname=reference.registry, insecure=insecure, auth_backend=_scheme(reference))
        container = registry.get_container(f"{reference.registry}/{reference.repository}:{reference.tag}")
        if login:
            registry.auth.set_basic_auth(*login)
        manifest: dict[str, Any] = oras.oci.NewManifest()
        manifest["artifactType"] = ARTIFACT_TYPE
        for title, path, media in [
            ("snapshot.json", snapshot, SNAPSHOT_MEDIA),
            *((name, path, FILE_MEDIA) for name, path in files.items()),
        ]:
            layer = oras.oci.NewLayer(str(path), media, is_dir=False)
            layer["annotations"] = {_TITLE: title}
            manifest["layers"].append(layer)
            _check(registry.upload_blob(str(path), container, layer), title)
        with tempfile.NamedTemporaryFile() as empty:  # the specification's empty configuration: artifacts have none of their own
            empty.write(b"{}")
            empty.flush()
            manifest["config"] = oras.oci.NewLayer(empty.name, EMPTY_MEDIA, is_dir=False)
            manifest["config"].pop("annotations", None)
            _check(registry.upload_blob(empty.name, container, manifest["config"]), "the configuration")
        _check(registry.upload_manifest(manifest, container), "the manifest")
    except PublishError:
        raise
    except Exception as error:  # noqa: BLE001  the library raises what its HTTP client and its own checks raise
        raise PublishError(f"the registry {reference.registry} did not take it: {printable(str(error), 300)}") from None


def _scheme(reference: Reference) -> str:
    """Return how the registry wants to know who pushes; the library must be told."""
    import requests

    answer = requests.get(f"{reference.api.partition('/v2/')[0]}/v2/", timeout=30)
    return "basic" if answer.headers.get("WWW-Authenticate", "").lower().startswith("basic") else "token"


def _check(response: Any, what: str) -> None:
    if response.status_code not in {200, 201, 202, 204}:
        raise PublishError(f"the registry answered {response.status_code} to {printable(what, 100)}")


def template(reference: Reference) -> str:
    """Return the fallback template with which nodes find every file that was pushed."""
    return f"{reference.api}/blobs/{{algorithm}}:{{hex}}"
