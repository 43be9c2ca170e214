"""
Artifacts of an OCI registry: ``oci://REGISTRY/REPOSITORY[:TAG][@DIGEST]`` (OCI distribution and image specifications).

The manifest is read and pinned by digest, and so is each layer: its address is that of a blob, which never changes. Known are files as ORAS
pushes them, Docker's GGUF artifacts, ModelPack and ModelKits, and image layers with files (KServe's model images), which are archives.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from reconciler.core.errors import PublishError
from reconciler.core.text import printable
from reconciler.core.vocabulary import KnownUnpack
from reconciler.publish.sources.listing import Listing, SourceFile, chosen

#: Reads a document: its URL and headers to send; returns its bytes, at most ``MOST_BYTES``.
Read = Callable[[str, dict[str, str]], bytes]
#: What registries accept as a manifest (OCI distribution, "Pushing Manifests").
MOST_BYTES = 4 << 20
_FORM = re.compile(
    r"oci://([A-Za-z0-9.-]+(?::[0-9]+)?|\[[0-9a-fA-F:]+\](?::[0-9]+)?)/([a-z0-9][a-z0-9._/-]*)(?::([\w][\w.-]{0,127}))?(?:@(sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_TITLES = ("org.opencontainers.image.title", "org.cncf.model.filepath", "org.cnai.model.filepath")
#: Endings of media types, and how such a layer is unpacked; what has none of them is one file.
_ARCHIVES: tuple[tuple[str, KnownUnpack], ...] = (
    (".tar+gzip", "tar.gz"), (".tar.gzip", "tar.gz"), (".tar+zstd", "tar.zst"), (".tar.zstd", "tar.zst"), (".tar", "tar"),
)  # fmt: skip


class Reference(Struct, frozen=True, kw_only=True):
    """An artifact in a registry."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def api(self) -> str:
        """The address below which the registry answers for this repository; plain http on this machine alone."""
        host = self.registry.rpartition(":")[0] if re.search(r":[0-9]+$", self.registry) else self.registry
        scheme = "http" if host in {"localhost", "127.0.0.1", "[::1]"} else "https"
        server = "registry-1.docker.io" if self.registry == "docker.io" else self.registry
        return f"{scheme}://{server}/v2/{self.repository}"


class _Descriptor(Struct):
    digest: str
    size: int
    mediaType: str = ""  # noqa: N815  as the specification writes it
    annotations: dict[str, str] = {}
    platform: dict[str, Any] = {}


class _Document(Struct):
    mediaType: str = ""  # noqa: N815
    layers: list[_Descriptor] = []
    manifests: list[_Descriptor] = []


def parse(source: str) -> Reference:
    """
    Return what *source* names; without tag and digest, the tag ``latest``.

    Raises:
        PublishError: it is not of the form ``oci://REGISTRY/REPOSITORY[:TAG][@DIGEST]``.
    """
    found = _FORM.fullmatch(source)
    if not found:
        raise PublishError(f"{source!r} is not of the form oci://REGISTRY/REPOSITORY[:TAG][@sha256:…]")
    return Reference(registry=found[1], repository=found[2], tag=found[3] or ("" if found[4] else "latest"), digest=found[4] or "")


def list_files(source: str, read: Read, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Listing:
    """
    Return the files of the artifact *source*, each pinned by its digest.

    Raises:
        PublishError: what the registry gives is no manifest, not the one with the digest, or has no files.
        FetchError: what *read* raises.
    """
    reference = parse(source)
    digest, document = _manifest(reference, read)
    if not document.layers:
        raise PublishError(f"{source} has no files: its manifest lists no layers")
    files = {one.path: one for one in (_file(reference, layer, index) for index, layer in enumerate(document.layers))}
    if len(files) < len(document.layers):
        raise PublishError(f"{source} has two files of one name")
    paths = chosen(files, include, exclude)
    tag = f"tag {reference.tag} is pinned to " if reference.tag and not reference.digest else ""
    return Listing(files=tuple(files[path] for path in paths), notes=(f"{reference.registry}/{reference.repository}: {tag}{digest}",))


def _manifest(reference: Reference, read: Read) -> tuple[str, _Document]:
    """Return the digest of the manifest, which is read from an index where there is one, and the manifest."""
    wanted = reference.digest or reference.tag
    for _ in range(2):
        data = read(f"{reference.api}/manifests/{wanted}", {"Accept": ", ".join((*_MANIFESTS, *_INDEXES))})
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if _DIGEST.fullmatch(wanted) and digest != wanted:
            raise PublishError(f"the registry gives {digest} as {wanted}")
        try:
            document = msgspec.json.decode(data, type=_Document)
        except (msgspec.DecodeError, ValueError):
            raise PublishError(f"what {reference.registry} gives as {printable(wanted, 100)} is no manifest") from None
        if not document.manifests:
            return digest, document
        wanted = _only(document.manifests)
    raise PublishError("an index that lists an index is not followed")


def _only(manifests: list[_Descriptor]) -> str:
    """Return the digest of the one manifest of an index; attestations, which builders add, do not count."""
    found = [one for one in manifests if one.platform.get("os") != "unknown" and "reference.type" not in str(one.annotations)]
    if len(found) != 1 or not _DIGEST.fullmatch(found[0].digest):
        shown = ", ".join(f"{one.platform.get('os')}/{one.platform.get('architecture')} {one.digest[:19]}…" for one in found[:6])
        raise PublishError(f"the index has {len(found)} manifests: {printable(shown)}", hint="name one by its digest: oci://…@sha256:…")
    return found[0].digest


def _file(reference: Reference, layer: _Descriptor, index: int) -> SourceFile:
    if not _DIGEST.fullmatch(layer.digest) or layer.size < 0:
        raise PublishError(f"layer {index + 1} has no digest and size")
    unpack = next((kind for ending, kind in _ARCHIVES if layer.mediaType.endswith(ending)), None)
    title = next((layer.annotations[name] for name in _TITLES if layer.annotations.get(name)), "")
    if unpack:  # ORAS packs a folder under the folder's own name; members carry their paths
        title = f"layer-{index + 1:02d}.{unpack}"
    elif not title:
        title = f"layer-{index + 1:02d}.bin" if "gguf" not in layer.mediaType else "model.gguf"
    url = f"{reference.api}/blobs/{layer.digest}"
    return SourceFile(path=title, place=url, urls=(url,), size=layer.size, digest=layer.digest, unpack=unpack)
