"""Commands that maintain a node: verify, gc, incidents, retry, trust; and demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import COUNT, LOCK_TIMEOUT, Share, Size, complete_models

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.store.garbage import Garbage


@click.command()
@click.option("--repair", is_flag=True, help="Download damaged files again, then test and activate the models.")
@click.option("--sample", type=Share(), default="100%", help="Hash this share of the store, beginning with what was hashed longest ago.")
@click.option(
    "--limit", type=Size(), default="0", metavar="RATE", help="Read at most this many bytes per second, e.g. 200MiB; 0: no limit."
)
@LOCK_TIMEOUT
@common_options()
def verify(context: CommandContext, *, repair: bool, sample: float, limit: int, lock_timeout: float) -> int:
    """
    Re-hash all stored files and compare them with the signed digests.

    Uses the network only to repair. Exit code 0: no damage, or repaired; 3: damage found and not repaired.

    \b
      reconcile verify
      reconcile verify --sample 10% --limit 200MiB     a tenth of the store, e.g. each night
      reconcile verify --repair
    """
    import msgspec

    from reconciler.commands import apply
    from reconciler.commands import verify as verifying
    from reconciler.commands.context import RunOptions
    from reconciler.core import units

    node = context.node()
    with context.reporter(stream=False) as report:
        found = verifying.verify(node, report, sample=sample, rate=limit, progress=True, lock_timeout_seconds=lock_timeout)
        if found.damage and repair:
            outcome = apply.apply(node, report, RunOptions(lock_timeout_seconds=lock_timeout), actor="verify --repair")
            again = verifying.verify(node, report, lock_timeout_seconds=lock_timeout)
            found = msgspec.structs.replace(found, repaired=not again.damage and not (outcome.failed or outcome.unfetched))

    def show(to: Console) -> None:
        for one in found.damage:
            to.print(f"damaged {one.kind} {one.name}: {one.detail}", style="red", markup=False)
        verdict = "clean" if not found.damage else "repaired" if found.repaired else f"{len(found.damage)} damaged"
        to.print(f"{units.count(found.checked, 'blob')}, {units.human_size(found.bytes)}: {verdict}", markup=False)

    context.show(found, show)
    return 3 if found.damage and not found.repaired else 0


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted, and why.")
@click.option("--max", "at_most", type=Size(), metavar="SIZE", help="Stop after freeing about this much, e.g. 50GiB.")
@LOCK_TIMEOUT
@common_options()
def gc(context: CommandContext, *, dry_run: bool, at_most: int | None, lock_timeout: float) -> None:
    """
    Delete files that no listed model, kept generation or grace period needs.

    \b
      reconcile gc --dry-run
      reconcile gc --max 50GiB
    """
    from reconciler.commands import maintenance
    from reconciler.core import units

    node = context.node()
    gone = maintenance.garbage(node) if dry_run else maintenance.gc(node, at_most=at_most, lock_timeout_seconds=lock_timeout)
    total = sum(one.bytes for one in gone)

    def show(to: Console) -> None:
        _show_garbage(to, gone)
        to.print(f"{'would free' if dry_run else 'freed'} {units.human_size(total)}", markup=False)

    context.show({"schema": 1, "dry_run": dry_run, "bytes": total, "items": gone}, show)


def _show_garbage(to: Console, gone: tuple[Garbage, ...]) -> None:
    from reconciler.core import units

    for one in gone:
        to.print(f"{one.kind} {one.name}  {units.human_size(one.bytes)}  {one.reason}", markup=False)


@click.command()
@COUNT
@click.option("--lines", is_flag=True, help="Print JSON, one incident per line, the oldest first, for jq and log shippers.")
@common_options()
def incidents(context: CommandContext, *, count: int, lines: bool) -> None:
    """Show what was refused, failed, quarantined or repaired."""
    import msgspec

    from reconciler.commands import status
    from reconciler.core import units
    from reconciler.report.events import short

    found = status.incidents(context.node(), count)
    if lines:
        for one in found:
            click.echo(msgspec.json.encode(one).decode())
        return

    def show(to: Console) -> None:
        for one in found:
            about = " ".join(part for part in (one.model, short(one.blob), one.source) if part)
            times = f" ({one.times} times, last at {units.rfc3339(one.last_at or one.at)})" if one.times > 1 else ""
            to.print(f"{units.rfc3339(one.at)}  {one.kind}  {about}  {one.detail}{times}", markup=False)
        if not found:
            to.print("no incidents")

    context.show(found, show)


@click.command()
@click.argument("model", shell_complete=complete_models)
@LOCK_TIMEOUT
@common_options()
def retry(context: CommandContext, *, model: str, lock_timeout: float) -> None:
    """Clear MODEL's failure record so that the next apply retries it immediately."""
    from reconciler.commands import maintenance

    maintenance.retry(context.node(), model, lock_timeout_seconds=lock_timeout)
    context.show({"schema": 1, "model": model}, lambda to: to.print(f"the next apply retries {model}", markup=False))


