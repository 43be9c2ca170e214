"""
What the downloader is told of a file that it is to continue: its own control file, written by us from what the file system knows.

The downloader's record would be stale after a kill (it is saved at intervals, each with an fsync that stops the transfer), and an
empty or torn one stops it for ever. The file system knows better which bytes were written: each connection leaves a hole before the
next one's piece.

Rules that hold here, none of which touches a file:

1. A block counts as there when it lies within what was written, with the file system's granularity taken off where the writing stopped.
2. Where one piece's bytes run into the next one's, no hole shows whether its last bytes came: its last block is fetched again, unless the
   downloader had reported the piece as complete.
3. A file that reaches its full length without a hole is whole: hashing it costs less than asking for its blocks.
4. A mistake here costs a download and never trust: the digest decides.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

#: The unit in which the downloader remembers a piece that is under way.
BLOCK = 16 << 10
Run = tuple[int, int]


def kept(runs: Sequence[Run], known: str, piece: int, size: int, coarse: int) -> list[list[Run]]:
    """
    Return, for each piece of a file of *size* bytes, the ranges of whole blocks that are there.

    *runs* are the written ranges as the file system gives them, in units of *coarse* bytes; *known* is the bitfield last reported.
    """
    end = runs[-1][1] if runs else 0
    if list(runs) == [(0, size)]:
        return [[(start, min(start + piece, size))] for start in range(0, size, piece)]
    found: list[list[Run]] = []
    for index, start in enumerate(range(0, size, piece)):
        stop = min(start + piece, size)
        if stop <= end and is_set(known, index):
            found.append([(start, stop)])
            continue
        ranges = [_whole(run, start, stop, end, size, coarse) for run in runs if run[0] < stop and run[1] > start]
        found.append([(first, last) for first, last in ranges if first < last])
    return found


def _whole(run: Run, start: int, stop: int, end: int, size: int, coarse: int) -> Run:
    first, last = max(run[0], start), min(run[1], stop)
    if run[0] > start and coarse > BLOCK:
        first += coarse
    if run[1] >= stop and stop != size:
        last -= BLOCK
    elif run[1] != end:  # the end of the file is exact
        last -= coarse
    first = start + -(-(first - start) // BLOCK) * BLOCK
    if last != size:
        last = start + (last - start) // BLOCK * BLOCK
    return first, last


def encode(pieces: Sequence[Sequence[Run]], piece: int, size: int) -> bytes:
    """Return the control file (aria2's format, version 1) that says that *pieces* are there."""
    bits, under_way = bytearray(-(-len(pieces) // 8)), []
    for index, ranges in enumerate(pieces):
        start, stop = index * piece, min((index + 1) * piece, size)
        if list(ranges) == [(start, stop)]:
            bits[index // 8] |= 0x80 >> index % 8
        elif ranges:
            blocks = _blocks(ranges, start, stop)
            under_way.append(struct.pack(">III", index, stop - start, len(blocks)) + blocks)
    head = struct.pack(">HIIIQQI", 1, 0, 0, piece, size, 0, len(bits))
    return head + bytes(bits) + struct.pack(">I", len(under_way)) + b"".join(under_way)


def _blocks(ranges: Sequence[Run], start: int, stop: int) -> bytes:
    count = -(-(stop - start) // BLOCK)
    bits = bytearray(-(-count // 8))
    for first, last in ranges:
        for block in range((first - start) // BLOCK, -(-(last - start) // BLOCK)):
            bits[block // 8] |= 0x80 >> block % 8
    return bytes(bits)


def total(pieces: Sequence[Sequence[Run]]) -> int:
    """Return how many bytes are there."""
    return sum(last - first for ranges in pieces for first, last in ranges)


def is_set(bitfield: str, index: int) -> bool:
    """Whether piece *index* is marked in the hexadecimal *bitfield*, whose highest bit is piece 0."""
    digit = bitfield[index // 4 : index // 4 + 1]
    return bool(digit) and bool(int(digit, 16) & (8 >> index % 4))
