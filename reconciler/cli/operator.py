"""
The commands of the network's operator: ``root`` is here, ``key`` is in ``keys.py`` and ``snapshot`` in ``snapshots.py``.

They need no node and no store: each reads a file, does one thing, and writes a file, so that it runs on a machine without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON, PASSPHRASE
from reconciler.cli.keys import key
from reconciler.cli.options import FILE
from reconciler.cli.snapshots import snapshot
from reconciler.core import units
from reconciler.core.errors import PublishError

if TYPE_CHECKING:
    from reconciler.core.trust import TrustRoot
    from reconciler.publish.roots import RoleName, RootReport

_OUT = click.option("--out", type=FILE, help="Write to this file. Required if FILE is signed, because nodes need every root of the chain.")
_PREVIOUS = click.option("--previous", type=FILE, help="The previous version of the root, whose keys must sign this one too.")
_ROLE = click.Choice(["root", "snapshot"])
_LABEL = click.option(
    "--label", default="", show_default=False, metavar="TEXT", help="A name of the key for people, e.g. 'release key, 2026'."
)

__all__ = ["key", "root", "snapshot"]


@click.group()
def root() -> None:
    """Make, change and sign the trust root: which keys may sign, and how many must."""


@root.command("new")
@click.argument("file", type=FILE)
@click.option("--network", required=True, metavar="NAME", help="The network's name, e.g. resultity-testnet.")
@click.option(
    "--root-key", "root_keys", multiple=True, required=True, type=FILE, help="A public key that may sign roots (may be repeated)."
)
@click.option("--root-threshold", type=click.IntRange(1), default=1, help="How many of them must sign.")
@click.option(
    "--snapshot-key",
    "snapshot_keys",
    multiple=True,
    required=True,
    type=FILE,
    help="A public key that may sign snapshots (may be repeated).",
)
@click.option("--snapshot-threshold", type=click.IntRange(1), default=1, help="How many of them must sign.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY.pub=TEXT",
    help="A name of a key for people, as in 'ci.pub=CI, 2026' (may be repeated).",
)
@click.option("--expires", type=document_io.FutureTime(), default="365d", metavar="TIME", help="When it expires: 365d, 2027-11-20, …")
@click.option(
    "--version",
    type=click.IntRange(1),
    default=1,
    help="The version; for a network that starts over, higher than any root that nodes have.",
)
def root_new(
    *,
    file: Path,
    version: int,
    network: str,
    root_keys: tuple[Path, ...],
    root_threshold: int,
    snapshot_keys: tuple[Path, ...],
    snapshot_threshold: int,
    labels: tuple[str, ...],
    expires: datetime,
) -> None:
    """
    Make the first root of a network, unsigned.

    \b
      reconcile root new 1.root.json --network testnet \\
          --root-key alice.pub --root-key bob.pub --root-threshold 2 \\
          --snapshot-key ci.pub --label 'ci.pub=CI, 2026'
    """
    from reconciler.publish import roots

    roles = [[document_io.public_key(path) for path in paths] for paths in (root_keys, snapshot_keys)]
    named = dict(_label(text) for text in labels)
    data = roots.new(network, expires, (roles[0], root_threshold), (roles[1], snapshot_threshold), version=version, labels=named)
    document_io.write(file, data, new=True)
    document_io.print_line(f"wrote {file}, unsigned; next: reconcile root sign {file} --key KEY")


def _label(text: str) -> tuple[str, str]:
    """Return the key id and the label in ``KEY.pub=TEXT``."""
    file, equals, label = text.partition("=")
    if not equals:
        hint = "write the file of the public key and its label, as in --label 'ci.pub=CI, 2026'"
        raise PublishError(f"{text!r} is not KEY.pub=TEXT", hint=hint)
    return document_io.public_key(Path(file)).keyid, label


@root.command("add-key")
@click.argument("file", type=FILE)
@click.argument("public", type=FILE, metavar="KEY.pub")
@click.option("--role", "roles_", type=_ROLE, multiple=True, required=True, help="What it may sign (may be repeated).")
@_LABEL
@_OUT
def root_add_key(*, file: Path, public: Path, roles_: tuple[RoleName, ...], label: str, out: Path | None) -> None:
    """
    Let a key sign roots or snapshots.

    \b
      reconcile root add-key 1.root.json carol.pub --role snapshot --label "Carol, 2026" --out 2.root.json
    """
    from reconciler.publish import roots

    added = document_io.public_key(public)

    def change(found: TrustRoot) -> TrustRoot:
        found = roots.with_key(found, added, roles_)
        return roots.with_label(found, added.keyid, label) if label else found

    _edit(file, out, change)


@root.command("remove-key")
@click.argument("file", type=FILE)
@click.argument("keyid", metavar="KEYID")
@click.option(
    "--role", "roles_", type=_ROLE, multiple=True, default=("root", "snapshot"), help="What it may no longer sign (may be repeated)."
)
@_OUT
def root_remove_key(*, file: Path, keyid: str, roles_: tuple[RoleName, ...], out: Path | None) -> None:
    """
    Remove a key. KEYID is its id, at least its first 8 digits, or the file of the public key.

    \b
      reconcile root remove-key 1.root.json carol.pub --role snapshot --out 2.root.json
    """
    from reconciler.publish import roots

    named = _keyid(keyid)
    _edit(file, out, lambda found: roots.without_key(found, named, roles_))


def _keyid(text: str) -> str:
    """Return the key id that *text* is, or that of the public key in the file *text*."""
    return document_io.public_key(Path(text)).keyid if Path(text).is_file() else text


@root.command("label")
@click.argument("file", type=FILE)
@click.argument("keyid", metavar="KEYID")
@click.argument("label", metavar="TEXT")
@_OUT
def root_label(*, file: Path, keyid: str, label: str, out: Path | None) -> None:
    """
    Set a key's label, a name for people. An empty TEXT removes it. KEYID is its id, at least its first 8 digits, or the public key's file.

    \b
      reconcile root label 1.root.json carol.pub "release key, 2026" --out 2.root.json

    Labels are signed with the root and shown beside key ids. Nodes accept and refuse nothing for what they say.
    """
    from reconciler.publish import roots

    named = _keyid(keyid)
    _edit(file, out, lambda found: roots.with_label(found, named, label))


@root.command("set")
@click.argument("file", type=FILE)
@click.option("--root-threshold", type=click.IntRange(1), help="How many root keys must sign.")
@click.option("--snapshot-threshold", type=click.IntRange(1), help="How many snapshot keys must sign.")
@click.option("--expires", type=document_io.FutureTime(), metavar="TIME", help="When it expires: 365d, 2027-11-20, …")
@_OUT
def root_set(*, file: Path, root_threshold: int | None, snapshot_threshold: int | None, expires: datetime | None, out: Path | None) -> None:
    """
    Change the thresholds or the expiry of a root.

    \b
      reconcile root set 1.root.json --expires 365d --out 2.root.json
    """
    from reconciler.publish import roots

    def change(found: TrustRoot) -> TrustRoot:
        found = roots.with_threshold(found, "root", root_threshold) if root_threshold else found
        found = roots.with_threshold(found, "snapshot", snapshot_threshold) if snapshot_threshold else found
        return roots.with_expiry(found, expires) if expires else found

    _edit(file, out, change)


def _edit(file: Path, out: Path | None, change: Callable[[TrustRoot], TrustRoot]) -> None:
    from reconciler.publish import roots

    data = _read(file)
    if roots.is_signed(data) and out is None:
        raise PublishError(
            f"{file} is signed, and nodes need it to verify the next version",
            hint="write the next version to another file, e.g. --out 2.root.json",
        )
    made = roots.edit(data, change)
    document_io.write(out or file, made, new=out is not None)
    found = roots.inspect(made)
    document_io.print_line(f"wrote {out or file}: root {found.version}, unsigned")
    if found.version > 1:
        document_io.print_line(f"next: enough keys of root {found.version - 1} and of this root must sign it, each with --previous")


@root.command("sign")
@click.argument("file", type=FILE)
@document_io.KEY
@document_io.SIGNER_COMMAND
@_PREVIOUS
@PASSPHRASE
@click.option(
    "--publish",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Once enough have signed, put it into DIR as VERSION.root.json, where nodes look for it. Upload DIR beside the snapshot.",
)
def root_sign(
    *, file: Path, key_file: Path, signer: str, previous: Path | None, passphrase_file: Path | None, publish: Path | None
) -> None:
    """
    Add your signature and keep the others'. First check the root with `reconcile root inspect`.

    \b
      reconcile root sign 2.root.json --key alice.key --previous 1.root.json --publish public
    """
    from reconciler.publish import roots

    before, data = _read(previous) if previous else b"", _read(file)
    if signer:
        public = document_io.public_key(key_file)
        made = roots.attach(data, public, document_io.external_signer(signer, passphrase_file)(roots.pae(data)), previous=before)
    else:
        made = roots.sign(data, document_io.private_key(key_file, passphrase_file), previous=before)
    _signed(file, made, before)
    if publish is not None:
        _publish(publish, made, before)


def _publish(folder: Path, data: bytes, previous: bytes) -> None:
    from reconciler.publish import roots

    found = roots.inspect(data, previous=previous)
    if not found.complete:
        document_io.note(f"not put into {folder} yet: enough keys must sign it first")
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{found.version}.root.json", *(["root.json"] if found.version == 1 else [])]
    for name in names:
        document_io.write(folder / name, data)
    document_io.print_line(f"put into {folder}: {', '.join(names)}; upload the folder to where the snapshot is")


@root.command("attach")
@click.argument("file", type=FILE)
@document_io.SIGNER
@document_io.SIGNATURE
@_PREVIOUS
def root_attach(*, file: Path, key_file: Path, signature: Path, previous: Path | None) -> None:
    """
    Add a signature that was made elsewhere over the bytes of `reconcile root pae`.

    \b
      reconcile root pae 1.root.json > to-sign
      openssl pkeyutl -sign -rawin -inkey alice.key -in to-sign -out sig
      reconcile root attach 1.root.json --key alice.pub --signature sig
    """
    from reconciler.publish import roots

    before = _read(previous) if previous else b""
    made = roots.attach(_read(file), document_io.public_key(key_file), document_io.read_signature(signature), previous=before)
    _signed(file, made, before)


def _read(file: Path) -> bytes:
    return document_io.read(file, maker=f"reconcile root new {file}")


def _signed(file: Path, data: bytes, previous: bytes) -> None:
    from reconciler.publish import roots

    document_io.write(file, data)
    found = roots.inspect(data, previous=previous)
    document_io.print_line(f"signed {file}: root {found.version} of {found.network}")
    for one in found.signatures:
        if one.label:
            document_io.print_line(f"signed by {document_io.named(one.keyid, one.label)}")
    document_io.print_line(_completeness(found))


def _pae(file: Path) -> bytes:
    from reconciler.publish import roots

    return roots.pae(_read(file))


root.add_command(document_io.pae_command(_pae))


@root.command("inspect")
@click.argument("file", type=FILE)
@_PREVIOUS
@JSON
def root_inspect(*, file: Path, previous: Path | None, as_json: bool) -> None:
    """
    Show a root, signed or not, and its fingerprint, which operators of nodes compare before they pin it.

    \b
      reconcile root inspect 2.root.json --previous 1.root.json
    """
    from reconciler.publish import roots

    found = roots.inspect(_read(file), previous=_read(previous) if previous else b"")
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(
        f"root {found.version} of {found.network}, expires {units.rfc3339(found.expires_at)}\nfingerprint {found.fingerprint}"
    )
    for name, role in (("root", found.roles.root), ("snapshot", found.roles.snapshot)):
        document_io.print_line(f"{name}: {role.threshold} of {len(role.keyids)} keys must sign")
        for keyid in role.keyids:
            mark = _signature_mark(found, keyid) if name == "root" else ""
            document_io.print_line(f"  {document_io.named(keyid, found.labels.get(keyid, ''))}{mark}")
    _print_other_signatures(found)
    document_io.print_line(_completeness(found))


def _signature_mark(found: RootReport, keyid: str) -> str:
    signatures = [one for one in found.signatures if one.keyid == keyid]
    return ("  signed" if signatures[0].valid else "  INVALID SIGNATURE") if signatures else ""


def _print_other_signatures(found: RootReport) -> None:
    for one in found.signatures:
        if not one.role:
            known = one.previous and one.valid
            of = (
                "a key of the previous root" if known else "not a key of this root; --previous shows whether it is one of the previous root"
            )
            document_io.print_line(f"signed by {document_io.named(one.keyid, one.label)} ({of})")


def _completeness(found: RootReport) -> str:
    if found.complete:
        return "complete: nodes will accept it"
    missing = [f"{units.count(found.missing, 'more signature')} by its own root keys"] if found.missing else []
    if found.missing_previous:
        these = "the signatures" if found.missing_previous < 0 else units.count(found.missing_previous, "more signature")
        missing.append(f"{these} by root {found.version - 1} (see --previous)")
    return f"incomplete: it needs {' and '.join(missing)}"
