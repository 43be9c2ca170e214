"""Keys as the operator makes and hands them over."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from reconciler.core.errors import PublishError
from reconciler.publish import keys


def never() -> bytes:
    raise AssertionError("nobody should be asked for a passphrase")


def test_a_new_key_loads_and_its_halves_belong_together() -> None:
    pair = keys.generate()
    private = keys.load_private(pair.private_pem, never)
    public = keys.load_public(pair.public_pem.encode())
    assert keys.public_pem(private) == pair.public_pem == public.pem
    assert public.keyid == pair.keyid


def test_two_keys_are_never_the_same() -> None:
    assert len({keys.generate().keyid for _ in range(20)}) == 20


def test_a_key_under_a_passphrase_opens_with_it_alone() -> None:
    pair = keys.generate(b"open sesame")
    assert b"ENCRYPTED" in pair.private_pem
    assert keys.public_pem(keys.load_private(pair.private_pem, lambda: b"open sesame")) == pair.public_pem
    for wrong in (b"", b"open sesam", b"open sesame\n"):
        with pytest.raises(PublishError, match="passphrase"):
            keys.load_private(pair.private_pem, lambda wrong=wrong: wrong)  # type: ignore[misc]


def test_a_private_key_is_in_no_repr_and_no_refusal() -> None:
    pair = keys.generate()
    secret = pair.private_pem.decode().splitlines()[1]
    assert secret not in repr(pair)
    damaged = pair.private_pem.replace(secret.encode(), secret.encode()[:-8])
    with pytest.raises(PublishError) as found:
        keys.load_private(damaged, never)
    assert secret[:16] not in found.value.message + found.value.hint


def test_a_private_key_handed_over_as_a_public_one_is_refused() -> None:
    for pair in (keys.generate(), keys.generate(b"x")):
        with pytest.raises(PublishError, match="this is a private key"):
            keys.load_public(pair.private_pem)


def test_a_public_key_handed_over_as_a_private_one_is_refused() -> None:
    with pytest.raises(PublishError, match="not a private key"):
        keys.load_private(keys.generate().public_pem.encode(), never)


def test_keys_of_other_algorithms_are_refused() -> None:
    for other in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())):
        pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(PublishError, match="Ed25519"):
            keys.load_private(pem, never)
        public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(PublishError, match="Ed25519"):
            keys.load_public(public)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_refused(data: bytes) -> None:
    with pytest.raises(PublishError):
        keys.load_public(data)
    with pytest.raises(PublishError):
        keys.load_private(data.replace(b"PUBLIC", b"PRIVATE"), never)


def test_openssl_makes_keys_that_are_taken_and_reads_ours(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> bytes:
        return subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=30).stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "theirs.key")
    public = keys.load_public(openssl("pkey", "-in", "theirs.key", "-pubout"))
    assert keys.public_pem(keys.load_private((tmp_path / "theirs.key").read_bytes(), never)) == public.pem
    assert hashlib.sha256(openssl("pkey", "-in", "theirs.key", "-pubout", "-outform", "DER")).hexdigest() == public.keyid
    ours = keys.generate(b"word")
    (tmp_path / "ours.key").write_bytes(ours.private_pem)
    assert openssl("pkey", "-in", "ours.key", "-passin", "pass:word", "-pubout").decode() == ours.public_pem
