"""
Trust roots for the network's operators: make the first or the next one, sign, inspect.

Rules that hold here:

1. Nothing is written that ``trust.check_root`` refuses: a threshold that cannot be met locks a network out for ever.
2. A signed root is never edited. A change makes the next version, unsigned, and the signed one stays: nodes apply each version in order.
3. The next root is signed by the keys of the one before and by its own (TUF 5.3.4); any other key is refused.
4. A label says for people whose key it is. No two keys share one, and none has a character that a terminal might act on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import replace

from reconciler.core import dsse, snapshot, strict_json, trust
from reconciler.core.errors import BadRootChain, PublishError, TrustError
from reconciler.core.text import printable
from reconciler.core.trust import Key, Role, Roles, TrustRoot
from reconciler.publish import envelopes
from reconciler.publish.envelopes import Document
from reconciler.publish.keys import PublicKey

RoleName = Literal["root", "snapshot"]


class Signer(Struct, frozen=True, kw_only=True):
    """Who signed, and what for: ``role`` and ``previous`` say whether the key is of this root's role, or of the root before."""

    keyid: str
    valid: bool
    role: bool
    previous: bool = False
    #: What this root, or the one before, calls the key; empty if neither does.
    label: str = ""


class RootReport(Struct, frozen=True, kw_only=True):
    """A root for people to look at before they sign or pin it."""

    network: str
    version: int
    expires_at: datetime
    fingerprint: str
    roles: Roles
    signatures: tuple[Signer, ...]
    #: Signatures that are still missing from this root's own role, and from the one before (-1: that root was not given).
    missing: int
    missing_previous: int
    complete: bool
    #: What people call the keys, by key id; of those that have a label.
    labels: dict[str, str]


