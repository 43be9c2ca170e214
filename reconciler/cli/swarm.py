"""The processes of a swarm: ``swarm run`` on a node, ``swarm seed`` at the origin."""

from __future__ import annotations

import re
from pathlib import Path

import click

from reconciler.cli import document_io
from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import FILE, Size
from reconciler.core.errors import UsageError

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def swarm() -> None:
    """Run the process that gives files to other nodes and takes them, over BitTorrent."""


@swarm.command("run")
@common_options()
def swarm_run(context: CommandContext) -> None:
    """
    Talk to peers for this node, until it is ended. Run it as a user of its own, as deploy/systemd/reconcile-swarm.service does.

    It becomes aria2c. What it takes from peers is verified by the node's own runs, before it enters the store.
    """
    from reconciler.commands import swarm as commands

    commands.run(context.node())


@swarm.command("seed")
@click.argument("file", type=FILE)
@click.option("--files", "folders", type=_FOLDER, multiple=True, required=True, help="A folder with the models' files (may be repeated).")
@click.option("--torrents", type=_FOLDER, help="Where `snapshot swarm add` wrote the torrents [default: torrents, beside FILE].")
@click.option("--folder", type=_FOLDER, required=True, help="A folder of its own, for its configuration.")
@click.option("--ports", default="6881-6883", metavar="PORTS", help="The ports at which peers are answered, each by an aria2c of its own.")
@click.option("--upload-limit", type=Size(), default="0", metavar="SIZE", help="Most bytes a second that peers are given; 0: no limit.")
def swarm_seed(*, file: Path, folders: tuple[Path, ...], torrents: Path | None, folder: Path, ports: str, upload_limit: int) -> None:
    """
    Seed the files of the snapshot FILE that have torrents, until it is ended: for the network's origin.

    Every file is hashed first. Nobody can ask its processes anything. Start it again after a new snapshot.

    \b
      reconcile swarm seed snapshot.json --files models/ --folder /var/lib/reconcile-seeder
    """
    from reconciler.commands import swarm as commands
    from reconciler.fetch.settings import SwarmSettings

    if not re.fullmatch(r"\d{4,5}(-\d{4,5})?", ports) or int(ports.partition("-")[2] or 0) > 65535:
        raise UsageError(f"{ports[:40]!r} is no range of ports such as 6881-6883")
    settings = SwarmSettings(folder=folder.absolute(), ports=ports, upload_limit_bytes=upload_limit)
    commands.seed(document_io.read_snapshot(file), torrents or file.parent / "torrents", folders, settings)
