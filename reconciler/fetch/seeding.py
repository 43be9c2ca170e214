"""
What a node gives to peers: which blobs, for how long, how much of it.

Rules that hold here:

1. A blob is seeded from the store, where its digest was checked: the swarm's aria2c reads ``blobs/<algorithm>/<2 hex>/<hex>`` and, as
   another user, cannot write there.
2. Time and ratio are counted over all starts of aria2, which forgets everything when it ends. A blob that was seeded enough is not seeded
   again while it is remembered.
3. A blob that left the store, or the snapshot's torrents, is forgotten, and aria2 lets its file go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.swarm import Swarm
from reconciler.fetch.settings import SwarmSettings
from reconciler.fetch.swarm_daemon import SEEDING, Client, PeerStatus


class Seeding(Struct, frozen=True, kw_only=True):
    """A blob that is seeded *since* an instant; *uploaded* bytes of it before the present start of aria2, *session* bytes in it."""

    since: datetime
    uploaded: int = 0
    session: int = 0
    over: bool = False


class Seeds(Struct, frozen=True, kw_only=True):
    """What seeding needs to know: settings, what the snapshot says, where a torrent and a blob are."""

    settings: SwarmSettings
    swarm: Swarm
    torrent: Callable[[str], bytes]
    blob_path: Callable[[str], Path]


def download_gid(name: str) -> str:
    """Return aria2's id for the download of the blob *name*: the same each time, so that a repeated call changes nothing."""
    return hashlib.sha256(f"download {name}".encode()).hexdigest()[:16]


def seed_gid(name: str) -> str:
    """Return aria2's id for the seeding of the blob *name*."""
    return hashlib.sha256(f"seed {name}".encode()).hexdigest()[:16]


def begin(client: Client, seeds: Seeds, name: str, state: Seeding, now: datetime) -> None:
    """Seed the blob *name* from the store, as long as it is due; raises SwarmLost."""
    torrent, path = seeds.torrent(name), seeds.blob_path(name)
    if not torrent:
        return
    left = seeds.settings.seed_seconds - (now - state.since).total_seconds()
    options = {
        "gid": seed_gid(name),
        "dir": str(path.parent),
        "bt-tracker": ",".join(seeds.swarm.trackers),
        **SEEDING,
        "seed-time": f"{max(left, 1) / 60:.2f}",
        "seed-ratio": f"{_ratio_left(seeds.settings, state, path.stat().st_size):.2f}",
    }
    client.add(torrent, options)


def _ratio_left(settings: SwarmSettings, state: Seeding, size: int) -> float:
    """Return how many times its size is still due; 0, as aria2 writes it, where there is no limit."""
    return max(settings.seed_ratio - state.uploaded / max(size, 1), 0.01) if settings.seed_ratio else 0.0


def is_due(settings: SwarmSettings, state: Seeding, size: int, now: datetime) -> bool:
    """Whether a blob of *size* bytes is to be seeded further."""
    too_long = (now - state.since).total_seconds() >= settings.seed_seconds
    too_much = bool(settings.seed_ratio) and state.uploaded + state.session >= settings.seed_ratio * size
    return not (state.over or too_long or too_much)


def update(client: Client, seeds: Seeds, before: dict[str, Seeding], fetched: Iterable[str], now: datetime) -> dict[str, Seeding]:
    """
    Let aria2 seed what is due, *fetched* blobs of this run among it, and nothing else; return what is to be remembered.

    Raises:
        SwarmLost: aria2 is not there; nothing is changed.
    """
    known = client.known()
    found = {name: Seeding(since=now) for name in fetched} | before
    found = {name: state for name, state in found.items() if name in seeds.swarm.torrents and seeds.blob_path(name).exists()}
    statuses = client.poll([gid for name in found if (gid := seed_gid(name)) in known])
    for name, state in found.items():
        state = counted(state, statuses.get(seed_gid(name)))  # noqa: PLW2901  the same, a moment later
        due = is_due(seeds.settings, state, seeds.blob_path(name).stat().st_size, now)
        found[name] = state if due else replace(state, over=True)
        if due and seed_gid(name) not in statuses:
            begin(client, seeds, name, state, now)
    kept = {seed_gid(name) for name, state in found.items() if not state.over}
    for gid in known - kept:
        client.remove(gid)
    return found


def counted(state: Seeding, status: PeerStatus | None) -> Seeding:
    """Return *state* with what aria2 says: its count, its end, or that it was started again and counts from nothing."""
    if status is None:
        return replace(state, uploaded=state.uploaded + state.session, session=0)
    ended = status.download.state == "complete"
    return replace(state, session=status.uploaded, over=state.over or ended)
