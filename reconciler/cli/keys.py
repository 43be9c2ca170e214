"""The commands ``key``: make and show signing keys, on a machine without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON, PASSPHRASE
from reconciler.cli.options import FILE
from reconciler.core.errors import PublishError

if TYPE_CHECKING:
    from reconciler.publish.keys import PublicKey


@click.group()
def key() -> None:
    """Make and show signing keys."""


@key.command("generate")
@click.argument("name", type=FILE)
@click.option("--no-passphrase", is_flag=True, help="Leave the private key unencrypted, for a machine that signs without a person.")
@PASSPHRASE
@JSON
def key_generate(*, name: Path, no_passphrase: bool, passphrase_file: Path | None, as_json: bool) -> None:
    """
    Make an Ed25519 key pair: NAME.key is secret, NAME.pub goes into the trust root.

    \b
      reconcile key generate alice

    NAME.key is a PKCS8 PEM file with mode 0600, which openssl reads too. An existing file is never overwritten.
    """
    from reconciler.publish import keys
    from reconciler.store import atomic

    private, public = document_io.with_suffix(name, ".key"), document_io.with_suffix(name, ".pub")
    for path in (private, public):
        if path.exists():
            raise PublishError(f"{path} already exists", hint="choose another name: a key that is overwritten is lost")
    phrase = b"" if no_passphrase else document_io.passphrase(passphrase_file, str(private), confirm=True)()
    if not phrase and not no_passphrase:
        raise PublishError("the passphrase is empty", hint="--no-passphrase leaves the key unencrypted")
    pair = keys.generate(phrase)
    atomic.create(private, pair.private_pem, 0o600)
    atomic.create(public, pair.public_pem.encode())
    if as_json:
        document_io.print_json({"keyid": pair.keyid, "private": str(private), "public": str(public)})
        return
    document_io.print_line(f"wrote {private} (secret) and {public} (for the trust root)\nkey id {pair.keyid}")


@key.command("show")
@click.argument("file", type=FILE)
@PASSPHRASE
@JSON
def key_show(*, file: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """
    Show a key's id and its public half; FILE is either half, or the pkcs11: URI of a key in a token.

    \b
      reconcile key show alice.pub
      reconcile key show alice.key > alice.pub     make a lost public half again
      reconcile key show 'pkcs11:token=release;object=ci?module-path=/usr/lib/softhsm/libsofthsm2.so' > ci.pub
    """
    found = _public_half(file, passphrase_file)
    if as_json:
        document_io.print_json({"keyid": found.keyid, "public": found.pem})
        return
    click.echo(f"key id {found.keyid}", err=True)
    click.echo(found.pem, nl=False)


def _public_half(file: Path, passphrase_file: Path | None) -> PublicKey:
    from reconciler.publish import keys, pkcs11_token

    if str(file).startswith(pkcs11_token.SCHEME):
        return document_io.token_key(str(file), passphrase_file)
    pem = document_io.read(file)
    if b"PRIVATE KEY" in pem:
        return keys.load_public(keys.public_pem(document_io.private_key(file, passphrase_file)).encode())
    return document_io.public_key(file)
