"""
A bundle: a signed snapshot, the roots that it follows from, and blobs, as one OCI image layout (OCI image specification 1.1).

Rules that hold here:

1. Nothing in a bundle is believed for being there. The envelope and the roots are verified as if they came over the network, and every
   blob by its digest.
2. A bundle names what it holds and what it left out because an earlier bundle holds it, so that a third can follow a second.
3. The same content makes the same bytes.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from reconciler.core import digest
from reconciler.core.digest import Digest
from reconciler.core.errors import BadBundle

LAYOUT_FILE, LAYOUT = "oci-layout", b'{"imageLayoutVersion":"1.0.0"}'
INDEX_FILE = "index.json"
#: The most bytes of an index, a manifest or a config.
DOCUMENT_BYTES = 64 << 20

_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_BUNDLE_TYPE = "application/vnd.reconciler.bundle.v1"
_CONFIG_TYPE = "application/vnd.reconciler.bundle.config.v1+json"
_ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
_BLOB_TYPE = "application/octet-stream"
_T = TypeVar("_T")
_NAME = "org.opencontainers.image.ref.name"


class Descriptor(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A part of a bundle: its media type, its digest and its size in bytes (OCI image specification, descriptor)."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = {}


class Contents(Struct, frozen=True, kw_only=True):
    """What a bundle holds; it is its own config document."""

    schema: int = 1
    network: str
    #: Version and digest of the snapshot's envelope.
    version: int
    envelope: Digest
    #: Digests of the envelopes of the roots after the pinned one, in order.
    roots: tuple[Digest, ...] = ()
    #: The models whose blobs it is for; those that it holds nothing of, because of ``assumes``, too.
    models: tuple[str, ...] = ()
    #: Sizes in bytes of the blobs that it holds, and of those that an earlier bundle holds.
    blobs: dict[Digest, int] = {}
    assumes: dict[Digest, int] = {}


def documents(contents: Contents, sizes: dict[str, int]) -> dict[str, bytes]:
    """
    Return the documents of a bundle by their paths: config, manifest and index; *sizes*: of its envelopes, in bytes, by digest.

    The files under ``blobs/`` are these and what *contents* names.
    """
    config = _encode(contents)
    layers = [Descriptor(media_type=_ENVELOPE_TYPE, digest=name, size=sizes[name]) for name in (contents.envelope, *contents.roots)]
    layers += [Descriptor(media_type=_BLOB_TYPE, digest=name, size=size) for name, size in sorted(contents.blobs.items())]
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "artifactType": _BUNDLE_TYPE,
            "config": Descriptor(media_type=_CONFIG_TYPE, digest=digest.of(config), size=len(config)),
            "layers": layers,
        }
    )
    found = Descriptor(
        media_type=_MANIFEST_TYPE,
        digest=digest.of(manifest),
        size=len(manifest),
        annotations={_NAME: f"{contents.network}-{contents.version}"},
    )
    index = _encode({"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": [found]})
    return {
        LAYOUT_FILE: LAYOUT,
        blob_path(digest.of(config)): config,
        blob_path(digest.of(manifest)): manifest,
        INDEX_FILE: index,
    }


def manifest_of(index: bytes) -> Digest:
    """
    Return the digest of the one manifest that *index* names.

    Raises:
        BadBundle: it names none or several, or is no index.
    """
    found = _decode(index, _Index).manifests
    if len(found) != 1:
        raise BadBundle(f"its index names {len(found)} manifests, and a bundle has one")
    return found[0].digest


def config_of(manifest: bytes) -> Digest:
    """
    Return the digest of the config that *manifest* names.

    Raises:
        BadBundle: it is another kind of artifact, or no manifest.
    """
    found = _decode(manifest, _Manifest)
    if found.config.media_type != _CONFIG_TYPE:
        raise BadBundle("it is an OCI image layout of something else")
    return found.config.digest


def contents_of(config: bytes) -> Contents:
    """
    Return what a bundle holds, as its *config* says.

    Raises:
        BadBundle: it is no config of a version that is known here.
    """
    found = _decode(config, Contents)
    if found.schema != 1:
        raise BadBundle(f"it has version {found.schema} of the form, and this version of reconcile knows 1")
    return found


def blob_path(name: str) -> str:
    """Return the path of the blob *name* in an OCI image layout; raises ValueError where it is no digest."""
    algorithm, digits = digest.parse(name)
    return f"blobs/{algorithm}/{digits}"


class _Index(Struct, frozen=True, rename="camel"):
    manifests: tuple[Descriptor, ...]


class _Manifest(Struct, frozen=True, rename="camel"):
    config: Descriptor


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _decode(data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise BadBundle(f"a document in it cannot be read: {error}") from None
