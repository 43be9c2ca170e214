"""``snapshot swarm``: torrents of a snapshot's files, by which nodes fetch them from each other."""

from __future__ import annotations

from pathlib import Path

import click

from reconciler.cli import document_io
from reconciler.cli.options import FILE, Size

_FOLDER = click.Path(path_type=Path, file_okay=False)


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
    from reconciler.publish import snapshots, swarm

    data, into = document_io.read_snapshot(file), torrents or file.parent / "torrents"
    found = snapshots.open_(data)
    template = url or swarm.template_of(found)
    made = list(swarm.make(swarm.wanted(found, models, least), folders, template))
    edited = snapshots.edit(data, lambda before: swarm.with_torrents(before, made, trackers), now=document_io.now())
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
    from reconciler.publish import snapshots, swarm

    document_io.write_snapshot(file, snapshots.edit(document_io.read_snapshot(file), swarm.without, now=document_io.now()))


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
    from reconciler.publish import snapshots, swarm

    data = swarm.whitelist(snapshots.open_(document_io.read_snapshot(file)))
    if out:
        document_io.write(out, data)
    else:
        click.echo(data.decode(), nl=False)
