"""
What the network says about peers: its trackers, and for each large blob the torrent by which nodes fetch it from each other.

Rules that hold here:

1. A torrent (BEP 3) is a pure function of a blob: its bytes, its digest and the piece length. Whoever makes it, anywhere, makes the same
   bytes, so the snapshot can sign its digest. It names no tracker; those are in the snapshot.
2. It is private (BEP 27): a client asks the given trackers for peers and nobody else.
3. Pieces are SHA-1, as BitTorrent v1 has them. They decide nothing here: what peers give is a blob when its own digest agrees.
4. A snapshot's ``swarm`` is about transport alone. It does not enter the lock, so that nodes that ignore it hold the same set.

BEncode is written here and not by a library: 20 lines, while torf reads the files itself, in threads of its own, and adds a date and its
own version, which makes two torrents of one blob.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from reconciler.core import urls
from reconciler.core.digest import AnyDigest, Digest

#: The largest torrent that a node reads; aria2 takes at most as much in one call.
MOST_TORRENT_BYTES = 8 << 20
#: Pieces have a power of two bytes, and there are about so many of them.
_MANY_PIECES = 2000
LEAST_PIECE, _MOST_PIECE = 256 << 10, 16 << 20

_INFO_HASH = r"^[0-9a-f]{40}(?!\n)$"
TrackerText = Annotated[str, Meta(min_length=8, max_length=1024)]


class Torrent(Struct, frozen=True, kw_only=True):
    """The torrent of one blob."""

    #: Digest of the torrent's own bytes.
    digest: Digest
    #: Its size in bytes.
    size: Annotated[int, Meta(ge=1, le=MOST_TORRENT_BYTES)]
    #: SHA-1 of its info dictionary, by which trackers know it.
    info_hash: Annotated[str, Meta(pattern=_INFO_HASH)]
    #: Where it is fetched from.
    urls: Annotated[tuple[Annotated[str, Meta(min_length=8, max_length=4096)], ...], Meta(max_length=64)] = ()


class Swarm(Struct, frozen=True, kw_only=True):
    """How nodes may fetch blobs from each other. Nodes use it only where their own settings say so."""

    #: Announce URLs of the network's own trackers: http, https or udp. No other is asked.
    trackers: Annotated[tuple[TrackerText, ...], Meta(max_length=16)] = ()
    #: Torrents by the digest of the blob.
    torrents: Annotated[dict[AnyDigest, Torrent], Meta(max_length=100_000)] = {}


def check(swarm: Swarm) -> None:
    """
    Check what a type cannot say.

    Raises:
        ValueError: an address is none; the message names the place.
    """
    for index, tracker in enumerate(swarm.trackers):
        try:
            check_tracker(tracker)
        except ValueError as error:
            raise ValueError(f"{error} - at `swarm.trackers[{index}]`") from None
    for name, torrent in swarm.torrents.items():
        for url in torrent.urls:
            try:
                urls.check_source(url)
            except ValueError as error:
                raise ValueError(f"{error} - at `swarm.torrents[{name}].urls`") from None


def check_tracker(url: str) -> None:
    """
    Refuse whatever is not the announce URL of a tracker: http, https, or udp with a port (BEP 15).

    Raises:
        ValueError: says what is wrong with it.
    """
    is_udp = url.startswith("udp://")
    urls.check_url(f"http://{url.removeprefix('udp://')}" if is_udp else url)
    if is_udp and not urlsplit(url).port:
        raise ValueError("a tracker over udp names its port")
    if "," in url:
        raise ValueError("a tracker's address has no comma")


# -- torrents --------------------------------------------------------------------------------------

Bencoded = bytes | int | list["Bencoded"] | dict[bytes, "Bencoded"]


def bencode(value: Bencoded) -> bytes:
    """Return *value* in BEncode (BEP 3); the keys of a dictionary are sorted as bytes."""
    if isinstance(value, bytes):
        return b"%d:%b" % (len(value), value)
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, list):
        return b"l%be" % b"".join(map(bencode, value))
    return b"d%be" % b"".join(bencode(key) + bencode(value[key]) for key in sorted(value))


def piece_length(size: int) -> int:
    """Return the bytes of a piece in the torrent of a blob of *size* bytes."""
    piece = LEAST_PIECE
    while piece < _MOST_PIECE and size > piece * _MANY_PIECES:
        piece *= 2
    return piece


def pieces(chunks: Iterable[bytes], piece: int) -> bytes:
    """Return the SHA-1 digests of the pieces, *piece* bytes each, of the bytes in *chunks*, one after the other."""
    found, hasher, left = bytearray(), hashlib.sha1(usedforsecurity=False), piece
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            taken = view[:left]
            hasher.update(taken)
            left -= len(taken)
            view = view[len(taken) :]
            if not left:
                found += hasher.digest()
                hasher, left = hashlib.sha1(usedforsecurity=False), piece
    return bytes(found + (hasher.digest() if left < piece else b""))


def torrent(digits: str, size: int, hashes: bytes) -> bytes:
    """
    Return the torrent of a blob of *size* bytes whose digest has the hex *digits*, and its pieces the SHA-1 *hashes*.

    The file in it has the name that it has in a store's folder ``blobs/<algorithm>/<2 hex>``, so that it can be seeded from there.
    """
    return bencode({b"info": _info(digits, size, hashes)})


def info_hash(digits: str, size: int, hashes: bytes) -> str:
    """Return the hex SHA-1 of the info dictionary of that torrent, by which trackers and peers know it."""
    return hashlib.sha1(bencode(_info(digits, size, hashes)), usedforsecurity=False).hexdigest()


def _info(digits: str, size: int, hashes: bytes) -> Bencoded:
    return {
        b"length": size,
        b"name": digits.encode(),
        b"piece length": piece_length(size),
        b"pieces": hashes,
        b"private": 1,
    }


def matches(data: bytes, digits: str, size: int) -> bool:
    """
    Return whether *data* is the torrent of a blob of *size* bytes with the hex *digits*, whatever its pieces.

    Any other torrent could name other files, other trackers or other nodes, and it is refused although the network signed its digest.
    """
    count = -(-size // piece_length(size))
    found = re.search(rb"6:pieces%d:" % (20 * count), data)
    return found is not None and data == torrent(digits, size, data[found.end() : found.end() + 20 * count])


def whitelist(swarms: Mapping[str, Torrent]) -> bytes:
    """Return the whitelist of opentracker for *swarms*: one info hash in hex a line, sorted."""
    return "".join(f"{one}\n" for one in sorted({entry.info_hash for entry in swarms.values()})).encode()
