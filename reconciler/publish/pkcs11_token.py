"""
Signing with a key that stays in a hardware token or an HSM: PKCS #11 (OASIS), the key named by a URI (RFC 7512).

Rules that hold here:

1. The vendor's module is a shared library that may crash or hang: it is loaded into a process of its own, which ``external_signer`` runs.
2. The PIN is on no command line and in no environment, where others would see it: it comes from a file, the terminal or the token's keypad.
3. A URI names one key of one token. Where it fits several, nothing is signed.
4. All bytes are signed in one call (``C_Sign``): tokens cannot sign with Ed25519 in parts, and tools that send parts sign only the first.
"""

from __future__ import annotations

import base64
import getpass
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from msgspec import Struct

from reconciler.core.errors import PublishError
from reconciler.core.text import printable

SCHEME = "pkcs11:"
_HINT = "as in 'pkcs11:token=release;object=key2026?module-path=/usr/lib/softhsm/libsofthsm2.so'"
#: Attributes of a URI that tell tokens apart, and what the library calls them.
_TOKEN = {"token": "label", "serial": "serial", "model": "model", "manufacturer": "manufacturer_id"}
#: SubjectPublicKeyInfo of an Ed25519 key, before its 32 bytes (RFC 8410, 4).
_SPKI = bytes.fromhex("302a300506032b6570032100")


class KeyUri(Struct, frozen=True, kw_only=True):
    """Which key of which token, and the library that speaks with it."""

    #: By RFC 7512's names; of the key, ``object`` and ``id``.
    attributes: dict[str, bytes]
    module: str


def parse(uri: str) -> KeyUri:
    """
    Return the key that *uri* names; the module may also be in ``$PKCS11_MODULE``.

    Raises:
        PublishError: it is no such URI, has a PIN in it, or says something that is not looked at here.
    """
    path, _, query = uri.removeprefix(SCHEME).partition("?")
    found = dict(_pair(part) for part in path.split(";") if part)
    asked = dict(_pair(part) for part in query.split("&") if part)
    if "pin-value" in asked or "pin-source" in asked:
        raise PublishError("the URI of the key has a PIN in it, which others on this machine can see", hint="use --passphrase-file")
    found.pop("type", None)  # the private key signs, the public one is shown
    if unknown := sorted({*found} - {*_TOKEN, "object", "id"}) or sorted({*asked} - {"module-path"}):
        raise PublishError(f"the URI of the key says {printable(unknown[0], 40)!r}, which is not looked at", hint=_HINT)
    if not {"object", "id"} & {*found}:
        raise PublishError("the URI names no key: it has neither 'object' nor 'id'", hint=_HINT)
    module = os.fsdecode(asked.get("module-path", b"")) or os.environ.get("PKCS11_MODULE", "")
    if not module:
        raise PublishError("the URI names no module, the library that comes with the token", hint=_HINT)
    return KeyUri(attributes=found, module=module)


def _pair(part: str) -> tuple[str, bytes]:
    name, equals, value = part.partition("=")
    if not equals:
        raise PublishError(f"{printable(part, 60)!r} is no part of the URI of a key", hint=_HINT)
    return name, unquote_to_bytes(value)


def command(verb: str, uri: str, pin_file: Path | None) -> list[str]:
    """Return the command line of the process that does *verb*, ``sign`` or ``public``; raises PublishError for a *uri* that is none."""
    parse(uri)
    return [sys.executable, "-P", "-s", "-m", __name__, verb, uri, str(pin_file.absolute()) if pin_file else ""]


# -- in a process of its own -----------------------------------------------------------------------


def main(verb: str, uri: str, pin_file: str) -> int:
    """Write a signature of standard input, or the public key in PEM, to standard output; return the exit code."""
    try:
        found = parse(uri)
        token = _token(found)
        made = _sign(token, found, pin_file, sys.stdin.buffer.read()) if verb == "sign" else _public(token, found, pin_file)
    except PublishError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n" if error.hint else f"{error.message}\n")
        return 1
    sys.stdout.buffer.write(made)
    return 0


def _library() -> Any:
    try:
        import pkcs11
    except ImportError:
        raise PublishError("keys in tokens need python-pkcs11", hint="`pip install python-pkcs11` installs it") from None
    return pkcs11


