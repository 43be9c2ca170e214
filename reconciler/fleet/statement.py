"""
A node's signed status: what it says to the network's operator, and how it is signed and verified.

Rules that hold here:

1. Pure: no clock, no file, no socket.
2. What may be said is a closed list of fields. No field has a path outside the store, a credential, an address or a host's name.
3. A status is a DSSE envelope, as snapshots and roots are, with a payload type of its own: a signature for one never holds for the other.
4. The signature must be of the very key that is known for the node that the status names; which keys are known is an argument.
5. *sequence* grows with each status of a node, also over the loss of its store: it is never below the milliseconds since 1970.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from reconciler.core import dsse, strict_json
from reconciler.core.digest import AnyDigest, Digest
from reconciler.core.dsse import Envelope, Signature
from reconciler.core.errors import BadEnvelope, BadSignature
from reconciler.core.state import ModelState

STATUS_TYPE = "application/vnd.reconciler.status.v1+json"
#: Bytes of a status' envelope: enough for 4,000 models.
MAX_BYTES = 2 << 20

NodeId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?!\n)$")]
Sequence = Annotated[int, Meta(ge=1, lt=2**53)]
_Text = Annotated[str, Meta(max_length=400)]


class ReportedModel(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model on the node."""

    id: Annotated[str, Meta(max_length=200)]  #: Model id.
    state: ModelState  #: Its state.
    #: Why: a word of the closed list that reasons begin with.
    reason: Annotated[str, Meta(max_length=64)] = ""
    tree: Digest | None = None  #: Digest of its tree.
    since: datetime | None = None  #: When it came into this state.
    attempts: int = 0  #: Failures since it last passed.
    detail: _Text = ""  #: What failed, without anything that is the node's own.


class ReportedSnapshot(Struct, frozen=True, kw_only=True):
    """The snapshot that the node's lock was compiled from."""

    version: int  #: Its version.
    digest: AnyDigest  #: SHA-256 of its payload.


class NodeReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload of a status."""

    schema: Literal[1]  #: Version of this form.
    network: Annotated[str, Meta(max_length=256)]  #: The network's name.
    node: NodeId  #: The node's id.
    key: Annotated[str, Meta(max_length=256)]  #: The node's public key, in PEM.
    sequence: Sequence  #: Greater than that of each earlier status of the node.
    at: datetime  #: When it was made, by the node's clock.
    program: Annotated[str, Meta(max_length=64)]  #: Version of reconcile.
    snapshot: ReportedSnapshot
    lock: Digest  #: Digest of the lock.
    generation: int  #: Number of the active generation.
    active_digest: Digest  #: Digest of the active set: the same on two nodes that serve the same bytes.
    models: tuple[ReportedModel, ...]  #: Every model, sorted by model id.
    cohorts: tuple[Annotated[str, Meta(max_length=64)], ...] = ()  #: The node's cohorts.
    held: bool = False  #: Whether a rollback holds models back.
    refused: Annotated[str, Meta(max_length=64)] = ""  #: The error's name, where the snapshot or the lock is refused.
    unreachable_since: datetime | None = None  #: Since when no snapshot can be fetched.


def encode(report: NodeReport) -> bytes:
    """Return the payload of *report*: JSON without white space, keys in the order of the fields, times in UTC."""
    return msgspec.json.encode(report)


def sign(report: NodeReport, private: Any) -> bytes:
    """Return the envelope of *report*, signed by the Ed25519 key *private*."""
    payload = encode(report)
    signature = private.sign(dsse.pae(STATUS_TYPE, payload))
    made = Signature(keyid=dsse.keyid_of(private.public_key()), sig=base64.b64encode(signature).decode())
    return msgspec.json.encode(Envelope(payload_type=STATUS_TYPE, payload=base64.b64encode(payload).decode(), signatures=(made,))) + b"\n"


class Unverified(Struct, frozen=True, kw_only=True):
    """A status that was read, and not verified: good for finding the key that must have signed it, and for nothing else."""

    envelope: Envelope
    payload: bytes
    report: NodeReport

    def signed_by(self, key: Any) -> bool:
        """Return whether the public *key* signed it."""
        return bool(dsse.valid_keyids(self.envelope, self.payload, {dsse.keyid_of(key): key}))


def read(data: bytes) -> Unverified:
    """
    Return the status in *data*, unverified.

    Raises:
        TooLarge: it has more than ``MAX_BYTES``.
        BadEnvelope, BadSignature: it is no envelope of a status, or carries no signature.
    """
    envelope = dsse.decode(data, STATUS_TYPE, max_bytes=MAX_BYTES)
    payload = dsse.payload_of(envelope)
    try:
        report = strict_json.decode(payload, NodeReport)
    except ValueError as error:
        raise BadEnvelope(f"not a status: {error}") from None
    if report.at.tzinfo is None or any(model.since is not None and model.since.tzinfo is None for model in report.models):
        raise BadEnvelope("not a status: a time without its zone")
    if len({model.id for model in report.models}) != len(report.models):
        raise BadEnvelope("not a status: a model is listed twice")
    return Unverified(envelope=envelope, payload=payload, report=report)


def verify(data: bytes, keys: dict[str, Any]) -> NodeReport:
    """
    Return the status in *data* if the key that *keys* has for its node signed it.

    Raises:
        TooLarge, BadEnvelope: as ``read``.
        BadSignature: the node is not known, or another key signed it.
    """
    found = read(data)
    key = keys.get(found.report.node)
    if key is None:
        raise BadSignature(f"no key is known for the node {found.report.node}")
    if not found.signed_by(key):
        raise BadSignature(f"it is not signed by the key of the node {found.report.node}")
    return found.report
