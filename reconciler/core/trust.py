"""
Whether bytes are the network's word: envelope in, value out, or a named refusal.

Rules that hold here:

1. Pure: no clock, no file, no socket. The instant and what was seen before are arguments.
2. The verified bytes are the decoded bytes: a payload is never taken from anywhere but the buffer whose signature was checked.
3. Size is capped before parsing, the signature is checked before the payload is decoded.
4. A threshold counts distinct public keys of the role, by their bytes. A key id is the key's own hash, so two ids are two keys.
5. The root chain follows The Update Framework, client workflow 5.3 (N+1 signed by N and by itself, step by step, intermediate
   expiry ignored); envelopes are DSSE v1 with Ed25519 (RFC 8032) over PAE(payloadType, payload).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from reconciler.core import digest, snapshot, strict_json, units
from reconciler.core.errors import (
    BadEnvelope,
    BadRootChain,
    BadSignature,
    Equivocation,
    Expired,
    NotYetValid,
    Rollback,
    RootExpired,
    TooLarge,
    WrongNetwork,
)
from reconciler.core.node import Limits
from reconciler.core.snapshot import Instant, Positive, Snapshot

SNAPSHOT_TYPE = "application/vnd.reconciler.snapshot.v1+json"
ROOT_TYPE = "application/vnd.reconciler.root.v1+json"

KeyId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]

_LIMITS = Limits()


class Signature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One signature of an envelope; *keyid* only says which key to try."""

    keyid: Annotated[str, Meta(max_length=256)]
    sig: Annotated[str, Meta(max_length=256)]


class Envelope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"payload_type": "payloadType"}):
    """A DSSE v1 envelope as it stands in a file."""

    payload_type: Annotated[str, Meta(max_length=256)]
    payload: str
    signatures: tuple[Signature, ...]

    def pae(self) -> bytes:
        """Return the bytes that are signed."""
        return pae(self.payload_type, payload_of(self))


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A public key as PEM SubjectPublicKeyInfo."""

    scheme: Literal["ed25519"]
    public: Annotated[str, Meta(max_length=1024)]


class Role(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys that may sign a kind of document, and how many of them must."""

    keyids: Annotated[tuple[KeyId, ...], Meta(min_length=1, max_length=64)]
    threshold: Positive


