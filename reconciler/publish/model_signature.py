"""
Whether a publisher signed the files of a model: OpenSSF model signing 1.0, checked with its own library.

Rules that hold here:

1. The signature is believed for files whose name and SHA-256 it has. A file that it does not name is refused, also where the signer told
   verifiers to ignore it; one that it names and that is not added does not matter.
2. Somebody answers for the key: it is given as a file, or as certificate authorities and the name in the certificate that these issued.
3. What the library reads is what was looked at here: the bundle is written anew from the fields that are used, and no others.
4. Nothing is asked of the network. A certificate is checked for the time at which its validity began, since no such signature says when it
   was made; revocation is not looked at. Signatures of Sigstore's public service, which need its log and its roots, are refused by name.
"""

from __future__ import annotations

import base64
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reconciler.core import digest, strict_json
from reconciler.core.errors import PublishError
from reconciler.core.text import printable

#: A signature names every file of a model, each in about 150 bytes.
MOST_BYTES = 16 << 20


class Publisher(Struct, frozen=True, kw_only=True):
    """Who signed, as it is written into the snapshot."""

    #: The name in the certificate, or what the caller says of the key.
    identity: str
    #: ``key`` or ``certificate``.
    method: str
    #: SHA-256 of the key's SubjectPublicKeyInfo.
    key: str
    #: SHA-256 of the signature's file.
    signature: str


class _Bundle(Struct, frozen=True, kw_only=True):
    """What is used of a Sigstore bundle: a DSSE envelope and what to check it with."""

    media_type: str
    envelope: dict[str, Any]
    #: Certificates in DER, the signer's first; empty where it was signed with a bare key.
    certificates: tuple[bytes, ...]
    hint: str

    def encode(self) -> bytes:
        chain = {"certificates": [{"rawBytes": base64.b64encode(one).decode()} for one in self.certificates]}
        material = {"x509CertificateChain": chain} if self.certificates else {"publicKey": {"hint": self.hint or None}}
        return json.dumps(
            {
                "mediaType": self.media_type,
                "verificationMaterial": {**material, "tlogEntries": []},
                "dsseEnvelope": {name: self.envelope[name] for name in ("payload", "payloadType", "signatures")},
            }
        ).encode()


def verify(
    signature: bytes, files: Mapping[str, str], *, identity: str = "", key_file: Path | None = None, ca_file: Path | None = None
) -> Publisher:
    """
    Return who signed *files*, digests by path, with *signature*: the holder of the key in *key_file*, or *identity* by a certificate.

    Raises:
        PublishError: the signature does not hold, is somebody else's, or is not over each of *files*.
    """
    if (key_file is None) == (ca_file is None) or (ca_file and not identity):
        raise PublishError(
            "whose signature it must be is not said", hint="give --publisher-key FILE, or --publisher-ca FILE and --identity NAME"
        )
    bundle = _read(signature)
    by_certificate = ca_file is not None
    if by_certificate != bool(bundle.certificates):
        made = "a certificate's" if bundle.certificates else "a bare key's"
        raise PublishError(f"the signature is {made}", hint="--publisher-ca is for certificates, --publisher-key for bare keys")
    try:
        key = _signer(bundle, identity) if by_certificate else _public_key(key_file)
        signed = _signed_files(bundle, key_file, ca_file)
    except PublishError:
        raise
    except Exception as error:  # noqa: BLE001  the library lets those of four others through
        raise PublishError(f"the model's signature does not hold: {printable(str(error), 300) or type(error).__name__}") from None
    _compare(signed, files)
    method = "certificate" if by_certificate else "key"
    return Publisher(identity=identity or key, method=method, key=key, signature=digest.of(signature))


