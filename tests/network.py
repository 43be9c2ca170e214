"""
A network that tests control: keys, roots and snapshots, made in microseconds and as wrong as a test likes.

Documents are plain dictionaries until they are signed, so that a test can break any rule; nothing here goes through the operator's
own tools. Keys follow from the network's name, so two runs make the same bytes.

    network = Network()
    root = network.trusted()
    envelope = network.snapshot(network.model("a:v1", b"bytes"), version=3)
    verified = trust.verify(envelope, root, now=network.now, trust_state=trust.TrustState())
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from reconciler.core import dsse, trust, units

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)

Document = dict[str, Any]


class Key:
    """A signing key that follows from its label."""

    def __init__(self, label: str) -> None:
        self.private = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(label.encode()).digest())
        self.public = self.private.public_key()
        self.id = dsse.keyid_of(self.public)
        self.pem = self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def private_pem(self) -> bytes:
        """Return the unencrypted PKCS8 PEM that openssl reads."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload_type: str, payload: bytes) -> Document:
        """Return one entry of an envelope's signatures."""
        return {"keyid": self.id, "sig": b64(self.private.sign(dsse.pae(payload_type, payload)))}


def keys(label: str, count: int) -> list[Key]:
    """Return *count* keys that follow from *label*."""
    return [Key(f"{label}/{index}") for index in range(count)]


def b64(data: bytes) -> str:
    """Return base64 in the standard alphabet."""
    return base64.b64encode(data).decode()


def compact(document: Document) -> bytes:
    """Return *document* as JSON without white space."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def envelope(payload_type: str, payload: bytes, signers: Iterable[Key]) -> bytes:
    """Return *payload* in an envelope, signed by each of *signers*."""
    signatures = [key.sign(payload_type, payload) for key in signers]
    return compact({"payloadType": payload_type, "payload": b64(payload), "signatures": signatures})


def payload_of(data: bytes) -> Document:
    """Return the document in an envelope, nothing checked."""
    found: Document = json.loads(base64.b64decode(json.loads(data)["payload"]))
    return found


def signatures_of(data: bytes) -> list[Document]:
    """Return an envelope's signatures, nothing checked."""
    found: list[Document] = json.loads(data)["signatures"]
    return found


class Network:
    """A network's operators: they hold the keys, sign whatever they are told to, and count versions."""

    def __init__(
        self,
        name: str = "testnet",
        *,
        root_keys: int = 1,
        root_threshold: int = 1,
        snapshot_keys: int = 1,
        snapshot_threshold: int = 1,
        now: datetime = NOW,
    ) -> None:
        self.name = name
        self.now = now
        self.root_keys = keys(f"{name}/root", root_keys)
        self.snapshot_keys = keys(f"{name}/snapshot", snapshot_keys)
        self.root_threshold = root_threshold
        self.snapshot_threshold = snapshot_threshold
        self.root_version = 1
        self.version = 0

    # -- roots

    def root_document(self, **changes: Any) -> Document:
        """Return the payload of the current root as a dictionary, with *changes* on top."""
        listed = {key.id: {"scheme": "ed25519", "public": key.pem} for key in (*self.root_keys, *self.snapshot_keys)}
        return {
            "schema": 1,
            "network": self.name,
            "version": self.root_version,
            "expires_at": units.rfc3339(self.now + timedelta(days=365)),
            "keys": listed,
            "roles": {
                "root": {"keyids": [key.id for key in self.root_keys], "threshold": self.root_threshold},
                "snapshot": {"keyids": [key.id for key in self.snapshot_keys], "threshold": self.snapshot_threshold},
            },
        } | changes

    def root(self, *, signers: Sequence[Key] | None = None, **changes: Any) -> bytes:
        """Return the current root's envelope, signed by just as many of its keys as it asks for, or by *signers*."""
        return self.sign_root(self.root_document(**changes), signers)

    def sign_root(self, document: Document | bytes, signers: Sequence[Key] | None = None) -> bytes:
        """Return *document*, or the very bytes given, as a root's envelope."""
        payload = document if isinstance(document, bytes) else compact(document)
        chosen = self.root_keys[: self.root_threshold] if signers is None else signers
        return envelope(trust.ROOT_TYPE, payload, chosen)

    def trusted(self) -> trust.TrustRoot:
        """Return the current root as a node that pinned it holds it."""
        return trust.pin(self.root())

    def rotate(
        self,
        *,
        root_keys: Sequence[Key] | None = None,
        snapshot_keys: Sequence[Key] | None = None,
        root_threshold: int | None = None,
        snapshot_threshold: int | None = None,
        **changes: Any,
    ) -> bytes:
        """Return the next root, with other keys or thresholds, signed by enough of the old root keys and of the new."""
        before = self.root_keys[: self.root_threshold]
        self.root_keys = list(self.root_keys if root_keys is None else root_keys)
        self.snapshot_keys = list(self.snapshot_keys if snapshot_keys is None else snapshot_keys)
        self.root_threshold = root_threshold or self.root_threshold
        self.snapshot_threshold = snapshot_threshold or self.snapshot_threshold
        self.root_version += 1
        after = self.root_keys[: self.root_threshold]
        signers = before + [key for key in after if key.id not in {old.id for old in before}]
        return self.root(signers=signers, **changes)

    # -- snapshots

    def model(self, name: str, data: bytes = b"", **changes: Any) -> Document:
        """Return a model ``name:version`` of one artifact that holds *data* (its own name if none is given)."""
        base, _, version = name.partition(":")
        data = data or name.encode()
        digits = hashlib.sha256(data).hexdigest()
        file = changes.pop("path", f"{base}.gguf")
        urls = changes.pop("urls", [f"https://models.example.org/{digits}"])
        artifact = {"path": file, "digest": f"sha256:{digits}", "size": len(data), "urls": urls}
        return {
            "name": base,
            "version": version or "v1",
            "tasks": ["completion"],
            "runtime": {"engine": "llama-cpp"},
            "artifacts": [artifact],
            "entrypoint": file,
        } | changes

    def snapshot_document(self, *models: Document, **changes: Any) -> Document:
        """Return the next snapshot's payload as a dictionary, with *changes* on top; the version counts up by itself."""
        self.version = int(changes.get("version", self.version + 1))
        return {
            "schema": 1,
            "network": self.name,
            "version": self.version,
            "issued_at": units.rfc3339(self.now),
            "expires_at": units.rfc3339(self.now + timedelta(days=30)),
            "models": list(models),
        } | changes

    def snapshot(self, *models: Document, signers: Sequence[Key] | None = None, **changes: Any) -> bytes:
        """Return the next snapshot's envelope, signed by just as many keys as the root asks for, or by *signers*."""
        return self.sign_snapshot(self.snapshot_document(*models, **changes), signers)

    def sign_snapshot(self, document: Document | bytes, signers: Sequence[Key] | None = None) -> bytes:
        """Return *document*, or the very bytes given, as a snapshot's envelope."""
        payload = document if isinstance(document, bytes) else compact(document)
        chosen = self.snapshot_keys[: self.snapshot_threshold] if signers is None else signers
        return envelope(trust.SNAPSHOT_TYPE, payload, chosen)

    def verified(self, *models: Document, **changes: Any) -> trust.Verified:
        """Return the next snapshot as a node that trusts the current root verified it."""
        return trust.verify(self.snapshot(*models, **changes), self.trusted(), now=self.now, trust_state=trust.TrustState())
