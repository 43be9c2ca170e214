"""Fetching from peers: `snapshot swarm` makes the torrents, `swarm run` and `swarm seed` are the processes of a node and of the origin."""

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


@click.group("swarm")
def snapshot_swarm() -> None:
    """Let nodes fetch large files from each other, with BitTorrent."""


@snapshot_swarm.command("add")
@click.argument("file", type=FILE)
@click.argument("models", nargs=-1, metavar="[NAME:VERSION]…")
@click.option("--files", "folders", type=_FOLDER, multiple=True, required=True, help="A folder with the models' files (may be repeated).")
@click.option("--torrents", type=_FOLDER, help="Where the torrents are written [default: torrents, beside FILE].")
@click.option("--tracker", "trackers", multiple=True, metavar="URL", help="A tracker of the network (may be repeated).")
@click.option("--url", default="", show_default=False, metavar="URL", help="Where nodes find the torrents; {hex}: the file's digest.")
@click.option("--least", type=Size(), default="16MiB", metavar="SIZE", help="Smaller files are left to HTTP.")
def swarm_add(
    *, file: Path, models: tuple[str, ...], folders: tuple[Path, ...], torrents: Path | None, trackers: tuple[str, ...], url: str,
    least: int,
) -> None:  # fmt: skip
    """
    Make the torrents of large files, of all models or of those named, and put their digests into the snapshot.

    Each torrent is written as ALGORITHM/HEX.torrent, after the digest of its file, to be published at --url, and a second time under its
    own digest, as mirrors have it. Sign and publish the snapshot after that; the files themselves come from a seeder.

    \b
      reconcile snapshot swarm add snapshot.json --files models/ --tracker udp://tracker.example.org:6969/announce \\
          --url 'https://models.example.org/torrents/{algorithm}/{hex}.torrent'
      reconcile snapshot swarm add snapshot.json tiny:v2 --files models/
    """
    from reconciler.core import digest, units
    from reconciler.publish import snapshots
    from reconciler.publish import swarm as torrents_of

    data, into = document_io.read_snapshot(file), torrents or file.parent / "torrents"
    found = snapshots.open_(data)
    template = url or torrents_of.template_of(found)
    made = list(torrents_of.make(torrents_of.wanted(found, models, least), folders, template))
    edited = snapshots.edit(data, lambda before: torrents_of.with_torrents(before, made, trackers), now=document_io.now())
    for one in made:
        algorithm, digits = digest.parse(one.blob)
        _write_torrent(into / algorithm / f"{digits}.torrent", one.data)
        _write_torrent(into.joinpath(*digest.parse(one.entry.digest)), one.data)
        document_io.print_line(f"{one.path}: {units.human_size(one.path.stat().st_size)}, info hash {one.entry.info_hash}")
    if not made:
        document_io.note(f"no file has {units.human_size(least)} or more: no torrent was made")
    document_io.write_snapshot(file, edited)


def _write_torrent(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document_io.write(path, data)


@snapshot_swarm.command("remove")
@click.argument("file", type=FILE)
def swarm_remove(*, file: Path) -> None:
    """
    Take all torrents and trackers out of the snapshot: nodes fetch over HTTP alone.

    \b
      reconcile snapshot swarm remove snapshot.json
    """
    from reconciler.publish import snapshots
    from reconciler.publish import swarm as torrents_of

    document_io.write_snapshot(file, snapshots.edit(document_io.read_snapshot(file), torrents_of.without, now=document_io.now()))


@snapshot_swarm.command("whitelist")
@click.argument("file", type=FILE)
@click.option("--out", type=FILE, help="Write to this file instead of standard output.")
def swarm_whitelist(*, file: Path, out: Path | None) -> None:
    """
    Print the whitelist of opentracker: which torrents the network's tracker serves.

    \b
      reconcile snapshot swarm whitelist snapshot.json --out /etc/opentracker/whitelist
      systemctl kill --signal=HUP opentracker
    """
    from reconciler.publish import snapshots
    from reconciler.publish import swarm as torrents_of

    data = torrents_of.whitelist(snapshots.open_(document_io.read_snapshot(file)))
    if out:
        document_io.write(out, data)
    else:
        click.echo(data.decode(), nl=False)