class Roles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The two kinds of document that there are."""

    root: Role
    snapshot: Role


class TrustRoot(Struct, frozen=True, kw_only=True, dict=True):
    """The keys and thresholds that may sign; versioned and rotated."""

    schema: Literal[1]
    network: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}(?!\n)$")]
    version: Positive
    expires_at: Instant
    keys: Annotated[dict[KeyId, Key], Meta(max_length=128)]
    roles: Roles

    @cached_property
    def verifiers(self) -> dict[str, Any]:
        """Return the loaded Ed25519 keys by key id; loading refuses unsafe ones."""
        return {keyid: load_key(keyid, key.public) for keyid, key in self.keys.items()}


class TrustState(Struct, frozen=True, kw_only=True):
    """The newest that this store has accepted: nothing below it is accepted again."""

    version: int = 0
    digest: str = ""
    #: When the accepted snapshot was issued.
    issued_at: Instant | None = None
    #: The latest time at which a snapshot was accepted.
    seen_at: Instant | None = None
    #: Who could sign it: ``signers`` of the root. A role with other keys begins a new count (TUF 5.3.11, fast-forward recovery).
    role: str = ""


class Verified(Struct, frozen=True, kw_only=True):
    """A snapshot whose signatures hold, with the digest of the very bytes that were signed."""

    snapshot: Snapshot
    digest: str
    root_version: int
    role: str


def verify(envelope: bytes, root: TrustRoot, *, now: datetime, trust_state: TrustState, limits: Limits = _LIMITS) -> Verified:
    """
    Return the snapshot in *envelope* if the network says it, now, and never said anything newer here.

    Raises:
        TrustError: one of its named kinds; nothing may be done on the word of this envelope.
    """
    verified = open_snapshot(envelope, root, limits=limits)
    check_fresh(verified, root, now=now, trust_state=trust_state, limits=limits)
    return verified


def open_snapshot(envelope: bytes, root: TrustRoot, *, limits: Limits = _LIMITS) -> Verified:
    """
    Return the snapshot in *envelope* if enough of the root's keys signed it, whatever the time and the floor.

    Raises:
        TooLarge, BadEnvelope, BadSignature, WrongNetwork: as their names say.
    """
    payload = signed_payload(envelope, SNAPSHOT_TYPE, root, root.roles.snapshot, limits=limits)
    found = snapshot.decode(payload)
    if found.network != root.network:
        raise WrongNetwork(f"the snapshot is for network {found.network!r}, the trust root for {root.network!r}")
    return Verified(snapshot=found, digest=digest.of(payload), root_version=root.version, role=signers(root))


def check_fresh(verified: Verified, root: TrustRoot, *, now: datetime, trust_state: TrustState, limits: Limits = _LIMITS) -> None:
    """
    Check that *verified* may be acted on at *now*, above *floor*.

    Raises:
        RootExpired, NotYetValid, Rollback, Equivocation, Expired: as their names say, in this order.
    """
    found = verified.snapshot
    if now >= root.expires_at:
        raise RootExpired(f"root {root.version} of {root.network!r} expired at {units.rfc3339(root.expires_at)}")
    check_clock(now, trust_state, limits=limits)
    _check_version(verified, trust_state)
    if found.issued_at > now + timedelta(seconds=limits.clock_skew_seconds):
        raise NotYetValid(f"snapshot {found.version} was issued at {units.rfc3339(found.issued_at)}, which is in the future")
    if now >= found.expires_at:
        raise Expired(f"snapshot {found.version} expired at {units.rfc3339(found.expires_at)}")


def check_clock(now: datetime, trust_state: TrustState, *, limits: Limits = _LIMITS) -> None:
    """
    Refuse a clock that stands behind a time that this store has seen.

    Raises:
        NotYetValid: it was set back by more than the tolerance.
    """
    if trust_state.seen_at and now < trust_state.seen_at - timedelta(seconds=limits.clock_back_seconds):
        clocks = f"the clock says {units.rfc3339(now)}, but this store has seen {units.rfc3339(trust_state.seen_at)}"
        raise NotYetValid(
            f"{clocks}: it is behind, or it was ahead then",
            hint="check this machine's clock (`timedatectl`); if it is right now, `reconcile trust init` forgets that it was ahead",
        )


def _check_version(verified: Verified, trust_state: TrustState) -> None:
    found = verified.snapshot
    if trust_state.role and verified.role != trust_state.role:
        # Other keys count anew, so that a version pushed to the top by thieves is no dead end; time still only goes forward, and
        # of two snapshots of one instant the first stays.
        if trust_state.issued_at and found.issued_at <= trust_state.issued_at and verified.digest != trust_state.digest:
            raise Rollback(f"snapshot {found.version} was not issued after the one that this store has accepted")
        return
    if found.version < trust_state.version:
        raise Rollback(f"snapshot {found.version} is older than {trust_state.version}, which this store has accepted")
    if found.version == trust_state.version and verified.digest != trust_state.digest:
        raise Equivocation(f"two snapshots of version {found.version}: {trust_state.digest} was accepted, {verified.digest} is another")


def advance_state(trust_state: TrustState, verified: Verified, now: datetime) -> TrustState:
    """Return the floor after *verified* was admitted at *now*; its times never go back."""
    found = verified.snapshot
    issued = max(trust_state.issued_at, found.issued_at) if trust_state.issued_at else found.issued_at
    seen = max(trust_state.seen_at, now) if trust_state.seen_at else now
    return TrustState(version=found.version, digest=verified.digest, issued_at=issued, seen_at=seen, role=verified.role)


# -- roots -----------------------------------------------------------------------------------------


def pin(envelope: bytes, fingerprint: str = "", *, limits: Limits = _LIMITS) -> TrustRoot:
    """
    Return the root that the operator chose to trust; *fingerprint* is the SHA-256 of its payload, in hex, if one is known.

    Raises:
        TooLarge, BadEnvelope, BadRootChain, BadSignature: it is not a root that its own root role signed, or not that one.
    """
    payload = payload_of(_read(envelope, ROOT_TYPE, limits))
    found = fingerprint_of(payload)
    if fingerprint and found != fingerprint.removeprefix("sha256:").lower():
        raise BadRootChain(f"the root's fingerprint is {found}, not {fingerprint}")
    root = _decode_root(payload)
    signed_payload(envelope, ROOT_TYPE, root, root.roles.root, limits=limits)
    return root


def advance(root: TrustRoot, envelope: bytes, *, limits: Limits = _LIMITS) -> TrustRoot:
    """
    Return the root that follows *root*: one version higher, signed by the root role of both (TUF 5.3.4 and 5.3.5).

    Raises:
        TooLarge, BadEnvelope, BadRootChain, BadSignature: it does not follow.
    """
    payload = signed_payload(envelope, ROOT_TYPE, root, root.roles.root, limits=limits)
    following = _decode_root(payload)
    if following.network != root.network:
        raise WrongNetwork(f"the root is for network {following.network!r}, the trusted one for {root.network!r}")
    if following.version != root.version + 1:
        raise BadRootChain(f"root {following.version} does not follow root {root.version}: versions go up by one")
    signed_payload(envelope, ROOT_TYPE, following, following.roles.root, limits=limits)
    return following


def apply_root_chain(root: TrustRoot, envelopes: Iterable[bytes], *, limits: Limits = _LIMITS) -> TrustRoot:
    """Return the last root of a chain that begins at *root*; roots that are not newer than the one before are passed over."""
    for steps, envelope in enumerate(envelopes):
        if steps >= limits.root_rotations:
            raise BadRootChain(f"more than {limits.root_rotations} rotations at once")
        if root_version(envelope, limits=limits) > root.version:
            root = advance(root, envelope, limits=limits)
    return root


def root_version(envelope: bytes, *, limits: Limits = _LIMITS) -> int:
    """Return the version that a root claims, before anything of it is trusted: to order files, never to decide."""
    return _decode_root(payload_of(_read(envelope, ROOT_TYPE, limits))).version


def fingerprint_of(payload: bytes) -> str:
    """Return what people compare by eye or voice before they pin a root: the payload's SHA-256 in hex."""
    return hashlib.sha256(payload).hexdigest()


