"""
``snapshot`` commands for those who sign: look at a snapshot, compare two, sign one.

Rules that hold here:

1. The bytes of a file are read once: what is shown or compared with ``--reviewed`` is what is signed.
2. On a terminal, whoever signs without ``--reviewed`` is shown what is signed, and asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io
from reconciler.cli.command_context import to_json
from reconciler.cli.document_io import JSON, PASSPHRASE
from reconciler.cli.options import FILE, YES
from reconciler.core import units
from reconciler.core.errors import PublishError
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.publish.differences import Changed, Difference
    from reconciler.publish.snapshots import SnapshotReport

_ROOT = click.option("--root", "root_file", type=FILE, help="The network's root, to check who may sign and how many must.")


@click.command("sign")
@click.argument("file", type=FILE)
@document_io.KEY
@document_io.SIGNER_COMMAND
@_ROOT
@click.option(
    "--reviewed", default="", show_default=False, metavar="DIGEST", help="Sign only the snapshot with this digest: the one you read."
)
@click.option("--no-lint", is_flag=True, help="Sign although `snapshot lint` finds errors.")
@click.option("--against", type=FILE, help="The snapshot that was signed last: on a terminal, show what changed since, and ask.")
@YES
@PASSPHRASE
def snapshot_sign(
    *, file: Path, key_file: Path, signer: str, root_file: Path | None, reviewed: str, no_lint: bool, against: Path | None, yes: bool,
    passphrase_file: Path | None,
) -> None:  # fmt: skip
    """
    Add your signature and keep the others'. First read the snapshot: `diff` against the last one, or `inspect --full`.

    \b
      reconcile snapshot sign snapshot.json --key ci.key --root root.json --reviewed sha256:…
      reconcile snapshot sign snapshot.json --key ci.pub --signer hsm-sign --root root.json
      reconcile snapshot sign snapshot.json --key ci.pub --signer 'pkcs11:token=release;object=ci?module-path=…'

    --reviewed refuses any other snapshot than the one that `inspect` and `diff` showed. Without it, and on a terminal, what is signed is
    shown before you are asked. What `snapshot lint` calls an error is not signed, and its warnings are shown.

    A --signer is a command that reads the bytes to be signed and writes the signature, or the URI of a key in a token; --key is then the
    public key.
    """
    from reconciler.publish import snapshots

    trusted = document_io.load_root(root_file)
    data, now = document_io.read_snapshot(file), document_io.now()
    warnings = [] if no_lint else _lint(data)
    if not (reviewed or yes) and sys.stdin.isatty():
        _show_and_ask(data, against, warnings)
    if signer:
        command, public = document_io.external_signer(signer, passphrase_file), document_io.public_key(key_file)
        made = snapshots.sign_with(data, public, command, now=now, root=trusted, reviewed=reviewed)
    else:
        made = snapshots.sign(data, document_io.private_key(key_file, passphrase_file), now=now, root=trusted, reviewed=reviewed)
    _signed(file, made, root_file)
    for warning in warnings:
        document_io.note(warning)


def _lint(data: bytes) -> list[str]:
    """Refuse to sign what no node would serve; return what a person should look at."""
    from reconciler.publish import lint, snapshots

    findings = lint.before_signing(snapshots.open_(data))
    return [printable(f"{one.id}: {one.text}" if one.id else one.text) for one in findings]


def _show_and_ask(data: bytes, against: Path | None, warnings: list[str]) -> None:
    from reconciler.publish import contents, differences, snapshots

    if against:
        shown = _difference(differences.diff(document_io.read_snapshot(against), data))
    else:
        shown = contents.lines(snapshots.everything(data))
    for line in (*shown, *(f"warning: {one}" for one in warnings)):
        click.echo(line, err=True)
    digest = snapshots.inspect(data).digest
    if not click.confirm(f"Sign snapshot {digest}?", err=True):
        raise PublishError("nothing was signed")


@click.command("attach")
@click.argument("file", type=FILE)
@document_io.SIGNER
@document_io.SIGNATURE
@_ROOT
def snapshot_attach(*, file: Path, key_file: Path, signature: Path, root_file: Path | None) -> None:
    """
    Add a signature that was made elsewhere over the bytes of `reconcile snapshot pae`.

    \b
      reconcile snapshot pae snapshot.json > to-sign
      openssl pkeyutl -sign -rawin -inkey ci.key -in to-sign -out sig
      reconcile snapshot attach snapshot.json --key ci.pub --signature sig
    """
    from reconciler.publish import snapshots

    data, key, trusted = document_io.read_snapshot(file), document_io.public_key(key_file), document_io.load_root(root_file)
    _signed(file, snapshots.attach(data, key, document_io.read_signature(signature), now=document_io.now(), root=trusted), root_file)


def _signed(file: Path, data: bytes, root_file: Path | None) -> None:
    from reconciler.publish import snapshots

    document_io.write(file, data)
    found = snapshots.inspect(data, root=document_io.load_root(root_file))
    if found.other_fields:
        document_io.note(f"nodes ignore fields that this version does not know: {printable(', '.join(found.other_fields))}")
    document_io.print_line(
        f"signed {file}: snapshot {found.version} of {found.network}, {units.count(len(found.models), 'model')}, {found.digest}"
    )
    for one in found.signatures:
        if one.label:
            document_io.print_line(f"signed by {document_io.named(one.keyid, one.label)}")
    document_io.print_line(_completeness(found))


def _completeness(found: SnapshotReport) -> str:
    if found.missing < 0:
        return f"{units.count(len(found.signatures), 'signature')}; --root FILE shows whether they are enough"
    return (
        "complete: nodes will accept it" if found.missing == 0 else f"incomplete: it needs {units.count(found.missing, 'more signature')}"
    )


def _pae(file: Path) -> bytes:
    from reconciler.publish import snapshots

    return snapshots.pae(document_io.read_snapshot(file))


snapshot_pae = document_io.pae_command(_pae)


@click.command("inspect")
@click.argument("file", type=FILE)
@_ROOT
@click.option("--full", is_flag=True, help="Show every value that is signed.")
@JSON
def snapshot_inspect(*, file: Path, root_file: Path | None, full: bool, as_json: bool) -> None:
    """
    Show a snapshot, signed or not. With --root, check its signatures. With --full or --json, show everything that is signed.

    \b
      reconcile snapshot inspect snapshot.json --root root.json
      reconcile snapshot inspect snapshot.json --full
    """
    from reconciler.publish import contents, snapshots

    data = document_io.read_snapshot(file)
    found = snapshots.inspect(data, root=document_io.load_root(root_file))
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(f"snapshot {found.version} of {found.network}, {found.digest}")
    if full:
        for line in contents.lines(snapshots.everything(data)):
            document_io.print_line(line)
        document_io.print_line("")
    else:
        _print_models(found)
    if found.other_fields:
        document_io.print_line(f"further fields: {printable(', '.join(found.other_fields))}")
        document_io.print_line("this version does not know what these are for: this view cannot say what they do")
    for one in found.signatures:
        held = {True: "valid", False: "NOT VALID, or not a key of the root", None: "not checked"}[one.valid]
        document_io.print_line(f"signed by {document_io.named(one.keyid, one.label)} ({held})")
    document_io.print_line(_completeness(found))


def _print_models(found: SnapshotReport) -> None:
    document_io.print_line(f"issued {units.rfc3339(found.issued_at)}, expires {units.rfc3339(found.expires_at)}")
    for model in found.models:
        document_io.print_line(
            f"  {model.id:<40} {model.state:<9} {units.human_size(model.bytes):>10}  {', '.join(model.tasks)}  {model.engine}"
        )
    document_io.print_line(f"{units.count(len(found.models), 'model')}, {units.human_size(found.bytes)} in all")


@click.command("export")
@click.argument("file", type=FILE)
@click.option("--format", "form", type=click.Choice(["cyclonedx"]), required=True, help="A CycloneDX 1.6 bill of materials.")
@click.option("--out", type=FILE, help="Write to this file instead of standard output.")
def snapshot_export(*, file: Path, form: str, out: Path | None) -> None:
    """
    Write what a snapshot lists as a bill of materials, for tools that read those.

    \b
      reconcile snapshot export snapshot.json --format cyclonedx --out models.cdx.json
    """
    from reconciler.commands import bill_of_materials
    from reconciler.publish import snapshots

    assert form == "cyclonedx"
    data = document_io.read_snapshot(file)
    text = to_json(bill_of_materials.of_snapshot(snapshots.open_(data), snapshots.inspect(data).digest))
    if out:
        document_io.write(out, text.encode())
    else:
        click.echo(text, nl=False)


@click.command("diff")
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown"]),
    default="text",
    help="How it is written: for a terminal, or for a pull request.",
)
@JSON
def snapshot_diff(*, before: Path, after: Path, form: str, as_json: bool) -> None:
    """
    Show what changed between two snapshots, signed or not: what nodes will do, then value by value.

    \b
      reconcile snapshot diff published.json snapshot.json
      reconcile snapshot diff published.json snapshot.json --format markdown > comment.md
    """
    from reconciler.publish import differences, snapshots

    old, new = document_io.read_snapshot(before), document_io.read_snapshot(after)
    found = differences.diff(old, new)
    if as_json:
        document_io.print_json(found)
        return
    for line in _markdown(found) if form == "markdown" else _difference(found):
        document_io.print_line(line)
    document_io.print_line(f"to sign it: --reviewed {snapshots.inspect(new).digest}")


def _difference(found: Difference) -> Iterator[str]:
    yield f"snapshot {found.before} -> {found.after}"
    yield f"expires {' -> '.join(dict.fromkeys(units.rfc3339(at) for at in found.expires_at))}"
    for sentence in found.summary:
        yield f"! {printable(sentence)}"
    for sign, ids in (("+", found.added), ("-", found.removed)):
        for model_id in ids:
            yield f"{sign} {model_id}"
            yield from (f"    {_text(change)}" for change in found.listed if change.id == model_id)
    yield from (f"~ {_place(change)}: {_text(change, with_field=False)}" for change in found.changed)
    if not (found.added or found.removed or found.changed):
        yield "no differences"


def _markdown(found: Difference) -> Iterator[str]:
    yield f"### Snapshot {found.before} → {found.after}"
    yield ""
    yield f"Expires {' → '.join(dict.fromkeys(units.rfc3339(at) for at in found.expires_at))}."
    yield ""
    yield from (f"- {_inert(sentence)}" for sentence in found.summary)
    rows = (*found.changed, *found.listed)
    if not rows:
        yield "No differences."
        return
    yield from ("", "| model | field | before | after |", "|---|---|---|---|")
    for change in rows:
        cells = (
            change.id,
            change.field,
            "" if change.op == "add" else _value(change.before),
            "" if change.op == "remove" else _value(change.after),
        )
        yield f"| {' | '.join(_inert(cell) for cell in cells)} |"
    yield ""


#: What Markdown, HTML and the sites that show it act on.
_ACTIVE = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*_{}[]<>()|#!&~@:"})


def _inert(text: str) -> str:
    """Return *text* as plain text in Markdown: no link, no image, no mention, no HTML and no further cell comes of it."""
    return printable(text).translate(_ACTIVE)


def _place(change: Changed) -> str:
    return printable(f"{change.id} {change.field}" if change.id else change.field)


def _text(change: Changed, *, with_field: bool = True) -> str:
    before = "(none)" if change.op == "add" else _value(change.before)
    after = "(none)" if change.op == "remove" else _value(change.after)
    value = f"{before} -> {after}" if change.op == "change" or not with_field else after if change.op == "add" else before
    return f"{printable(change.field)}: {value}" if with_field else value


def _value(value: object) -> str:
    from reconciler.publish import contents

    return contents.shown(value)
