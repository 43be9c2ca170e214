"""
DSSE v1 envelopes (Dead Simple Signing Envelope, protocol.md) with Ed25519 signatures (RFC 8032): bytes in, signed payload out.

Rules that hold here:

1. Pure: no clock, no file, no socket. Which keys may sign, and how many must, are arguments.
2. Size is capped before anything is parsed, and the payload is returned only after its signatures were checked.
3. The bytes that were verified are the bytes that are returned: a payload is decoded from base64 once.
4. A threshold counts distinct public keys. A key id is the hash of its key, so two ids are two keys.
5. A key that lets anybody sign (of small order, or not in its canonical encoding) is refused when it is loaded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from reconciler.core import strict_json
from reconciler.core.errors import BadEnvelope, BadRootChain, BadSignature, TooLarge
from reconciler.core.node import Limits

KeyId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]

_LIMITS = Limits()


class Signature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One signature of an envelope; *keyid* only says which key to try."""

    keyid: Annotated[str, Meta(max_length=256)]  #: SHA-256 of the key, in hex.
    sig: Annotated[str, Meta(max_length=256)]  #: Ed25519 signature over the PAE, in base64.


class Envelope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"payload_type": "payloadType"}):
    """A DSSE v1 envelope as it stands in a file."""

    payload_type: Annotated[str, Meta(max_length=256)]  #: What the payload is.
    payload: str  #: The signed bytes, in base64.
    signatures: tuple[Signature, ...]  #: At most 64 are checked.

    def pae(self) -> bytes:
        """Return the bytes that are signed."""
        return pae(self.payload_type, payload_of(self))


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding (protocol.md): lengths in bytes, so that nothing can be shifted between the parts."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def verify(data: bytes, payload_type: str, keys: Mapping[str, Any], threshold: int, *, max_bytes: int, limits: Limits = _LIMITS) -> bytes:
    """
    Return the payload of the envelope in *data* if at least *threshold* of *keys* (Ed25519 public keys by key id) signed it.

    Raises:
        TooLarge: it has more than *max_bytes*.
        BadEnvelope: it is no envelope, or one of another *payload_type*.
        BadSignature: fewer than *threshold* keys signed it.
    """
    envelope = decode(data, payload_type, max_bytes=max_bytes)
    payload = payload_of(envelope)
    valid = valid_keyids(envelope, payload, keys, limits=limits)
    if len(valid) < threshold:
        raise BadSignature(f"valid signatures by keys of the role: {len(valid)}, needed: {threshold}")
    return payload


def valid_keyids(envelope: Envelope, payload: bytes, keys: Mapping[str, Any], *, limits: Limits = _LIMITS) -> frozenset[str]:
    """Return the ids of those *keys* that validly signed *payload*; unknown ids and invalid signatures count for nothing."""
    message = pae(envelope.payload_type, payload)
    return frozenset(
        signature.keyid
        for signature in envelope.signatures[: limits.signatures]
        if signature.keyid in keys and _is_valid(keys[signature.keyid], signature.sig, message)
    )


def _is_valid(key: Any, signature: str, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(decode_base64(signature), message)
    except (InvalidSignature, BadEnvelope):
        return False
    return True


def decode(data: bytes, payload_type: str = "", *, max_bytes: int = _LIMITS.envelope_bytes) -> Envelope:
    """
    Return the envelope in *data*, none of it trusted yet; an empty *payload_type* accepts every type.

    Raises:
        TooLarge, BadEnvelope: as in ``verify``.
        BadSignature: it carries no signature at all.
    """
    if len(data) > max_bytes:
        raise TooLarge(f"the envelope has {len(data):,} bytes, more than {max_bytes:,}")
    try:
        envelope = strict_json.decode(data, Envelope)
    except ValueError as error:
        raise BadEnvelope(f"not a DSSE envelope: {error}") from None
    if not envelope.signatures:
        raise BadSignature("the envelope carries no signature")
    if payload_type and envelope.payload_type != payload_type:
        raise BadEnvelope(f"payload type is {envelope.payload_type[:120]!r}, expected {payload_type!r}")
    return envelope


def payload_of(envelope: Envelope) -> bytes:
    """Return the decoded payload: the very bytes that are signed and then parsed; raises BadEnvelope."""
    return decode_base64(envelope.payload)


def decode_base64(text: str) -> bytes:
    """
    Decode base64 (RFC 4648) in the standard or the URL-safe alphabet, canonical and padded; Python's default accepts almost anything.

    Raises:
        BadEnvelope: another alphabet or a mix of the two, wrong padding, or bits that no encoder writes.
    """
    url_safe = "-" in text or "_" in text
    try:
        plain = text.encode("ascii")
        data = base64.b64decode(plain, b"-_" if url_safe else None, validate=True)
    except (binascii.Error, ValueError):
        raise BadEnvelope("not base64") from None
    if (base64.urlsafe_b64encode(data) if url_safe else base64.b64encode(data)) != plain:
        raise BadEnvelope("base64 that is not canonical")
    return data


# -- keys ------------------------------------------------------------------------------------------

_P = 2**255 - 19
#: The y coordinates of the points of small order. A key among them lets anybody sign anything (RFC 8032, 8.; libsodium refuses them too).
_SMALL_ORDER = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    }
)


def load_public_key(keyid: str, pem: str) -> Any:
    """
    Return the Ed25519 public key in *pem*.

    Raises:
        BadRootChain: not such a key, an unsafe one, or *keyid* is not the SHA-256 of its DER SubjectPublicKeyInfo.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BadRootChain(f"key {keyid[:16]}… is not a PEM public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadRootChain(f"key {keyid[:16]}… is not an Ed25519 key")
    y = int.from_bytes(key.public_bytes_raw(), "little") & (2**255 - 1)
    if y >= _P or y in _SMALL_ORDER:
        raise BadRootChain(f"key {keyid[:16]}… is of small order or not canonical: anybody could sign with it")
    if keyid_of(key) != keyid:
        raise BadRootChain(f"key id {keyid[:16]}… is not the hash of its key, {keyid_of(key)[:16]}…")
    return key


def keyid_of(key: Any) -> str:
    """Return the id of a public key: what ``openssl pkey -pubin -outform DER | sha256sum`` prints."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