def new(
    network: str,
    expires_at: datetime,
    root: tuple[Sequence[PublicKey], int],
    snapshots: tuple[Sequence[PublicKey], int],
    *,
    version: int = 1,
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """
    Return a root of *network* that follows no other, unsigned; *root* and *snapshots* are each role's keys and threshold.

    *labels* are what people call the keys, by key id.

    Raises:
        PublishError: it would protect nothing, or not be a root.
    """
    roles = Roles(root=_role(*root), snapshot=_role(*snapshots))
    keys = {key.keyid: _listed(key) for key in (*root[0], *snapshots[0])}
    made = TrustRoot(schema=1, network=network, version=version, expires_at=snapshot.utc(expires_at), keys=keys, roles=roles)
    for keyid, label in (labels or {}).items():
        made = with_label(made, keyid, label)
    return _unsigned(made, {})


def _role(keys: Sequence[PublicKey], threshold: int) -> Role:
    return Role(keyids=tuple(dict.fromkeys(key.keyid for key in keys)), threshold=threshold)


def _listed(key: PublicKey) -> Key:
    return Key(scheme="ed25519", public=key.pem)


def _unsigned(root: TrustRoot, extra: dict[str, msgspec.Raw]) -> bytes:
    payload = envelopes.encode_payload(root, extra)
    try:
        decode(payload)
    except TrustError as error:
        raise PublishError(f"nodes would refuse this root: {envelopes.describe_decode_error(error.message)}") from None
    return envelopes.write(Document(kind=trust.ROOT_TYPE, payload=payload))


def decode(payload: bytes) -> TrustRoot:
    """
    Return the root in *payload*, checked as nodes check it.

    Raises:
        BadRootChain: it is no root, or one that protects nothing.
    """
    try:
        root = strict_json.decode(payload, TrustRoot)
    except ValueError as error:
        raise BadRootChain(f"not a trust root: {str(error).replace('`$.', '`')}") from None
    trust.check_root(root)
    return root


def is_signed(data: bytes) -> bool:
    """Return whether anybody signed the root in *data*: then it may be on nodes, and is never edited in place."""
    return bool(envelopes.read(data, trust.ROOT_TYPE).signatures)


def edit(data: bytes, change: Callable[[TrustRoot], TrustRoot]) -> bytes:
    """
    Return the root in *data* with *change* applied, unsigned; the next version of it if it was signed.

    Raises:
        PublishError: it would protect nothing.
    """
    document = envelopes.read(data, trust.ROOT_TYPE)
    root = decode(document.payload)
    changed = change(root)
    if document.signatures:
        changed = replace(changed, version=root.version + 1)
    used = {*changed.roles.root.keyids, *changed.roles.snapshot.keyids}
    kept = {keyid: key for keyid, key in changed.keys.items() if keyid in used}
    for keyid in _labels(changed).keys() - used:
        changed = _relabelled(changed, keyid, "")
    return _unsigned(replace(changed, keys=kept), envelopes.unknown_fields(document.payload, TrustRoot))


def with_key(root: TrustRoot, key: PublicKey, roles: Sequence[RoleName]) -> TrustRoot:
    """
    Return *root* with *key* in *roles*.

    Raises:
        PublishError: it is there already.
    """
    for name in roles:
        role: Role = getattr(root.roles, name)
        if key.keyid in role.keyids:
            raise PublishError(f"key {root.named(key.keyid)} is in role {name!r} already")
        root = _with_role(root, name, replace(role, keyids=(*role.keyids, key.keyid)))
    return replace(root, keys=root.keys | {key.keyid: _listed(key)})


def without_key(root: TrustRoot, keyid: str, roles: Sequence[RoleName]) -> TrustRoot:
    """
    Return *root* without the key that *keyid* names, by at least its first 8 digits, in *roles*.

    Raises:
        PublishError: none or several are named so, or the role could no longer sign.
    """
    found = _named(root, keyid)
    listed = [name for name in roles if found in getattr(root.roles, name).keyids]
    if not listed:
        raise PublishError(f"key {root.named(found)} is not in role {' or '.join(map(repr, roles))}")
    for name in listed:
        role: Role = getattr(root.roles, name)
        left = tuple(one for one in role.keyids if one != found)
        if len(left) < role.threshold:
            raise PublishError(
                f"role {name!r} needs {role.threshold} keys to sign, and {len(left)} would be left",
                hint=f"add the new key first, or lower the threshold with `reconcile root set FILE --{name}-threshold N`",
            )
        root = _with_role(root, name, replace(role, keyids=left))
    return root


def _named(root: TrustRoot, keyid: str) -> str:
    found = [one for one in root.keys if len(keyid) >= 8 and one.startswith(keyid.lower())]
    if len(found) != 1:
        raise PublishError(
            f"{len(found) or 'no'} keys of this root are named {keyid[:64]!r}",
            hint="give at least the first 8 digits of the key id that `reconcile root inspect FILE` shows",
        )
    return found[0]


def with_label(root: TrustRoot, keyid: str, label: str) -> TrustRoot:
    """
    Return *root* with *label* as what people call the key that *keyid* names, by at least its first 8 digits; an empty one takes it away.

    Raises:
        PublishError: none or several keys are named so, the label is too long or not printable, or another key has it.
    """
    found = _named(root, keyid)
    if label != printable(label, trust.LABEL_LENGTH) or label != label.strip():
        raise PublishError(f"a label is one line of at most {trust.LABEL_LENGTH} printable characters, as in 'release key, 2026'")
    if label and (other := next((one for one, known in _labels(root).items() if known == label and one != found), "")):
        raise PublishError(f"key {other} has the label {label!r} already", hint="two keys with one label could not be told apart")
    return _relabelled(root, found, label)


def _relabelled(root: TrustRoot, keyid: str, label: str) -> TrustRoot:
    others = {one: known for one, known in _labels(root).items() if one != keyid}
    return replace(root, labels=(others | ({keyid: label} if label else {})) or UNSET)


def _labels(root: TrustRoot) -> dict[str, str]:
    """Return the labels of *root* as people see them."""
    known = root.labels if isinstance(root.labels, dict) else {}
    return {keyid: label for keyid in known if (label := root.label(keyid))}


def with_threshold(root: TrustRoot, name: RoleName, threshold: int) -> TrustRoot:
    """Return *root* with another *threshold* for a role."""
    return _with_role(root, name, replace(getattr(root.roles, name), threshold=threshold))


def with_expiry(root: TrustRoot, expires_at: datetime) -> TrustRoot:
    """Return *root* with another end."""
    return replace(root, expires_at=snapshot.utc(expires_at))


def _with_role(root: TrustRoot, name: RoleName, role: Role) -> TrustRoot:
    return replace(root, roles=replace(root.roles, **{name: role}))


# -- signatures ------------------------------------------------------------------------------------


def sign(data: bytes, key: Any, *, previous: bytes = b"") -> bytes:
    """
    Return the root in *data* with the signature of the private *key*; all that was there stays.

    Raises:
        BadRootChain: the root protects nothing, or does not follow *previous*.
        PublishError: the key is neither of this root nor of *previous*.
    """
    document = envelopes.read(data, trust.ROOT_TYPE)
    _check_signer(document, dsse.keyid_of(key.public_key()), previous)
    return envelopes.write(envelopes.sign(document, key))


def attach(data: bytes, public: PublicKey, signature: bytes, *, previous: bytes = b"") -> bytes:
    """
    Return the root in *data* with a *signature* that was made elsewhere, for example by openssl.

    Raises:
        BadSignature: it does not hold. BadRootChain, PublishError: as ``sign``.
    """
    document = envelopes.read(data, trust.ROOT_TYPE)
    _check_signer(document, public.keyid, previous)
    return envelopes.write(envelopes.attach_signature(document, public.key, signature))


def _check_signer(document: Document, keyid: str, previous: bytes) -> None:
    root = decode(document.payload)
    allowed = set(root.roles.root.keyids)
    if previous:
        allowed |= set(_before(root, previous).roles.root.keyids)
    if keyid not in allowed:
        raise PublishError(
            f"key {root.named(keyid)} is not in the root role of root {root.version}" + (" or of the one before" if previous else ""),
            hint="" if previous else "a key of the root before signs the next one too: name that root with --previous FILE",
        )


def _before(root: TrustRoot, previous: bytes) -> TrustRoot:
    before = decode(envelopes.read(previous, trust.ROOT_TYPE).payload)
    if before.network != root.network or before.version + 1 != root.version:
        raise BadRootChain(
            f"root {root.version} of {root.network!r} does not follow root {before.version} of {before.network!r}",
            hint="--previous is the root of the version before, as it was published",
        )
    return before


def pae(data: bytes) -> bytes:
    """Return the bytes that a signer of the root in *data* signs."""
    document = envelopes.read(data, trust.ROOT_TYPE)
    decode(document.payload)
    return document.pae()


def inspect(data: bytes, *, previous: bytes = b"") -> RootReport:
    """
    Return a report on the root in *data*, signed or not.

    Raises:
        TrustError: it is no root, protects nothing, or does not follow *previous*.
    """
    document = envelopes.read(data, trust.ROOT_TYPE)
    root = decode(document.payload)
    own = _valid(document, root)
    before = _before(root, previous) if previous else None
    earlier = _valid(document, before) if before else frozenset()
    missing = max(0, root.roles.root.threshold - len(own))
    first = root.version == 1
    missing_previous = 0 if first else max(0, before.roles.root.threshold - len(earlier)) if before else -1
    return RootReport(
        network=root.network,
        version=root.version,
        expires_at=root.expires_at,
        fingerprint=trust.fingerprint_of(document.payload),
        roles=root.roles,
        signatures=tuple(
            Signer(
                keyid=one.keyid,
                valid=one.keyid in own | earlier,
                role=one.keyid in root.roles.root.keyids,
                previous=before is not None and one.keyid in before.roles.root.keyids,
                label=root.label(one.keyid) or (before.label(one.keyid) if before else ""),
            )
            for one in document.signatures
        ),
        missing=missing,
        missing_previous=missing_previous,
        complete=missing == 0 and missing_previous == 0,
        labels={keyid: label for keyid in root.keys if (label := root.label(keyid))},
    )


def _valid(document: Document, root: TrustRoot) -> frozenset[str]:
    return dsse.valid_keyids(document.envelope(), document.payload, trust.role_keys(root, root.roles.root))