def signers(root: TrustRoot) -> str:
    """Return a digest of who may sign snapshots under *root*: the role's keys and threshold."""
    role = root.roles.snapshot
    return digest.of(f"{role.threshold}\n{chr(10).join(sorted(role.keyids))}".encode())


def _decode_root(payload: bytes) -> TrustRoot:
    try:
        root = strict_json.decode(payload, TrustRoot)
    except ValueError as error:
        raise BadEnvelope(f"not a trust root: {str(error).replace('`$.', '`')}") from None
    check_root(root)
    return root


def check_root(root: TrustRoot) -> None:
    """
    Refuse a root whose keys or thresholds protect nothing.

    Raises:
        BadRootChain: a threshold that cannot be met, a key listed twice or unknown, an unsafe key, or a time out of all bounds.
    """
    try:
        snapshot.check_instant(root.expires_at)
    except ValueError as error:
        raise BadRootChain(f"expires_at: {error}") from None
    for name, role in (("root", root.roles.root), ("snapshot", root.roles.snapshot)):
        if len(set(role.keyids)) != len(role.keyids):
            raise BadRootChain(f"role {name!r} lists a key twice")
        if role.threshold > len(role.keyids):
            raise BadRootChain(
                f"role {name!r} asks for {units.count(role.threshold, 'signature')} and has {units.count(len(role.keyids), 'key')}"
            )
        unknown = [keyid for keyid in role.keyids if keyid not in root.keys]
        if unknown:
            raise BadRootChain(f"role {name!r} lists a key that the root does not carry: {unknown[0]}")
    _ = root.verifiers


# -- envelopes -------------------------------------------------------------------------------------


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (DSSE v1, protocol.md): lengths in bytes, so nothing can be shifted between parts."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def signed_payload(envelope: bytes, payload_type: str, root: TrustRoot, role: Role, *, limits: Limits = _LIMITS) -> bytes:
    """
    Return the payload of *envelope* if at least the role's threshold of distinct keys signed it.

    Raises:
        TooLarge, BadEnvelope, BadSignature: as their names say.
    """
    read = _read(envelope, payload_type, limits)
    payload = payload_of(read)
    valid = valid_keyids(read, payload, root, role, limits=limits)
    if len(valid) < role.threshold:
        raise BadSignature(f"{len(valid)} valid signature(s) by keys of the role, {role.threshold} needed")
    return payload


def valid_keyids(read: Envelope, payload: bytes, root: TrustRoot, role: Role, *, limits: Limits = _LIMITS) -> frozenset[str]:
    """Return the ids of the role's keys that validly signed; unknown ids and invalid signatures count for nothing."""
    message = pae(read.payload_type, payload)
    allowed = frozenset(role.keyids)
    return frozenset(
        signature.keyid
        for signature in read.signatures[: limits.signatures]
        if signature.keyid in allowed and _holds(root.verifiers[signature.keyid], signature.sig, message)
    )


def _holds(key: Any, text: str, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(unbase64(text), message)
    except (InvalidSignature, BadEnvelope):
        return False
    return True


def _read(envelope: bytes, payload_type: str, limits: Limits) -> Envelope:
    cap = limits.root_bytes if payload_type == ROOT_TYPE else limits.envelope_bytes
    read = decode_envelope(envelope, limits=limits, cap=cap)
    if read.payload_type != payload_type:
        raise BadEnvelope(f"payload type is {read.payload_type[:120]!r}, expected {payload_type!r}")
    return read


def decode_envelope(envelope: bytes, *, limits: Limits = _LIMITS, cap: int = 0) -> Envelope:
    """
    Return the parts of *envelope*, none of them trusted yet; *cap* bytes at most, if that is less than any envelope may have.

    Raises:
        TooLarge, BadEnvelope: as their names say.
    """
    cap = min(cap or limits.envelope_bytes, limits.envelope_bytes)
    if len(envelope) > cap:
        raise TooLarge(f"the envelope has {len(envelope):,} bytes, more than {cap:,}")
    try:
        read = strict_json.decode(envelope, Envelope)
    except ValueError as error:
        raise BadEnvelope(f"not a DSSE envelope: {error}") from None
    if not read.signatures:
        raise BadSignature("the envelope carries no signature")
    return read


def payload_of(read: Envelope) -> bytes:
    """Return the decoded payload: the very bytes that are signed and then parsed."""
    return unbase64(read.payload)


def unbase64(text: str) -> bytes:
    """
    Decode base64 (RFC 4648), in the standard or the URL-safe alphabet, canonical and padded; Python's default takes almost anything.

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


def load_key(keyid: str, pem: str) -> Any:
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
