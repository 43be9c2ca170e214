"""
Whether a snapshot may be acted on: envelope in, value out, or a named refusal.

Rules that hold here, in the order in which they are checked (SPEC, section 3; TUF client workflow 5.3 for roots):

1. Pure: no clock, no file, no socket. The instant and what was accepted before are arguments.
2. A root is pinned by a person, and replaced by its successor alone: version N+1, signed by the root role of N and by its own. A chain
   is applied step by step; that a root on the way has expired does not matter, the last one must not have.
3. A snapshot is signed by the threshold of the snapshot role, has the expected type and schema, and names the root's network.
4. Its version is not below the highest accepted one; the same version means the same bytes. A role with other keys counts anew (TUF
   5.3.11), and then the time of issue must rise.
5. It has not expired and was not issued in the future. Signed instants alone hold a node to a time: a clock that stands before
   the newest accepted time of issue is behind. What the clock once said is never evidence: it may have been wrong.
6. Labels of keys are for people. They are signed with the root, and nothing is accepted or refused for what they say: versions that do not
   know them accept the same roots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct

from reconciler.core import digest, dsse, snapshot, strict_json, units
from reconciler.core.dsse import KeyId
from reconciler.core.errors import (
    BadEnvelope,
    BadRootChain,
    Equivocation,
    Expired,
    NotYetValid,
    Rollback,
    RootExpired,
    WrongNetwork,
)
from reconciler.core.node import Limits
from reconciler.core.snapshot import Instant, Positive, Snapshot
from reconciler.core.text import printable

SNAPSHOT_TYPE = "application/vnd.reconciler.snapshot.v1+json"
ROOT_TYPE = "application/vnd.reconciler.root.v1+json"

_LIMITS = Limits()
#: The most characters of a key's label that are shown.
LABEL_LENGTH = 80
_LABELS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string", "maxLength": LABEL_LENGTH}}


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A public key as PEM SubjectPublicKeyInfo."""

    scheme: Literal["ed25519"]  #: The algorithm.
    public: Annotated[str, Meta(max_length=1024)]  #: PEM.


class Role(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys that may sign a kind of document, and how many of them must."""

    keyids: Annotated[tuple[KeyId, ...], Meta(min_length=1, max_length=64)]  #: Keys that may sign.
    threshold: Positive  #: How many of them must.


class Roles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The two kinds of document that there are."""

    root: Role  #: For the next root.
    snapshot: Role  #: For snapshots.


class TrustRoot(Struct, frozen=True, kw_only=True, dict=True):
    """The keys and thresholds that may sign; versioned and rotated."""

    schema: Literal[1]
    network: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}(?!\n)$")]  #: The network's name.
    version: Positive  #: The next root has the next number.
    expires_at: Instant  #: Until when it may be used.
    keys: Annotated[dict[KeyId, Key], Meta(max_length=128)]  #: Public keys by key id.
    roles: Roles  #: Who may sign what.
    labels: Annotated[Any, Meta(extra_json_schema=_LABELS)] = UNSET  #: What people call the keys, by key id.

    def label(self, keyid: str) -> str:
        """Return what people call the key *keyid*, safe to show; empty where the root does not say, or not in a text."""
        found = self.labels.get(keyid) if isinstance(self.labels, dict) else None
        return printable(found, LABEL_LENGTH) if isinstance(found, str) else ""

    def named(self, keyid: str, digits: int = 64) -> str:
        """Return the key *keyid* as it is shown to people: so many *digits* of its id, and its label where it has one."""
        shown = printable(keyid, digits)
        return f'{shown} "{label}"' if (label := self.label(keyid)) else shown

    @cached_property
    def verifiers(self) -> dict[str, Any]:
        """Return the loaded Ed25519 keys by key id; loading refuses unsafe ones."""
        return {keyid: dsse.load_public_key(keyid, key.public) for keyid, key in self.keys.items()}


class TrustState(Struct, frozen=True, kw_only=True):
    """The newest snapshot that a store has accepted: nothing older is accepted again. All of it was signed; no local time enters."""

    version: int = 0
    digest: str = ""
    #: The latest time of issue among the accepted snapshots.
    issued_at: Instant | None = None
    #: Who could sign it: ``signers`` of the root. A role with other keys begins a new count (TUF 5.3.11, fast-forward recovery).
    role: str = ""
    #: The version of the root under which it was accepted.
    root_version: int = 0

    @property
    def order(self) -> tuple[float, int, int]:
        """
        What rises with every acceptance, to tell the newer of two copies.

        The time of issue comes first, since other signers may count versions anew, and must then have issued later; under the same
        signers the version rises. The root's version decides where other signers signed the same bytes again.
        """
        return (self.issued_at.timestamp() if self.issued_at else 0.0, self.version, self.root_version)


class Verified(Struct, frozen=True, kw_only=True):
    """A snapshot whose signatures hold, with the digest of the very bytes that were signed."""

    snapshot: Snapshot
    digest: str
    root_version: int
    role: str


