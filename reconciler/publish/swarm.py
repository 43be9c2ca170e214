"""
Torrents of a snapshot's blobs, for the network's operator.

Rules that hold here:

1. A torrent is made from a local file whose digest is one that the snapshot lists; what it is called does not matter.
2. Its digest, size and info hash are signed with the snapshot (``core.swarm``); the torrents themselves are published like any file.
3. A torrent of a blob that is no longer listed leaves the snapshot with the next ``add``, and so the tracker's whitelist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import UNSET, Struct
from msgspec.structs import replace

from reconciler.core import digest, swarm, urls
from reconciler.core.errors import PublishError
from reconciler.core.snapshot import Snapshot
from reconciler.core.swarm import Swarm, Torrent

_STEP = 1 << 20


class Made(Struct, frozen=True, kw_only=True):
    """The torrent of the blob *blob*, made from the file *path*: what the snapshot says of it, and its bytes."""

    blob: str
    path: Path
    entry: Torrent
    data: bytes


def wanted(found: Snapshot, models: tuple[str, ...], least: int) -> dict[str, int]:
    """
    Return the size in bytes, by digest, of the blobs of *models* (empty: of all) that have at least *least* bytes.

    Raises:
        PublishError: the snapshot lists no such model.
    """
    listed = {model.id for model in found.models}
    for model in models:
        if model not in listed:
            raise PublishError(f"the snapshot lists no model {model[:200]!r}", hint="`reconcile snapshot inspect FILE` lists them")
    return {
        artifact.digest: artifact.size
        for model in found.models
        for artifact in model.artifacts
        if (not models or model.id in models) and artifact.size >= max(1, least) and digest.is_digest(artifact.digest)
    }


def template_of(found: Snapshot) -> str:
    """Return where the torrents of *found* are published, as a template; empty where it has none."""
    for name, entry in (found.swarm.torrents if found.swarm else {}).items():
        algorithm, _, digits = name.partition(":")
        for url in entry.urls:
            return url.replace(digits, "{hex}").replace(f"/{algorithm}/", "/{algorithm}/")
    return ""


def make(blobs: dict[str, int], folders: Iterable[Path], template: str) -> Iterator[Made]:
    """
    Yield the torrents of *blobs*, from files in *folders* and below; *template* is the URL under which a torrent is published.

    A file is found by its size and proved by its digest; its name does not matter. A node's store will do.

    Raises:
        PublishError: there is no file of a blob, or one cannot be read.
    """
    if template:
        try:
            urls.check_template(template)
        except ValueError as error:
            raise PublishError(f"--url: {error}", hint="{algorithm} and {hex} stand for the blob's digest") from None
    for name, path in find(blobs, folders):
        yield _made(path, name, template)


def find(blobs: dict[str, int], folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """
    Yield each of *blobs*, sizes by digest, with a file in *folders* or below that has its bytes: each file is read to its end.

    Raises:
        PublishError: there is no file of a blob, or one cannot be read.
    """
    left = dict(blobs)
    for path, size in sorted(_files(folders)):
        for algorithm in sorted({name.partition(":")[0] for name, one in left.items() if one == size}):
            hasher = digest.hasher(algorithm)
            for chunk in _chunks(path):
                hasher.update(chunk)
            name = f"{algorithm}:{hasher.hexdigest()}"
            if left.pop(name, None) is not None:
                yield name, path
    if left:
        name = min(left)
        raise PublishError(
            f"no file in the folders given is {name} ({left[name]:,} bytes)",
            hint="--files names a folder with the models' files, as downloaded; the folder `blobs` of a node's store has all of them",
        )


def _files(folders: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                if path.is_file():
                    yield path, path.stat().st_size


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while data := file.read(_STEP):
                yield data
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error.strerror}") from None


def _made(path: Path, name: str, template: str) -> Made:
    """Return the torrent of the file at *path*, which is the blob *name*."""
    algorithm, digits = digest.parse(name)
    size = path.stat().st_size
    hashes = swarm.pieces(_chunks(path), swarm.piece_length(size))
    data = swarm.torrent(digits, size, hashes)
    entry = Torrent(
        digest=digest.of(data),
        size=len(data),
        info_hash=swarm.info_hash(digits, size, hashes),
        urls=(urls.expand(template, algorithm, digits),) if template else (),
    )
    return Made(blob=name, path=path, entry=entry, data=data)


def with_torrents(found: Snapshot, made: Iterable[Made], trackers: tuple[str, ...]) -> Snapshot:
    """
    Return *found* with the torrents *made*, those of blobs that it no longer lists taken out, and with *trackers* if any are given.

    Raises:
        PublishError: no tracker is named, or one is none; or a torrent could be fetched from nowhere.
    """
    before = found.swarm or Swarm()
    for tracker in trackers:
        try:
            swarm.check_tracker(tracker)
        except ValueError as error:
            raise PublishError(f"--tracker: {error}", hint="as in udp://tracker.example.org:6969/announce") from None
    trackers = tuple(dict.fromkeys(trackers)) or before.trackers
    if not trackers:
        raise PublishError("no tracker is named", hint="give --tracker URL; nodes ask no other than those that the snapshot names")
    listed = {artifact.digest for model in found.models for artifact in model.artifacts}
    torrents = {name: entry for name, entry in before.torrents.items() if name in listed} | {one.blob: one.entry for one in made}
    if any(not entry.urls for entry in torrents.values()) and not (found.sources.fallback or found.sources.allow_node_fallback):
        raise PublishError("nodes could fetch the torrents from nowhere", hint="give --url, with {hex} in it, where they are published")
    return replace(found, swarm=Swarm(trackers=trackers, torrents=dict(sorted(torrents.items()))))


def without(found: Snapshot) -> Snapshot:
    """Return *found* without trackers and torrents: nodes fetch over HTTP alone."""
    return replace(found, swarm=UNSET)


def whitelist(found: Snapshot) -> bytes:
    """
    Return the whitelist of opentracker for *found*: the info hash of each torrent, one a line.

    Raises:
        PublishError: it has no torrents; an empty whitelist would stop the swarm of the snapshot before.
    """
    if not found.swarm or not found.swarm.torrents:
        raise PublishError("the snapshot has no torrents", hint="`reconcile snapshot swarm add FILE --files DIR --tracker URL` makes them")
    return swarm.whitelist(found.swarm.torrents)
