"""
The two processes of a swarm: a node's, which talks to peers for it, and the origin's, which gives them the first copy.

Both run until they are ended, as whoever starts them; they return only where they cannot begin, or go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from reconciler.commands.context import NodeContext
from reconciler.core import digest
from reconciler.core.errors import PublishError, SettingsError
from reconciler.fetch import swarm_daemon
from reconciler.fetch.settings import SwarmSettings
from reconciler.fetch.swarm_daemon import Seed
from reconciler.publish import snapshots, swarm


def run(context: NodeContext) -> NoReturn:
    """
    Become this node's aria2c for peers.

    Raises:
        SettingsError: the settings do not permit it, or its folder cannot be written to.
        FetchError: there is no aria2c.
    """
    if not context.swarm.enabled:
        raise SettingsError("[swarm] is not enabled on this node", hint="set [swarm] enabled = true in reconcile.toml")
    swarm_daemon.run(context.swarm)


def seed(data: bytes, torrents: Path, folders: Sequence[Path], settings: SwarmSettings) -> NoReturn:
    """
    Seed every file of the snapshot in *data* that has a torrent in the folder *torrents*, until this is ended; files are in *folders*.

    Raises:
        PublishError: a file or a torrent is missing, or is another than the snapshot names.
        SettingsError, FetchError: as ``run``.
    """
    found = snapshots.open_(data)
    if not found.swarm or not found.swarm.torrents:
        raise PublishError("the snapshot has no torrents", hint="`reconcile snapshot swarm add FILE --files DIR --tracker URL` makes them")
    sizes = {name: size for name, size in swarm.wanted(found, (), 1).items() if name in found.swarm.torrents}
    seeds = []
    for name, path in swarm.find(sizes, folders):
        algorithm, digits = digest.parse(name)
        torrent = torrents / algorithm / f"{digits}.torrent"
        if not torrent.is_file() or digest.of(torrent.read_bytes()) != found.swarm.torrents[name].digest:
            hint = "`reconcile snapshot swarm add FILE --files DIR` writes it again"
            raise PublishError(f"{torrent} is missing, or is not the torrent that the snapshot names", hint=hint)
        seeds.append(Seed(torrent=torrent.absolute(), file=path.absolute()))
    swarm_daemon.seed(settings, seeds, found.swarm.trackers)
