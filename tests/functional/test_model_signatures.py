"""Signatures of a model's publisher, made by the real library of OpenSSF model signing: whose they are, and what they are not over."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from model_signing import hashing, signing

from tests.functional.test_operator import Terminal, accepted, ready, terminal

__all__ = ["ready", "terminal"]

pytestmark = pytest.mark.slow

ADD = "snapshot add snapshot.json signed:v1 model --engine vllm --entrypoint config.json --gpu-memory 0 --url https://h.example.org/{path}"
BY_KEY = "--model-signature model.sig --publisher-key publisher.pub"
BY_CERTIFICATE = "--model-signature model.sig --publisher-ca ca.pem --identity models@example.org"


class Publisher:
    """Has a key, a certificate for it that an authority issued, and a model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.signature = folder, folder / "model", folder / "model.sig"
        (self.model / "tokenizer").mkdir(parents=True)
        for name in ("config.json", "weights.safetensors", "tokenizer/vocabulary.txt"):
            (self.model / name).write_bytes(name.encode())
        self.key("publisher")
        self.authority("ca", "publisher", x509.RFC822Name("models@example.org"))

    def key(self, name: str) -> None:
        private = ec.generate_private_key(ec.SECP256R1())
        (self.folder / f"{name}.pem").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (self.folder / f"{name}.pub").write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def authority(self, name: str, of: str, who: x509.GeneralName | None, *, common: str = "somebody", signs: bool = True) -> None:
        """Make an authority, and let it issue a certificate for the key *of*."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        issuer, subject = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in (f"{name} CA", common))
        private = ec.generate_private_key(ec.SECP256R1())
        own = load_pem_private_key((self.folder / f"{of}.pem").read_bytes(), None).public_key()
        for path, holder, names, is_authority in ((f"{name}.pem", private.public_key(), issuer, True), (f"{of}.crt", own, subject, False)):
            made = x509.CertificateBuilder().subject_name(names).issuer_name(issuer).public_key(holder)  # type: ignore[arg-type]
            made = made.serial_number(x509.random_serial_number()).not_valid_before(datetime.now(UTC) - timedelta(days=2))
            made = made.not_valid_after(datetime.now(UTC) + timedelta(days=30))
            made = made.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            others = ("key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
            usage = dict.fromkeys(others, False)
            made = made.add_extension(
                x509.KeyUsage(
                    digital_signature=signs and not is_authority,
                    content_commitment=not signs,
                    key_cert_sign=is_authority,
                    crl_sign=is_authority,
                    **usage,
                ),
                critical=True,
            )
            if who is not None and not is_authority:
                made = made.add_extension(x509.SubjectAlternativeName([who]), critical=False)
            (self.folder / path).write_bytes(made.sign(private, SHA256()).public_bytes(Encoding.PEM))

    def sign(self, name: str = "publisher", *, certificate: bool = False, config: hashing.Config | None = None) -> None:
        signer = signing.Config()
        if config is not None:
            signer.set_hashing_config(config)
        if certificate:
            signer.use_certificate_signer(
                private_key=self.folder / f"{name}.pem",
                signing_certificate=self.folder / f"{name}.crt",
                certificate_chain=[self.folder / "ca.pem"],
            )
        else:
            signer.use_elliptic_key_signer(private_key=self.folder / f"{name}.pem")
        signer.sign(self.model, self.signature)

    def bundle(self, change: Callable[[dict[str, Any]], None]) -> None:
        found = json.loads(self.signature.read_bytes())
        change(found)
        self.signature.write_text(json.dumps(found))


@pytest.fixture
def publisher(ready: Terminal) -> Publisher:
    return Publisher(ready.folder)


def test_a_publisher_that_signed_with_a_key_is_named_in_the_snapshot(ready: Terminal, publisher: Publisher) -> None:
    publisher.sign()
    ready(f"{ADD} {BY_KEY} --identity", "Example Labs")
    assert "its files are signed by Example Labs (key, sha256:" in ready.out
    (model,) = [one for one in ready.json("snapshot inspect snapshot.json")["document"]["models"] if one["name"] == "signed"]
    assert model["publisher"]["identity"] == "Example Labs"
    assert 'models[signed:v1].publisher.identity: "Example Labs"' in ready("snapshot inspect snapshot.json --full")
    ready("snapshot edit snapshot.json signed:v1 --gpu-memory 1GiB")
    for name in ("carol", "dave"):
        ready(f"snapshot sign snapshot.json --key {name}.key")
    assert accepted(ready).snapshot.models[1].publisher["method"] == "key"
    ready("init --root root.1.json --snapshot snapshot.json")
    ready("lock")
    assert b"publisher" not in ready.bytes("models.lock")


def test_a_publisher_is_known_by_the_name_in_its_certificate(ready: Terminal, publisher: Publisher) -> None:
    publisher.sign(certificate=True)
    ready(f"{ADD} {BY_CERTIFICATE}")
    assert "its files are signed by models@example.org (certificate, sha256:" in ready.out


def test_a_part_of_what_was_signed_is_added_and_the_signature_beside_the_files_is_not(ready: Terminal, publisher: Publisher) -> None:
    publisher.sign(config=hashing.Config().set_ignored_paths(paths=[publisher.signature]))
    publisher.signature.rename(publisher.model / "model.sig")
    ready(f"{ADD} {BY_KEY.replace('model.sig', 'model/model.sig')} --exclude weights.safetensors")
    (model,) = [one for one in ready.json("snapshot inspect snapshot.json")["document"]["models"] if one["name"] == "signed"]
    assert [one["path"] for one in model["artifacts"]] == ["config.json", "tokenizer/vocabulary.txt"]


def _changed(publisher: Publisher) -> None:
    publisher.sign()
    (publisher.model / "weights.safetensors").write_bytes(b"other weights")


def _added(publisher: Publisher) -> None:
    publisher.sign()
    (publisher.model / "more.py").write_bytes(b"import os")


def _ignored(publisher: Publisher) -> None:
    """Let the signer tell verifiers to ignore a file, which somebody then replaces."""
    publisher.sign(config=hashing.Config().set_ignored_paths(paths=[publisher.model / "weights.safetensors"]))


def _of_another_key(publisher: Publisher) -> None:
    publisher.key("stranger")
    publisher.sign("stranger")


def _payload_changed(publisher: Publisher) -> None:
    publisher.sign()

    def change(found: dict[str, Any]) -> None:
        payload = base64.b64decode(found["dsseEnvelope"]["payload"])
        found["dsseEnvelope"]["payload"] = base64.b64encode(payload.replace(b"config.json", b"konfig.json")).decode()

    publisher.bundle(change)


def _in_shards(publisher: Publisher) -> None:
    publisher.sign(config=hashing.Config().use_shard_serialization(shard_size=4))


def _by_certificate(publisher: Publisher) -> None:
    publisher.sign(certificate=True)


def _by_sigstore(publisher: Publisher) -> None:
    publisher.sign()
    publisher.bundle(lambda found: found["verificationMaterial"].update(tlogEntries=[{"logIndex": "1"}]))


def _garbage(publisher: Publisher) -> None:
    publisher.signature.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (_changed, "weights.safetensors is sha256:"),
        (_added, "did not sign more.py"),
        (_ignored, "did not sign weights.safetensors"),
        (_of_another_key, "does not hold"),
        (_payload_changed, "does not hold"),
        (_in_shards, "whole files by sha256"),
        (_by_certificate, "is a certificate's"),
        (_by_sigstore, "through Sigstore"),
        (_garbage, "not a Sigstore bundle"),
    ],
)
def test_a_signature_that_is_not_over_these_files_by_this_key_adds_nothing(
    ready: Terminal, publisher: Publisher, attack: Callable[[Publisher], None], why: str
) -> None:
    before = ready.bytes("snapshot.json")
    attack(publisher)
    ready(f"{ADD} {BY_KEY}", code=1)
    assert why in ready.err
    hints: dict[Callable[[Publisher], None], str] = {
        _in_shards: "`model_signing verify` checks it; add the model without --model-signature",
        _by_certificate: "--publisher-ca is for certificates, --publisher-key for bare keys",
        _by_sigstore: "check it on a machine with a network: `model_signing verify sigstore`, and add the model without --model-signature",
    }
    assert hints.get(attack, "hint: ") in ready.err
    assert "Traceback" not in ready.err
    assert ready.bytes("snapshot.json") == before


def test_without_the_library_it_is_named(ready: Terminal, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.sign()
    monkeypatch.setitem(sys.modules, "model_signing", None)
    ready(f"{ADD} {BY_KEY}", code=1)
    assert "hint: `pip install model-signing` installs it" in ready.err


def _of_another_authority(publisher: Publisher) -> None:
    publisher.authority("thief", "publisher", x509.RFC822Name("models@example.org"))


def _of_another_name(publisher: Publisher) -> None:
    publisher.authority("ca", "publisher", x509.RFC822Name("thief@example.org"))


def _named_so_in_common_alone(publisher: Publisher) -> None:
    publisher.authority("ca", "publisher", x509.RFC822Name("thief@example.org"), common="models@example.org")


def _not_for_signatures(publisher: Publisher) -> None:
    publisher.authority("ca", "publisher", x509.RFC822Name("models@example.org"), signs=False)


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (_of_another_authority, "does not hold"),
        (_of_another_name, "signed by thief@example.org, not by models@example.org"),
        (_named_so_in_common_alone, "signed by thief@example.org, not by models@example.org"),
        (_not_for_signatures, "cannot be used for signing"),
    ],
)
def test_a_certificate_that_is_not_the_publishers_adds_nothing(
    ready: Terminal, publisher: Publisher, attack: Callable[[Publisher], None], why: str
) -> None:
    before = ready.bytes("snapshot.json")
    attack(publisher)
    publisher.sign(certificate=True)
    ready(f"{ADD} {BY_CERTIFICATE}", code=1)
    assert why in ready.err
    assert ready.bytes("snapshot.json") == before


@pytest.mark.parametrize("line", ["", "--identity models@example.org", "--publisher-ca ca.pem", "--publisher-ca ca.pem --publisher-key a"])
def test_whose_signature_it_must_be_is_said(ready: Terminal, publisher: Publisher, line: str) -> None:
    publisher.sign()
    ready(f"{ADD} --model-signature model.sig {line}", code=1)
    assert "whose signature it must be is not said" in ready.err
    assert "hint: give --publisher-key FILE, or --publisher-ca FILE and --identity NAME" in ready.err


@pytest.mark.parametrize("kind", [3, None, [], "Example Labs", {"identity": 3}])
def test_what_older_versions_ignore_there_no_version_refuses(kind: object) -> None:
    from reconciler.core import snapshot
    from tests.network import Network, compact

    network = Network()
    model = network.model("a:v1", b"a", publisher=kind)
    assert snapshot.decode(compact(network.snapshot_document(model))).models[0].id == "a:v1"
