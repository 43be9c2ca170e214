"""
A root or snapshot that is being signed: an envelope in a file, with none, some or all of its signatures.

Rules that hold here:

1. One file passes from signer to signer. Unsigned, it is an envelope with an empty list of signatures, which every node refuses.
2. Signing adds to that list and keeps the signatures of others. A change of the payload empties it.
3. Only a signature that is valid for the payload enters the list: a wrong key is noticed where it is used, not on a thousand nodes.
4. Fields that this program does not know are kept, wherever they stand: a network's snapshot carries more than models.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import msgspec
from msgspec import Raw, Struct

from reconciler.core import dsse, strict_json, trust, vocabulary
from reconciler.core.dsse import Envelope, Signature
from reconciler.core.errors import BadEnvelope, BadSignature, PublishError, TooLarge
from reconciler.core.node import Limits

_LIMITS = Limits()


class Document(Struct, frozen=True, kw_only=True):
    """A payload with the signatures that it has so far."""

    kind: str
    payload: bytes
    signatures: tuple[Signature, ...] = ()

    def pae(self) -> bytes:
        """Return the bytes that are signed."""
        return dsse.pae(self.kind, self.payload)

    def envelope(self) -> Envelope:
        """Return the document as nodes decode it."""
        return Envelope(payload_type=self.kind, payload=base64.b64encode(self.payload).decode(), signatures=self.signatures)


def read(data: bytes, kind: str) -> Document:
    """
    Return the document in *data*, signed or not.

    Raises:
        TooLarge, BadEnvelope: not an envelope of a document of this *kind*.
    """
    _check_size(data, kind)
    try:
        found = strict_json.decode(data, Envelope)
    except ValueError as error:
        made = f"`reconcile {'root' if kind == trust.ROOT_TYPE else 'snapshot'} new` makes such a file"
        raise BadEnvelope(f"not a DSSE envelope: {error}", hint=made) from None
    if found.payload_type != kind:
        raise BadEnvelope(f"payload type is {found.payload_type[:120]!r}, expected {kind!r}", hint=_other(found.payload_type))
    return Document(kind=kind, payload=dsse.payload_of(found), signatures=found.signatures)


def _other(kind: str) -> str:
    if kind == trust.ROOT_TYPE:
        return "this is a trust root: `reconcile root inspect FILE` shows it"
    return "this is a snapshot: `reconcile snapshot inspect FILE` shows it" if kind == trust.SNAPSHOT_TYPE else ""


def write(document: Document) -> bytes:
    """
    Return the bytes of the file that carries *document*.

    Raises:
        TooLarge: nodes would refuse it for its size.
    """
    data = msgspec.json.encode(document.envelope()) + b"\n"
    _check_size(data, document.kind)
    return data


def _check_size(data: bytes, kind: str) -> None:
    cap = _LIMITS.root_bytes if kind == trust.ROOT_TYPE else _LIMITS.envelope_bytes
    if len(data) > cap:
        raise TooLarge(f"the envelope has {len(data):,} bytes, more than {cap:,}")


#: What the regular expressions of names allow, for people.
_NAMES = {
    "[a-z0-9][a-z0-9._-]{0,127}": "lowercase letters, digits and . _ -, at most 128, a letter or digit first",
    "[A-Za-z0-9][A-Za-z0-9._-]{0,63}": "letters, digits and . _ -, at most 64, a letter or digit first",
}


def describe_decode_error(refusal: str) -> str:
    """Return a decoder's message with the regular expressions of names replaced by what they allow."""
    pattern = r"Expected `str` matching regex '\^(.*)\(\?!\\\\n\)\$'"
    return re.sub(pattern, lambda found: f"expected {_NAMES[found[1]]}" if found[1] in _NAMES else found[0], refusal)


def sign(document: Document, key: Any) -> Document:
    """Return *document* with the signature of the private *key* added; the others' signatures stay."""
    return attach_signature(document, key.public_key(), key.sign(document.pae()))


def attach_signature(document: Document, public: Any, signature: bytes) -> Document:
    """
    Return *document* with *signature* added, which was made elsewhere by the holder of the key *public*.

    Raises:
        BadSignature: it is not valid for this document.
        PublishError: there are as many signatures as nodes look at.
    """
    from cryptography.exceptions import InvalidSignature

    keyid = dsse.keyid_of(public)
    try:
        public.verify(signature, document.pae())
    except InvalidSignature:
        raise BadSignature(
            f"the signature is not one of key {keyid} over this document",
            hint="sign the bytes that `reconcile snapshot pae FILE` or `reconcile root pae FILE` prints, with that key, for the same file",
        ) from None
    mine = Signature(keyid=keyid, sig=base64.b64encode(signature).decode())
    others = tuple(one for one in document.signatures if one.keyid != keyid)
    if len(others) >= _LIMITS.signatures:
        raise PublishError(f"there are {len(others)} signatures already, and nodes look at {_LIMITS.signatures}")
    if mine in document.signatures:
        return document
    return msgspec.structs.replace(document, signatures=(*others, mine))


def decode_signature(data: bytes) -> bytes:
    """
    Return the 64 bytes of an Ed25519 signature from a file that holds them raw, as openssl writes them, or in base64.

    Raises:
        BadSignature: neither.
    """
    if len(data) == 64:
        return data
    try:
        found = dsse.decode_base64(data.decode("ascii").strip())
    except (BadEnvelope, ValueError):
        found = b""
    if len(found) != 64:
        raise BadSignature(f"an Ed25519 signature has 64 bytes, or 88 characters of base64; this file has {len(data)} bytes")
    return found


def unknown_fields(payload: bytes, known: type[Struct]) -> dict[str, Raw]:
    """Return the fields of *payload* that *known* does not have, each as its encoded bytes."""
    fields = msgspec.json.decode(payload, type=dict[str, Raw])
    return {name: value for name, value in fields.items() if name not in known.__struct_fields__}


def encode_payload(value: Struct, extra: dict[str, Raw]) -> bytes:
    """Return the payload of *value*, with the fields that this program does not know after its own."""
    fields: dict[str, Any] = msgspec.to_builtins(value)
    return msgspec.json.encode(fields | extra)


def encode_changed(payload: bytes, before: Struct, after: Struct) -> bytes:
    """Return the payload of *after*, with the fields of *payload* that were not read into *before*, of which *after* is a change."""
    fields = _with_unknown(msgspec.json.decode(payload), msgspec.to_builtins(before), msgspec.to_builtins(after))
    return msgspec.json.encode(fields | unknown_fields(payload, type(before)))


def ignored_fields(payload: bytes, found: Struct) -> tuple[str, ...]:
    """Return the places of fields of *payload* that were not read into *found*."""
    return tuple(vocabulary.unknown_fields(msgspec.json.decode(payload), msgspec.to_builtins(found)))


def _with_unknown(document: Any, known: Any, after: Any) -> Any:
    """Return *after* with what *document* holds beside *known*, in models and artifacts that are in both."""
    if isinstance(document, dict) and isinstance(after, dict):
        kept = {name: _with_unknown(document[name], known[name], value) if name in document else value for name, value in after.items()}
        return kept | {name: value for name, value in document.items() if name not in known}
    if isinstance(document, list) and isinstance(after, list | tuple):
        before = {_name_of(read): (value, read) for value, read in zip(document, known, strict=True) if isinstance(read, dict)}
        return [_with_unknown(*before[_name_of(value)], value) if _name_of(value) in before else value for value in after]
    return after


def _name_of(value: Any) -> object:
    """Return what an entry of a list is told from the others by."""
    return (value.get("name"), value.get("version"), value.get("path")) if isinstance(value, dict) else None
