"""
Snapshots for the network's operators: add and remove models, sign, inspect. What changes between two is in ``differences``.

Rules that hold here:

1. Nothing is written that ``snapshot.decode`` refuses, over the very bytes that are written.
2. A change makes the signatures invalid, so they are dropped, and reported; a signed snapshot that changes gets the next version.
3. Each change sets a new time of issue and keeps the lifetime: a snapshot expires, so that nodes notice a network that stops signing.
4. Who signs may say which digest was read; any other is refused, over the very bytes that are signed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from msgspec import UNSET, Raw, Struct
from msgspec.structs import replace

from reconciler.core import digest, dsse, snapshot, trust, units
from reconciler.core.errors import BadEnvelope, PublishError, WrongNetwork
from reconciler.core.snapshot import Model, Snapshot, Sources
from reconciler.core.text import printable
from reconciler.core.trust import TrustRoot
from reconciler.core.vocabulary import KnownState
from reconciler.publish import contents, envelopes, signable
from reconciler.publish.contents import Value
from reconciler.publish.envelopes import Document
from reconciler.publish.keys import PublicKey


class EditResult(Struct, frozen=True, kw_only=True):
    """A changed snapshot, with what people need to know of the change."""

    data: bytes
    version: int
    #: Key ids of the signatures that the change made invalid.
    dropped: tuple[str, ...] = ()


class Signer(Struct, frozen=True, kw_only=True):
    """Who signed; ``valid`` is unknown without a root, which carries the keys."""

    keyid: str
    valid: bool | None = None
    #: What the root calls the key; empty without one, and where it does not say.
    label: str = ""


class Entry(Struct, frozen=True, kw_only=True):
    """One model in a report."""

    id: str
    state: str
    replaces: tuple[str, ...]
    tasks: tuple[str, ...]
    engine: str
    gpu_memory: int
    memory: int
    bytes: int
    digests: tuple[str, ...]


class SnapshotReport(Struct, frozen=True, kw_only=True):
    """A snapshot for people to look at before they sign it."""

    network: str
    version: int
    issued_at: datetime
    expires_at: datetime
    digest: str
    #: Bytes of all artifacts, each blob once.
    bytes: int
    models: tuple[Entry, ...]
    fallback: tuple[str, ...]
    retest_after: str
    #: Fields that this program keeps and does not read, as in ``models[3].colour``.
    other_fields: tuple[str, ...]
    signatures: tuple[Signer, ...]
    #: Signatures that the root still asks for; -1: no root was given.
    missing: int
    #: The payload: everything that is signed, as it is signed.
    document: Raw


def new(
    network: str,
    *,
    now: datetime,
    lifetime: timedelta,
    version: int = 1,
    fallback: tuple[str, ...] = (),
    retest_after: str = "",
) -> bytes:
    """
    Return an empty snapshot of *network*, unsigned.

    Raises:
        PublishError: it would not be a snapshot.
    """
    made = Snapshot(
        schema=1,
        network=network,
        version=version,
        issued_at=snapshot.utc(now),
        expires_at=snapshot.utc(now + lifetime),
        sources=Sources(fallback=fallback),
        retest_after=retest_after or UNSET,
        models=(),
    )
    return _unsigned(envelopes.encode_payload(made, {}))


def _unsigned(payload: bytes) -> bytes:
    try:
        signable.refuse_unknown(snapshot.decode(payload), payload)
    except BadEnvelope as error:
        message = envelopes.describe_decode_error(error.message)
        raise PublishError(message.replace("not a snapshot", "nodes would refuse this snapshot", 1)) from None
    return envelopes.write(Document(kind=trust.SNAPSHOT_TYPE, payload=payload))


def new_from(data: bytes, *, now: datetime, network: str = "", version: int = 0, lifetime: timedelta | None = None) -> EditResult:
    """
    Return a snapshot that begins with all that is in *data*, unsigned: the next version of it, or the first of another *network*.

    Raises:
        PublishError: it would not be a snapshot.
    """
    before = open_(data)
    other = bool(network) and network != before.network
    version = version or (1 if other else before.version + 1)
    return edit(data, lambda found: replace(found, network=network or found.network), now=now, lifetime=lifetime, version=version)


def edit(
    data: bytes, change: Callable[[Snapshot], Snapshot], *, now: datetime, lifetime: timedelta | None = None, version: int = 0
) -> EditResult:
    """
    Return the snapshot in *data* with *change* applied, issued at *now* and unsigned; its lifetime stays if none is given.

    Its *version* is the next one if anybody signed it, unless one is given.

    Raises:
        PublishError: it would not be a snapshot.
    """
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    before = snapshot.decode(document.payload)
    lifetime = lifetime or before.expires_at - before.issued_at
    after = replace(
        change(before),
        version=version or (before.version + 1 if document.signatures else before.version),
        issued_at=snapshot.utc(now),
        expires_at=snapshot.utc(now + lifetime),
    )
    return EditResult(
        data=_unsigned(envelopes.encode_changed(document.payload, before, after)),
        version=after.version,
        dropped=tuple(signature.keyid for signature in document.signatures),
    )


def with_model(found: Snapshot, model: Model) -> Snapshot:
    """
    Return *found* with *model* after its others.

    Raises:
        PublishError: it lists one of this id.
    """
    if any(one.id == model.id for one in found.models):
        raise PublishError(
            f"the snapshot lists {model.id} already",
            hint="another content is another version, as in name:v2; `reconcile snapshot remove` takes the listed one out",
        )
    return replace(found, models=(*found.models, model))


def with_update(found: Snapshot, model: Model) -> tuple[Snapshot, tuple[str, ...]]:
    """
    Return *found* with *model*, and the ids that it replaces: those that it names, else the other enabled version of its name.

    What it replaces becomes ``retired``: each node serves it until *model* is active there, and both change in one swap (SPEC 4).

    Raises:
        PublishError: it lists one of this id, or several versions of its name are enabled.
    """
    others = tuple(one.id for one in found.models if one.name == model.name and one.state == "enabled" and one.id != model.id)
    named = model.replaces or ()
    if not named and len(others) > 1:
        raise PublishError(
            f"{len(others)} versions of {model.name} are enabled: {', '.join(others)}",
            hint="name the one that it replaces with --replaces, or keep all with --beside",
        )
    replaced = named or others
    models = tuple(replace(one, state="retired") if one.id in replaced and one.state == "enabled" else one for one in found.models)
    return with_model(replace(found, models=models), replace(model, replaces=replaced or UNSET)), replaced


def without_model(found: Snapshot, model_id: str) -> Snapshot:
    """
    Return *found* without the model *model_id*.

    Raises:
        PublishError: it lists no such model.
    """
    _ = listed(found, model_id)
    return replace(found, models=tuple(one for one in found.models if one.id != model_id))


def with_state(found: Snapshot, model_id: str, state: KnownState) -> Snapshot:
    """
    Return *found* with another wanted state of the model *model_id*.

    Raises:
        PublishError: it lists no such model.
    """
    changed = replace(listed(found, model_id), state=state)
    return replace(found, models=tuple(changed if one.id == model_id else one for one in found.models))


def with_redirects(found: Snapshot, redirects: dict[str, tuple[str, ...]]) -> Snapshot:
    """Return *found* with *redirects*, patterns by host, added to those that it permits."""
    before = found.sources.redirects or {}
    merged = before | {host: tuple(dict.fromkeys((*before.get(host, ()), *patterns))) for host, patterns in redirects.items()}
    return replace(found, sources=replace(found.sources, redirects=merged)) if redirects else found


def with_edit(found: Snapshot, model_id: str, change: Callable[[Model], Model]) -> Snapshot:
    """
    Return *found* with *change* applied to the model *model_id*.

    Raises:
        PublishError: it lists no such model, and what *change* raises.
    """
    changed = change(listed(found, model_id))
    return replace(found, models=tuple(changed if one.id == model_id else one for one in found.models))


def listed(found: Snapshot, model_id: str) -> Model:
    """
    Return the model *model_id* of *found*.

    Raises:
        PublishError: it lists no such model.
    """
    for model in found.models:
        if model.id == model_id:
            return model
    raise PublishError(f"the snapshot lists no model {model_id[:200]!r}", hint="`reconcile snapshot inspect FILE` lists them")


# -- signatures ------------------------------------------------------------------------------------


def sign(data: bytes, key: Any, *, now: datetime, root: TrustRoot | None = None, reviewed: str = "") -> bytes:
    """
    Return the snapshot in *data* with the signature of the private *key* added.

    Raises:
        PublishError: nodes would refuse it: it has expired, or the key is not one of *root*'s snapshot role. Or its digest is not the one
            that was *reviewed*.
    """
    document = _to_sign(data, dsse.keyid_of(key.public_key()), now, root, reviewed)
    return envelopes.write(envelopes.sign(document, key))


def sign_with(
    data: bytes, public: PublicKey, signer: Callable[[bytes], bytes], *, now: datetime, root: TrustRoot | None = None, reviewed: str = ""
) -> bytes:
    """
    Return the snapshot in *data* with the signature that *signer* makes with the private half of *public*, which it alone holds.

    Raises:
        BadSignature: what it returns is no signature of that key over this document. PublishError: as ``sign``.
    """
    document = _to_sign(data, public.keyid, now, root, reviewed)
    return envelopes.write(envelopes.attach_signature(document, public.key, signer(document.pae())))


def attach(data: bytes, public: PublicKey, signature: bytes, *, now: datetime, root: TrustRoot | None = None) -> bytes:
    """
    Return the snapshot in *data* with a *signature* that was made elsewhere, for example by openssl.

    Raises:
        BadSignature: it does not hold. PublishError: as ``sign``.
    """
    document = _to_sign(data, public.keyid, now, root)
    return envelopes.write(envelopes.attach_signature(document, public.key, signature))


def _to_sign(data: bytes, keyid: str, now: datetime, root: TrustRoot | None, reviewed: str = "") -> Document:
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    found = snapshot.decode(document.payload)
    if reviewed and digest.of(document.payload) != reviewed:
        raise PublishError(
            f"this is snapshot {digest.of(document.payload)}, and {printable(reviewed, 100)} was reviewed",
            hint="the file was changed since: read it again with `reconcile snapshot inspect --full FILE`",
        )
    signable.refuse_unknown(found, document.payload)
    signable.refuse_never_replaced(found)
    signable.refuse_empty_rollout(found)
    if now >= found.expires_at:
        raise PublishError(
            f"snapshot {found.version} expired at {units.rfc3339(found.expires_at)}: nodes would refuse it",
            hint="`reconcile snapshot set FILE --expires 30d` sets a new time of issue",
        )
    if root is not None:
        _check_network(found, root)
        if keyid not in root.roles.snapshot.keyids:
            message = f"key {root.named(keyid)} may not sign snapshots under root {root.version}"
            raise PublishError(message, hint="`reconcile root inspect FILE` lists who may")
    return document


def _check_network(found: Snapshot, root: TrustRoot) -> None:
    if found.network != root.network:
        raise WrongNetwork(f"the snapshot is for network {found.network!r}, the trust root for {root.network!r}")


def pae(data: bytes) -> bytes:
    """Return the bytes that a signer of the snapshot in *data* signs."""
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    snapshot.decode(document.payload)
    return document.pae()


# -- reports ---------------------------------------------------------------------------------------


def open_(data: bytes) -> Snapshot:
    """Return the snapshot in *data*, signed or not, decoded and its signatures not looked at."""
    return snapshot.decode(envelopes.read(data, trust.SNAPSHOT_TYPE).payload)


def everything(data: bytes) -> tuple[Value, ...]:
    """Return every signed value of the snapshot in *data*, signed or not."""
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    return contents.values(document.payload, snapshot.decode(document.payload))


def inspect(data: bytes, *, root: TrustRoot | None = None) -> SnapshotReport:
    """
    Return a report on the snapshot in *data*, signed or not.

    Raises:
        TrustError: it is no snapshot, or not one of *root*'s network.
    """
    document = envelopes.read(data, trust.SNAPSHOT_TYPE)
    found = snapshot.decode(document.payload)
    valid: frozenset[str] = frozenset()
    if root is not None:
        _check_network(found, root)
        valid = dsse.valid_keyids(document.envelope(), document.payload, trust.role_keys(root, root.roles.snapshot))
    sizes = {artifact.digest: artifact.size for model in found.models for artifact in model.artifacts}
    return SnapshotReport(
        network=found.network,
        version=found.version,
        issued_at=found.issued_at,
        expires_at=found.expires_at,
        digest=digest.of(document.payload),
        bytes=sum(sizes.values()),
        models=tuple(_entry(model) for model in sorted(found.models, key=lambda one: one.id)),
        fallback=found.sources.fallback,
        retest_after="" if found.retest_after is UNSET else found.retest_after,
        other_fields=envelopes.ignored_fields(document.payload, found),
        signatures=tuple(_signer(one.keyid, root, valid) for one in document.signatures),
        missing=max(0, root.roles.snapshot.threshold - len(valid)) if root else -1,
        document=Raw(document.payload),
    )


def _signer(keyid: str, root: TrustRoot | None, valid: frozenset[str]) -> Signer:
    return Signer(keyid=keyid, valid=keyid in valid, label=root.label(keyid)) if root else Signer(keyid=keyid)


def _entry(model: Model) -> Entry:
    return Entry(
        id=model.id,
        state=model.state,
        replaces=model.replaces or (),
        tasks=model.tasks,
        engine=f"{model.runtime.engine} {model.runtime.version}".strip(),
        gpu_memory=model.gpu_memory,
        memory=model.memory,
        bytes=sum(artifact.size for artifact in model.artifacts),
        digests=tuple(artifact.digest for artifact in model.artifacts),
    )
