"""``snapshot``: the commands with which the network's operator decides which models nodes hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON, PASSPHRASE
from reconciler.cli.options import FILE, MODEL_STATE
from reconciler.cli.snapshot_add import snapshot_add
from reconciler.core import units
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.core.snapshot import Snapshot
    from reconciler.core.vocabulary import KnownState
    from reconciler.publish.snapshots import Changed, SnapshotReport

_ROOT = click.option("--root", "root_file", type=FILE, help="The network's root, to check who may sign and how many must.")


@click.group()
def snapshot() -> None:
    """Make, change and sign the snapshot: the list of models that nodes hold."""


@snapshot.command("new")
@click.argument("file", type=FILE)
@click.option("--network", required=True, metavar="NAME", help="The network's name, as in its root.")
@click.option(
    "--expires",
    type=document_io.FutureTime(),
    default="30d",
    metavar="TIME",
    help="When it expires. Each later change renews it for the same time.",
)
@click.option("--version", type=click.IntRange(1), default=1, help="Its first version: higher than any that nodes have seen.")
@click.option("--fallback", multiple=True, metavar="URL", help="A mirror of all blobs: https://…/{algorithm}/{hex} (may be repeated).")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test models again after this time, e.g. 7d.")
def snapshot_new(*, file: Path, network: str, expires: datetime, version: int, fallback: tuple[str, ...], retest_after: str) -> None:
    """
    Make an empty snapshot, unsigned.

    \b
      reconcile snapshot new snapshot.json --network testnet --expires 30d
    """
    from reconciler.publish import snapshots

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds()))
    data = snapshots.new(network, now=now, lifetime=lifetime, version=version, fallback=fallback, retest_after=retest_after)
    document_io.write(file, data, new=True)
    document_io.print_line(f"wrote {file}, unsigned and empty; next: reconcile snapshot add {file} NAME:VERSION SOURCE")


snapshot.add_command(snapshot_add)


@snapshot.command("remove")
@click.argument("file", type=FILE)
@click.argument("ids", nargs=-1, required=True, metavar="NAME:VERSION...")
def snapshot_remove(*, file: Path, ids: tuple[str, ...]) -> None:
    """
    Remove models. Nodes stop serving them at once, and delete their bytes after the grace period.

    To replace a version without an outage, add the next one: the old version then serves until the new one is active.

    \b
      reconcile snapshot remove snapshot.json tiny:v1
    """
    from reconciler.publish import snapshots

    def change(found: Snapshot) -> Snapshot:
        for model_id in ids:
            found = snapshots.without_model(found, model_id)
        return found

    _write_with_stops(file, document_io.read_snapshot(file), change)


def _write_with_stops(file: Path, data: bytes, change: Callable[[Snapshot], Snapshot]) -> None:
    """Write the changed snapshot, and say which models every node stops serving at once."""
    from reconciler.publish import snapshots

    made = snapshots.edit(data, change, now=document_io.now())
    for model_id in snapshots.diff(data, made.data).stopped:
        document_io.note(f"{model_id} stops serving at once on every node")
    document_io.write_snapshot(file, made)


@snapshot.command("set-state")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("state", type=MODEL_STATE)
def snapshot_set_state(*, file: Path, model_id: str, state: KnownState) -> None:
    """
    Set a model's state: enabled, disabled (kept, not served), archived (moved to cold storage) or retired.

    A retired model serves where it is active until a model that replaces it is active there; it is not installed on new nodes.

    \b
      reconcile snapshot set-state snapshot.json tiny:v1 archived
    """
    from reconciler.publish import snapshots

    data = document_io.read_snapshot(file)
    _write_with_stops(file, data, lambda found: snapshots.with_state(found, model_id, state))


@snapshot.command("set")
@click.argument("file", type=FILE)
@click.option("--expires", type=document_io.FutureTime(), metavar="TIME", help="When it expires, from now on.")
@click.option("--fallback", multiple=True, metavar="URL", help="A mirror of all blobs (may be repeated); replaces those that are listed.")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test models again after this time.")
def snapshot_set(*, file: Path, expires: datetime | None, fallback: tuple[str, ...], retest_after: str) -> None:
    """
    Renew a snapshot before it expires, or change what applies to all models.

    \b
      reconcile snapshot set snapshot.json --expires 30d
    """
    from msgspec.structs import replace

    from reconciler.publish import snapshots

    def change(found: Snapshot) -> Snapshot:
        found = replace(found, sources=replace(found.sources, fallback=fallback)) if fallback else found
        return replace(found, retest_after=retest_after) if retest_after else found

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds())) if expires else None
    document_io.write_snapshot(file, snapshots.edit(document_io.read_snapshot(file), change, now=now, lifetime=lifetime))


@snapshot.command("sign")
@click.argument("file", type=FILE)
@document_io.KEY
@_ROOT
@PASSPHRASE
def snapshot_sign(*, file: Path, key_file: Path, root_file: Path | None, passphrase_file: Path | None) -> None:
    """
    Add your signature and keep the others'. First check the snapshot with `inspect`, and with `diff` against the last one.

    \b
      reconcile snapshot sign snapshot.json --key ci.key --root root.json
    """
    from reconciler.publish import snapshots

    trusted = document_io.load_root(root_file)
    data, key = document_io.read_snapshot(file), document_io.private_key(key_file, passphrase_file)
    _signed(file, snapshots.sign(data, key, now=document_io.now(), root=trusted), root_file)


@snapshot.command("attach")
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
    document_io.print_line(f"signed {file}: snapshot {found.version} of {found.network}, {len(found.models)} model(s), {found.digest}")
    document_io.print_line(_completeness(found))


def _completeness(found: SnapshotReport) -> str:
    if found.missing < 0:
        return f"{len(found.signatures)} signature(s); --root FILE shows whether they are enough"
    return "complete: nodes will accept it" if found.missing == 0 else f"incomplete: it needs {found.missing} signature(s)"


def _pae(file: Path) -> bytes:
    from reconciler.publish import snapshots

    return snapshots.pae(document_io.read_snapshot(file))


snapshot.add_command(document_io.pae_command(_pae))


@snapshot.command("inspect")
@click.argument("file", type=FILE)
@_ROOT
@JSON
def snapshot_inspect(*, file: Path, root_file: Path | None, as_json: bool) -> None:
    """
    Show a snapshot, signed or not. With --root, check its signatures.

    \b
      reconcile snapshot inspect snapshot.json --root root.json
    """
    from reconciler.publish import snapshots

    found = snapshots.inspect(document_io.read_snapshot(file), root=document_io.load_root(root_file))
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(f"snapshot {found.version} of {found.network}, {found.digest}")
    document_io.print_line(f"issued {units.rfc3339(found.issued_at)}, expires {units.rfc3339(found.expires_at)}")
    for model in found.models:
        document_io.print_line(
            f"  {model.id:<40} {model.state:<9} {units.human_size(model.bytes):>10}  {', '.join(model.tasks)}  {model.engine}"
        )
    document_io.print_line(f"{len(found.models)} model(s), {units.human_size(found.bytes)} in all")
    if found.other_fields:
        document_io.print_line(f"further fields: {printable(', '.join(found.other_fields))}")
    for one in found.signatures:
        held = {True: "valid", False: "NOT VALID, or not a key of the root", None: "not checked"}[one.valid]
        document_io.print_line(f"signed by {printable(one.keyid)} ({held})")
    document_io.print_line(_completeness(found))


@snapshot.command("diff")
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@JSON
def snapshot_diff(*, before: Path, after: Path, as_json: bool) -> None:
    """
    Show what changed between two snapshots, signed or not.

    \b
      reconcile snapshot diff published.json snapshot.json
    """
    from reconciler.publish import snapshots

    found = snapshots.diff(document_io.read_snapshot(before), document_io.read_snapshot(after))
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(f"snapshot {found.before} -> {found.after}")
    for sign, ids in (("+", found.added), ("-", found.removed)):
        for model_id in ids:
            document_io.print_line(f"{sign} {model_id}")
    for model_id in found.stopped:
        document_io.print_line(f"! {model_id} stops serving at once on every node")
    for change in found.changed:
        document_io.print_line(f"~ {_place(change)}: {_value(change.before)} -> {_value(change.after)}")
    if not (found.added or found.removed or found.changed):
        document_io.print_line("no differences")


def _place(change: Changed) -> str:
    return printable(f"{change.id} {change.field}" if change.id else change.field)


def _value(value: object) -> str:
    return printable(json.dumps(cast("Any", value), ensure_ascii=False))
