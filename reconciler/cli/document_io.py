"""
Reading and writing of keys, passphrases, times and signed documents, for the commands of the network's operator.

Nothing is decided here: ``publish`` decides what may be signed. Files are written atomically, and a new file never replaces another.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.cli.command_context import to_json
from reconciler.cli.options import FILE
from reconciler.core import units
from reconciler.core.errors import PublishError
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.core.trust import TrustRoot
    from reconciler.publish.keys import PublicKey
    from reconciler.publish.snapshots import EditResult

_MOST_KEY_BYTES = 64 << 10


class FutureTime(click.ParamType[datetime]):
    """A future instant: ``30d`` (from now), ``2027-11-20``, or ``2027-11-20T00:00:00Z``."""

    name = "end"

    def convert(self, value: str | datetime, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the instant that *value* names."""
        if isinstance(value, datetime):
            return value
        try:
            end = _instant(value) or now() + timedelta(seconds=units.seconds(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a time such as 30d, 2027-11-20 or 2027-11-20T00:00:00Z", param, ctx)
        if end <= now():
            self.fail(f"{value} is in the past", param, ctx)
        return end


def _instant(text: str) -> datetime | None:
    if "-" not in text:
        return None
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


PASSPHRASE = click.option(
    "--passphrase-file",
    type=FILE,
    envvar="RECONCILE_PASSPHRASE_FILE",
    show_envvar=True,
    help="A file whose first line is the passphrase, or the PIN of a token. Default: ask on the terminal.",
)
KEY = click.option("--key", "key_file", type=FILE, required=True, help="Your private key; with --signer, its public half.")
SIGNER_COMMAND = click.option(
    "--signer",
    default="",
    show_default=False,
    metavar="COMMAND",
    help="A command that signs: it gets the bytes on standard input and writes the signature. Or the pkcs11: URI of a key in a token. "
    "--key is then the public key.",
)
SIGNER = click.option("--key", "key_file", type=FILE, required=True, help="The signer's public key.")
SIGNATURE = click.option("--signature", type=FILE, required=True, help="The signature: 64 bytes, or base64 of them.")
JSON = click.option("--json", "as_json", is_flag=True, help="Write JSON to standard output.")


def now() -> datetime:
    """Return the current instant."""
    from reconciler.commands.context import wall_clock

    return wall_clock()


def read(path: Path, *, most: int = 32 << 20, maker: str = "") -> bytes:
    """
    Return the bytes of *path*, at most one more than *most*, so that the check of the size sees that there are too many.

    *maker* is the command that makes such a file; the hint names it if there is none.

    Raises:
        PublishError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        hint = f"`{maker}` makes one" if maker and isinstance(error, FileNotFoundError) else ""
        raise PublishError(f"{path} cannot be read: {error.strerror}", hint=hint) from None


def write(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write *data* to *path*, atomically; a *new* file never replaces another."""
    from reconciler.store import atomic

    if new and path.exists():
        raise PublishError(f"{path} already exists", hint="choose another name; nothing is overwritten")
    if new:
        atomic.create(path, data)
    else:
        atomic.write(atomic.target_of(path), data)


def read_snapshot(file: Path) -> bytes:
    """Return the bytes of a snapshot's envelope; raises PublishError."""
    return read(file, maker=f"reconcile snapshot new {file} --network NAME")


def write_snapshot(file: Path, made: EditResult) -> None:
    """Write the edited snapshot *made* to *file* and report which signatures it no longer has."""
    write(file, made.data)
    if made.dropped:
        note(f"{units.count(len(made.dropped), 'signature')} no longer valid and removed: {', '.join(key[:16] for key in made.dropped)}")
    print_line(f"wrote {file}: snapshot {made.version}, unsigned")


def passphrase(path: Path | None, what: str, *, confirm: bool = False) -> Callable[[], bytes]:
    """Return a function that returns the passphrase: the first line of *path*, or a person's answer on the terminal."""

    def ask() -> bytes:
        if path is not None:
            return read(path, most=_MOST_KEY_BYTES).split(b"\n", 1)[0].rstrip(b"\r")
        if not sys.stdin.isatty():
            raise PublishError(
                f"there is no terminal to ask for the passphrase of {what}",
                hint="name a file that only you can read with --passphrase-file" + (", or give --no-passphrase" if confirm else ""),
            )
        given: str = click.prompt(f"Passphrase of {what}", hide_input=True, confirmation_prompt=confirm, err=True)
        return given.encode()

    return ask


def private_key(path: Path, passphrase_file: Path | None) -> Any:
    """Return the private key in *path*."""
    from reconciler.publish import keys

    pem = read(path, most=_MOST_KEY_BYTES)
    with _named(path):
        key = keys.load_private(pem, passphrase(passphrase_file, str(path)))
    if b"ENCRYPTED" not in pem and path.stat().st_mode & 0o077:
        note(f"{path} has no passphrase and others on this machine may read it: chmod 600 {path}")
    return key


def public_key(path: Path) -> PublicKey:
    """Return the public key in *path*."""
    from reconciler.publish import keys

    pem = read(path, most=_MOST_KEY_BYTES)
    with _named(path):
        return keys.load_public(pem)


def external_signer(command: str, passphrase_file: Path | None) -> Callable[[bytes], bytes]:
    """Return what signs by running *command*, or with the token's key whose URI it is; the token's PIN is in *passphrase_file*."""
    from reconciler.publish import pkcs11_token
    from reconciler.publish.external_signer import ExternalSigner

    if command.startswith(pkcs11_token.SCHEME):
        return ExternalSigner(pkcs11_token.command("sign", command, passphrase_file))
    return ExternalSigner.from_command(command)


def token_key(uri: str, passphrase_file: Path | None) -> PublicKey:
    """Return the public half of the key in a token that *uri* names."""
    from reconciler.publish import external_signer, keys, pkcs11_token

    return keys.load_public(external_signer.answer(pkcs11_token.command("public", uri, passphrase_file)))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to the refusal of a key."""
    try:
        yield
    except PublishError as error:
        raise PublishError(f"{path}: {error.message}", hint=error.hint) from None


def named(keyid: str, label: str) -> str:
    """Return a key as it is shown to people: its id, and its label where it has one."""
    return f'{printable(keyid)} "{label}"' if label else printable(keyid)


def load_root(path: Path | None) -> TrustRoot | None:
    """Return the trust root in *path*, or None without a *path*."""
    from reconciler.core import trust

    return trust.pin(read(path)) if path else None


def print_line(text: str) -> None:
    """Print what was done."""
    click.echo(text)


def note(text: str) -> None:
    """Print something that must not be missed to standard error."""
    click.echo(f"note: {text}", err=True)


def print_json(value: object) -> None:
    """Print *value* as JSON."""
    click.echo(to_json(value), nl=False)


def read_signature(path: Path) -> bytes:
    """Return the signature in *path*."""
    from reconciler.publish import envelopes

    return envelopes.decode_signature(read(path, most=1024))


def pae_command(pae: Callable[[Path], bytes]) -> click.Command:
    """Return the command ``pae``, which prints the bytes that *pae* returns for a file."""

    @click.command("pae")
    @click.argument("file", type=FILE)
    @click.option("--out", type=FILE, help="Write to this file instead of standard output.")
    def command(*, file: Path, out: Path | None) -> None:
        """Print the bytes to be signed, for openssl or a hardware token."""
        _raw(pae(file), out)

    return command


def _raw(data: bytes, out: Path | None) -> None:
    """Write bytes to a file or a pipe; never to a terminal, which would interpret them."""
    if out:
        write(out, data)
    elif sys.stdout.isatty():
        raise PublishError("the bytes to be signed are not printed on a terminal", hint="pipe them to a program, or name a file with --out")
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def with_suffix(path: Path, suffix: str) -> Path:
    """Return *path* with *suffix* in place of ``.key``, or added."""
    return path.with_name(path.name.removesuffix(".key") + suffix)