@click.group()
def trust() -> None:
    """Show and update the trust root and the record of accepted snapshots."""


@trust.command("show")
@common_options()
def trust_show(context: CommandContext) -> None:
    """Show the trust root, its keys and thresholds, and the newest snapshot ever accepted."""
    from reconciler.commands import node_trust
    from reconciler.core import units

    node = context.node()
    root, trust_state = node_trust.trusted_root(node), node_trust.read_trust_state(node)

    def show(to: Console) -> None:
        to.print(f"network {root.network}, root {root.version}, expires {units.rfc3339(root.expires_at)}", markup=False)
        for name, role in (("root", root.roles.root), ("snapshot", root.roles.snapshot)):
            to.print(f"{name}: {role.threshold} of {units.count(len(role.keyids), 'key')}", markup=False)
            for keyid in role.keyids:
                to.print(f"  {root.named(keyid)}", markup=False)
        accepted = f"snapshot {trust_state.version}, {trust_state.digest}" if trust_state.version else "no snapshot yet"
        to.print(f"newest accepted: {accepted}", markup=False)

    tree = {
        "schema": 1, "network": root.network, "version": root.version, "expires_at": root.expires_at, "roles": root.roles,
        "labels": {keyid: label for keyid in root.keys if (label := root.label(keyid))}, "floor": trust_state,
    }  # fmt: skip
    context.show(tree, show)


@trust.command("update")
@click.argument("sources", nargs=-1, required=True, metavar="FILE-or-URL…")
@LOCK_TIMEOUT
@common_options()
def trust_update(context: CommandContext, *, sources: tuple[str, ...], lock_timeout: float) -> None:
    """
    Apply newer trust roots in order. Each must be signed by its predecessor and by itself.

    \b
      reconcile trust update 2.root.json 3.root.json
    """
    from reconciler.commands import node_trust
    from reconciler.commands.context import hold_store

    node = context.node()
    with hold_store(node, timeout_seconds=lock_timeout) as ledger:
        root = node_trust.apply_roots(node, sources, ledger)
    context.show(
        {"schema": 1, "network": root.network, "version": root.version},
        lambda to: to.print(f"root {root.version} of {root.network} is trusted now", markup=False),
    )


@trust.command("init")
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation. Required without a terminal.")
@common_options()
def trust_init(context: CommandContext, *, yes: bool) -> None:
    """
    Start the record of accepted snapshots anew, with the snapshot in the current lock.

    For a store whose record was lost. First check that models.lock is the network's current one: an older one would be accepted.
    """
    from reconciler.commands import init

    node = context.node()
    for line in init.describe_anchor(node):
        context.console.print(line, markup=False)
    if not yes:
        context.require_confirmation("Is this the network's root, and models.lock its current one?")
    made = init.reset_trust_state(node)
    context.show(made, lambda to: to.print(f"the record of accepted snapshots begins anew with snapshot {made.version}", markup=False))


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Run in this new folder and keep it. Default: a temporary folder."
)
def demo(folder: Path | None) -> None:
    """
    Run the whole workflow here, on small real models that it makes.

    They are downloaded from an HTTP server on this machine. The demo takes under a minute, changes nothing else, and deletes what it
    made unless a folder is given.
    """
    import shutil
    import sys
    import tempfile

    from reconciler.cli import run
    from reconciler.demo import Demo

    place = folder or Path(tempfile.mkdtemp(prefix="reconcile-demo-"))
    try:
        Demo(place, lambda arguments: run(list(arguments)), sys.stdout).run()
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
        else:
            click.echo(f"Everything is in {folder}.")
