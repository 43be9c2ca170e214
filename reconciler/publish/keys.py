"""
Signing keys: Ed25519, as PEM that openssl reads and writes too.

Rules that hold here:

1. A private key is PKCS8, encrypted where a passphrase is given. It appears in no message, report or other file.
2. A private key that is given where a public one is expected is refused before it is passed on.
3. A key that nodes would refuse (not Ed25519, of small order) is refused here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from reconciler.core import dsse
from reconciler.core.errors import BadRootChain, PublishError

Passphrase = Callable[[], bytes]


class KeyPair(Struct, frozen=True, kw_only=True):
    """A new key pair as the two files that it becomes."""

    keyid: str
    private_pem: bytes
    public_pem: str

    def __repr__(self) -> str:
        """Return the key's name alone: values get printed in tracebacks and logs."""
        return f"KeyPair(keyid={self.keyid!r})"


class PublicKey(Struct, frozen=True, kw_only=True):
    """A public key with its id."""

    keyid: str
    pem: str
    key: Any


def generate(passphrase: bytes = b"") -> KeyPair:
    """Return a new key pair; the private half is encrypted under *passphrase* if there is one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
    )

    key = Ed25519PrivateKey.generate()
    lock: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    return KeyPair(keyid=dsse.keyid_of(key.public_key()), private_pem=private, public_pem=public_pem(key))


def public_pem(private: Any) -> str:
    """Return the public half of a private key as PEM SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem: bytes = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def load_private(pem: bytes, passphrase: Passphrase) -> Any:
    """
    Return the private key in *pem*; *passphrase* is asked for only if the key is encrypted.

    Raises:
        PublishError: not an Ed25519 private key, or the passphrase is wrong.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if b"PRIVATE KEY" not in pem:
        raise PublishError("not a private key in PEM", hint="`reconcile key generate FILE` makes one; sign with FILE, not with FILE's .pub")
    key = _open(pem, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise PublishError("the private key is not an Ed25519 key", hint="`openssl genpkey -algorithm ed25519` makes one")
    return key


def _open(pem: bytes, passphrase: Passphrase) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(pem, None)
    except TypeError:
        password = passphrase()  # the library's way to say that the key is encrypted
    except (ValueError, UnsupportedAlgorithm):
        raise PublishError("the private key is damaged, or of a kind that is not known here") from None
    try:
        return load_pem_private_key(pem, password)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PublishError("the passphrase does not open this key") from None


def load_public(pem: bytes) -> PublicKey:
    """
    Return the public key in *pem*.

    Raises:
        PublishError: not an Ed25519 public key that nodes would take.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    if b"PRIVATE KEY" in pem:
        raise PublishError("this is a private key", hint="give the public one: `openssl pkey -in FILE -pubout`, or what ends in .pub")
    try:
        key = load_pem_public_key(pem)
        text = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        keyid = dsse.keyid_of(key)
        return PublicKey(keyid=keyid, pem=text, key=dsse.load_public_key(keyid, text))
    except (ValueError, UnsupportedAlgorithm):
        raise PublishError("not a public key in PEM") from None
    except BadRootChain as error:
        raise PublishError(f"nodes would refuse this key: {error.message}") from None