def _read(signature: bytes) -> _Bundle:
    if len(signature) > MOST_BYTES:
        raise PublishError(f"the model's signature has more than {MOST_BYTES:,} bytes")
    try:
        found = strict_json.decode(signature, dict[str, Any])
        material = found["verificationMaterial"]
        if material.get("certificate") or material.get("tlogEntries"):
            raise PublishError(
                "the model is signed through Sigstore, which cannot be checked without its log and its roots",
                hint="check it on a machine with a network: `model_signing verify sigstore`, and add the model without --model-signature",
            )
        chain = (material.get("x509CertificateChain") or {}).get("certificates") or []
        return _Bundle(
            media_type=found["mediaType"],
            envelope=found["dsseEnvelope"],
            certificates=tuple(base64.b64decode(one["rawBytes"], validate=True) for one in chain),
            hint=str((material.get("publicKey") or {}).get("hint") or ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PublishError("the model's signature is not a Sigstore bundle, as OpenSSF model signing writes it") from None


def _public_key(file: Path | None) -> str:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    assert file is not None
    return _key_digest(load_pem_public_key(file.read_bytes()))


def _key_digest(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return digest.of(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _signer(bundle: _Bundle, identity: str) -> str:
    """Return the digest of the key of the signer's certificate, whose chain the library checks, if it names *identity*."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(bundle.certificates[0])
    names = _names(certificate)
    if identity not in names:
        shown = ", ".join(printable(name, 100) for name in names[:4]) or "nobody"
        raise PublishError(f"the model is signed by {shown}, not by {printable(identity, 100)}")
    return _key_digest(certificate.public_key())


def _names(certificate: Any) -> list[str]:
    """Return whom *certificate* is for; the common name only where there is no subjectAltName (RFC 6125, 6.4.4)."""
    from cryptography import x509

    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [str(one.value) for one in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    kinds = (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName)
    return [name for kind in kinds for name in alternative.get_values_for_type(kind)]


def _signed_files(bundle: _Bundle, key_file: Path | None, ca_file: Path | None) -> dict[str, str]:
    """Return the digests by path that *bundle* is a valid signature of."""
    try:
        from model_signing import hashing, verifying
    except ImportError:
        hint = "`pip install model-signing` installs it"
        raise PublishError("checking a model's signature needs the library model-signing", hint=hint) from None

    seen = _Expected()

    class Measured(hashing.Config):  # type: ignore[misc,unused-ignore]
        """Gives the library, in place of a second reading of all files, what is compared here."""

        def hash(self, _model_path: Any, **_more: Any) -> Any:
            return seen

    config = verifying.Config().set_hashing_config(Measured())
    if ca_file:
        config.use_certificate_verifier(certificate_chain=[ca_file])
    else:
        config.use_elliptic_key_verifier(public_key=key_file)
    with tempfile.NamedTemporaryFile(suffix=".sig") as file:
        file.write(bundle.encode())
        file.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the library's own calls
            config.verify(Path(file.name).parent, file.name)
    return seen.files


class _Expected:
    """Takes what the library expects, once the signature over it has held."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def __eq__(self, expected: object) -> bool:
        kind: dict[str, Any] = expected.serialization_type  # type: ignore[attr-defined]
        if (kind["method"], kind["hash_type"]) != ("files", "sha256"):
            raise PublishError(
                f"the signature has {kind['method']} by {kind['hash_type']}, and whole files by sha256 are compared here",
                hint="`model_signing verify` checks it; add the model without --model-signature",
            )
        for one in expected.resource_descriptors():  # type: ignore[attr-defined]
            self.files[one.identifier] = f"{one.digest.algorithm}:{one.digest.digest_hex}"
        return True

    __hash__ = None  # type: ignore[assignment]


def _compare(signed: Mapping[str, str], files: Mapping[str, str]) -> None:
    for path, found in files.items():
        if path not in signed:
            hint = "leave it out with --exclude, or ask its publisher to sign it"
            raise PublishError(f"the publisher did not sign {printable(path, 200)}", hint=hint)
        if signed[path] != found:
            raise PublishError(f"{printable(path, 200)} is {found}, and its publisher signed {printable(signed[path], 100)}")