def verify(envelope: bytes, root: TrustRoot, *, now: datetime, trust_state: TrustState, limits: Limits = _LIMITS) -> Verified:
    """
    Return the snapshot in *envelope* if the network signed it, it is valid at *now*, and nothing newer was accepted before.

    Raises:
        TrustError: one of its named kinds; nothing of this envelope may be acted on.
    """
    verified = open_snapshot(envelope, root, limits=limits)
    check_fresh(verified, root, now=now, trust_state=trust_state, limits=limits)
    return verified


def open_snapshot(envelope: bytes, root: TrustRoot, *, limits: Limits = _LIMITS) -> Verified:
    """
    Return the snapshot in *envelope* if enough of the root's keys signed it, whatever the time and the trust state.

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
    Check that *verified* may be acted on at *now*, and is not older than what *trust_state* has accepted.

    Raises:
        RootExpired, NotYetValid, Rollback, Equivocation, Expired: as their names say, in this order.
    """
    found = verified.snapshot
    if now >= root.expires_at:
        message = f"root {root.version} of {root.network!r} expired at {units.rfc3339(root.expires_at)}"
        raise RootExpired(message, hint=_with_clock(RootExpired.hint, now))
    check_clock(now, trust_state, limits=limits)
    _check_version(verified, trust_state)
    if found.issued_at > now + timedelta(seconds=limits.clock_skew_seconds):
        message = f"snapshot {found.version} was issued at {units.rfc3339(found.issued_at)}, which is in the future"
        raise NotYetValid(message, hint=_with_clock(NotYetValid.hint, now))
    if now >= found.expires_at:
        message = f"snapshot {found.version} expired at {units.rfc3339(found.expires_at)}"
        raise Expired(message, hint=_with_clock(Expired.hint, now))


def _with_clock(hint: str, now: datetime) -> str:
    """Return *hint* with what the clock says: in a message, it would make each incident another one."""
    return f"{hint}; the clock says {units.rfc3339(now)}"


def check_clock(now: datetime, trust_state: TrustState, *, limits: Limits = _LIMITS) -> None:
    """
    Refuse a clock that stands before the time of issue of a snapshot that was accepted.

    Only signed times count. What the clock itself once said is no evidence: one that was ahead for a while would lock the node out.

    Raises:
        NotYetValid: the clock is behind by more than the tolerance.
    """
    if trust_state.issued_at and now < trust_state.issued_at - timedelta(seconds=limits.clock_back_seconds):
        issued = units.rfc3339(trust_state.issued_at)
        raise NotYetValid(
            f"the snapshot that this store accepted was issued at {issued}, which is in the future: the clock is behind",
            hint=_with_clock("set this machine's clock and keep it set: `timedatectl set-ntp true`", now),
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


def advance_state(trust_state: TrustState, verified: Verified) -> TrustState:
    """Return the trust state after *verified* was accepted; its time of issue never goes back."""
    found = verified.snapshot
    issued = max(trust_state.issued_at, found.issued_at) if trust_state.issued_at else found.issued_at
    return TrustState(
        version=found.version, digest=verified.digest, issued_at=issued, role=verified.role, root_version=verified.root_version
    )


# -- roots -----------------------------------------------------------------------------------------


def pin(envelope: bytes, fingerprint: str = "", *, limits: Limits = _LIMITS) -> TrustRoot:
    """
    Return the root that the operator chose to trust; *fingerprint* is the SHA-256 of its payload, in hex, if one is known.

    Raises:
        TooLarge, BadEnvelope, BadRootChain, BadSignature: it is not a root that its own root role signed, or not that one.
    """
    payload = _unverified_payload(envelope, limits)
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
    return _decode_root(_unverified_payload(envelope, limits)).version


def _unverified_payload(envelope: bytes, limits: Limits) -> bytes:
    return dsse.payload_of(dsse.decode(envelope, ROOT_TYPE, max_bytes=_max_bytes(ROOT_TYPE, limits)))


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


def signed_payload(envelope: bytes, payload_type: str, root: TrustRoot, role: Role, *, limits: Limits = _LIMITS) -> bytes:
    """
    Return the payload of *envelope* if at least the threshold of *role*'s keys signed it.

    Raises:
        TooLarge, BadEnvelope, BadSignature: as their names say.
    """
    max_bytes = _max_bytes(payload_type, limits)
    return dsse.verify(envelope, payload_type, role_keys(root, role), role.threshold, max_bytes=max_bytes, limits=limits)


def role_keys(root: TrustRoot, role: Role) -> dict[str, Any]:
    """Return the Ed25519 public keys of *role*, by key id."""
    return {keyid: root.verifiers[keyid] for keyid in role.keyids}


def _max_bytes(payload_type: str, limits: Limits) -> int:
    return min(limits.root_bytes, limits.envelope_bytes) if payload_type == ROOT_TYPE else limits.envelope_bytes
