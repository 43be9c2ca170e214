"""Commands for nodes without a network: bundle export and import."""

from __future__ import annotations

from pathlib import Path

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import EXCEPT, LOCK_TIMEOUT, ONLY


@click.group()
def bundle() -> None:
    """Carry a snapshot and its models to nodes without a network."""


@bundle.command("export")
@click.argument("target", type=click.Path(), metavar="FILE|DIR")
@click.option("--only", multiple=True, metavar="ID", help="Export the files of this model alone (may be repeated).")
@click.option(
    "--since",
    type=click.Path(path_type=Path, exists=True),
    metavar="BUNDLE",
    help="Leave out what this earlier bundle, or one before it, holds.",
)
@common_options()
def export(context: CommandContext, *, target: str, only: tuple[str, ...], since: Path | None) -> None:
    """
    Write this node's snapshot, roots and model files to FILE, a tar, or to DIR if that is a folder or ends in a slash.

    The result is an OCI image layout; every file is hashed on the way. Run it on a node with a network, after a sync.

    \b
      reconcile bundle export week-48.tar
      reconcile bundle export week-49.tar --since week-48.tar
      reconcile bundle export /media/stick/models/
    """
    from reconciler.commands import bundle as commands
    from reconciler.core import units

    folder = target.endswith("/") or Path(target).is_dir()
    made = commands.export_bundle(context.node(), Path(target), folder=folder, only=only, since=since)
    text = f"snapshot {made.version}, {units.count(len(made.models), 'model')}, {units.count(made.blobs, 'file')}"
    left = f", {made.assumed} left out" if made.assumed else ""
    context.show(made, lambda to: to.print(f"{made.path}: {text}, {units.human_size(made.bytes)}{left}", markup=False))


@bundle.command("import")
@click.argument("source", type=click.Path(path_type=Path, exists=True), metavar="BUNDLE")
@ONLY
@EXCEPT
@LOCK_TIMEOUT
@common_options()
def import_(context: CommandContext, *, source: Path, only: tuple[str, ...], excluded: tuple[str, ...], lock_timeout: float) -> int:
    """
    Install from BUNDLE, without a network.

    The snapshot is verified as if it came over the network, and every file is hashed, tested and activated as in a sync. An import that
    was interrupted goes on where it ended; the bundle may lie on a read-only disk. Exits as sync does.

    \b
      reconcile bundle import /media/stick/week-48.tar
    """
    from reconciler.commands import bundle as commands
    from reconciler.commands.context import RunOptions

    options = RunOptions(only=only, excluded=excluded, offline=True, lock_timeout_seconds=lock_timeout)
    with context.reporter() as report:
        outcome = commands.import_bundle(context.node(), source, report, options)
    return 1 if outcome.internal_errors else 3 if outcome.failed or outcome.unfetched else 0