def _token(uri: KeyUri) -> Any:
    pkcs11 = _library()
    try:
        found = [token for token in pkcs11.lib(uri.module).get_tokens() if _is(token, uri)]
    except (pkcs11.PKCS11Error, RuntimeError, OSError) as error:
        raise PublishError(f"the module {uri.module} gives no tokens: {_why(error)}") from None
    if len(found) != 1:
        raise PublishError(f"{len(found) or 'no'} tokens of {uri.module} are the one that the URI names", hint=_HINT)
    return found[0]


def _is(token: Any, uri: KeyUri) -> bool:
    return all(_bytes(getattr(token, _TOKEN[name])) == value for name, value in uri.attributes.items() if name in _TOKEN)


def _bytes(value: str | bytes) -> bytes:
    return (value.encode() if isinstance(value, str) else bytes(value)).rstrip(b" \0")


def _why(error: Exception) -> str:
    return printable(str(error), 200) or type(error).__name__


def _pin(token: Any, pin_file: str) -> Any:
    """Return the PIN, or what lets the token ask for it; None for a token that needs none."""
    pkcs11 = _library()
    if not token.flags & pkcs11.TokenFlag.LOGIN_REQUIRED:
        return None
    if pin_file:
        try:
            return Path(pin_file).read_text().split("\n", 1)[0].rstrip("\r")
        except (OSError, UnicodeError):
            raise PublishError(f"the file with the PIN, {pin_file}, cannot be read") from None
    if token.flags & pkcs11.TokenFlag.PROTECTED_AUTHENTICATION_PATH:
        return pkcs11.PROTECTED_AUTH
    if not os.access("/dev/tty", os.W_OK) or not _has_terminal():
        raise PublishError("there is no terminal to ask for the PIN", hint="name a file that only you can read with --passphrase-file")
    return getpass.getpass(f"PIN of {token.label}: ")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _sign(token: Any, uri: KeyUri, pin_file: str, message: bytes) -> bytes:
    pkcs11 = _library()
    try:
        with token.open(user_pin=_pin(token, pin_file)) as session:
            signature: bytes = _key(session, uri, pkcs11.ObjectClass.PRIVATE_KEY).sign(message, mechanism=pkcs11.Mechanism.EDDSA)
            return signature
    except pkcs11.PKCS11Error as error:
        raise PublishError(f"the token did not sign: {_why(error)}", hint=_hint_for(error)) from None


def _public(token: Any, uri: KeyUri, pin_file: str) -> bytes:
    pkcs11 = _library()
    try:
        with token.open(user_pin=_pin(token, pin_file) if pin_file else None) as session:
            key = _key(session, uri, pkcs11.ObjectClass.PUBLIC_KEY)
            point = bytes(key[pkcs11.Attribute.EC_POINT])
    except pkcs11.PKCS11Error as error:
        raise PublishError(f"the token does not show the public key: {_why(error)}", hint=_hint_for(error)) from None
    body = base64.b64encode(_SPKI + _raw_point(point)).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n".encode()


def _raw_point(point: bytes) -> bytes:
    """Return the 32 bytes of an Ed25519 public key from CKA_EC_POINT: bare, or in an OCTET STRING or BIT STRING."""
    for prefix in (b"", b"\x04\x20", b"\x03\x21\x00"):
        if len(point) == 32 + len(prefix) and point.startswith(prefix):
            return point[len(prefix) :]
    raise PublishError("the key in the token is not an Ed25519 key", hint="`pkcs11-tool --keypairgen --key-type EC:edwards25519` makes one")


def _key(session: Any, uri: KeyUri, kind: Any) -> Any:
    pkcs11 = _library()
    wanted = {pkcs11.Attribute.CLASS: kind}
    if "object" in uri.attributes:
        wanted[pkcs11.Attribute.LABEL] = uri.attributes["object"].decode(errors="replace")
    if "id" in uri.attributes:
        wanted[pkcs11.Attribute.ID] = uri.attributes["id"]
    found = [*session.get_objects(wanted)]
    if len(found) != 1:
        what = "private" if kind == pkcs11.ObjectClass.PRIVATE_KEY else "public"
        hint = "" if what == "private" else "some tokens show public keys only to who knows the PIN: give --passphrase-file"
        raise PublishError(f"the token has {len(found) or 'no'} {what} keys as the URI names", hint=hint)
    return found[0]


def _hint_for(error: Exception) -> str:
    return "the PIN is wrong; a token locks itself after a few of those" if type(error).__name__ == "PinIncorrect" else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
