"""
aria2's formats: its configuration, its JSON-RPC answers and error codes, and its control file.

Rules that hold here, none of which touches a file or a socket:

1. Whatever is malformed in an answer raises ``LookupError``, ``TypeError`` or ``ValueError``.
2. The control file is written by us from what the file system knows, never read. aria2's own would be stale after a kill (it is saved at
   intervals, each with an fsync that stops the transfer), and an empty or torn one stops aria2 for ever. The file system knows better
   which bytes were written: each connection leaves a hole before the next one's piece.
3. A block counts as there when it lies within what was written, with the file system's granularity taken off where the writing stopped.
4. Where one piece's bytes run into the next one's, no hole shows whether its last bytes came: its last block is fetched again, unless
   aria2 had reported the piece as complete.
5. A file that reaches its full length without a hole is whole: hashing it costs less than asking for its blocks.
6. A mistake here costs a download and never trust: the digest decides.
"""

from __future__ import annotations

import os
import ssl
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from reconciler.fetch import sources
from reconciler.fetch.credentials import Credentials
from reconciler.fetch.settings import FetchSettings
from reconciler.fetch.sources import Failure

#: The unit in which aria2 remembers a piece that is under way, in bytes.
BLOCK = 16 << 10
#: What a killed run loses of a connection lies in buffers, so smaller files get fewer of them, down to these: ten kills of 24 MiB over 8
#: connections sent 1.21 to 1.27 times its size, and 1.12 to 1.15 times over 4.
_BYTES_A_CONNECTION = 6 << 20
_FEWEST_CONNECTIONS = 4
#: Where a connection's range ends at another's, what the server sent past it is lost. Where other files keep the line busy, a file
#: therefore gets one connection for so many bytes: 200 files of 4 MiB over 400 Mbit/s took 1.14 of ``aria2c -i``, and 1.06 since.
_BYTES_A_CONNECTION_AMONG_OTHERS = 24 << 20
#: A range of bytes: the first, and the one after the last.
Run = tuple[int, int]


# -- configuration ---------------------------------------------------------------------------------


def configuration(settings: FetchSettings, secret: str, port: int, home: Path, credentials: Credentials) -> str:
    """Return aria2's configuration file."""
    authority = settings.ca_file or ssl.get_default_verify_paths().cafile
    lines = {
        "enable-rpc": "true",
        "rpc-listen-port": port,
        "rpc-secret": secret,
        "rpc-listen-all": "false",
        "rpc-allow-origin-all": "false",  # no web page may talk to it
        "rpc-save-upload-metadata": "false",  # it writes only the file that was asked for
        "rpc-max-request-size": "16M",  # hundreds of transfers are added in one call
        "stop-with-process": os.getpid(),
        "quiet": "true",
        # -- a server may make it do nothing but receive bytes
        "follow-torrent": "false",
        "follow-metalink": "false",  # a content type would make it download other files, named by the server
        "enable-dht": "false",
        "enable-dht6": "false",
        "bt-enable-lpd": "false",
        "enable-peer-exchange": "false",
        "http-accept-gzip": "false",
        "no-want-digest-header": "true",  # the server's own digest proves nothing
        "remote-time": "false",  # the modification time is ours to compare
        "user-agent": "reconciler",
        "check-certificate": "true",
        "min-tls-version": "TLSv1.2",
        # -- the file
        "file-allocation": "none",  # anything else, a crash and a lost record make zeros that count as downloaded
        "disk-cache": "0",  # doubles the rate, and what is reported as done is in the file
        "auto-file-renaming": "false",
        "allow-overwrite": "false",
        "continue": "true",  # what ``staging`` found to be there
        # True, against the usual advice: false makes it start again from byte 0 *in the same file*, where hashing has passed already.
        # An error 8 ends the attempt here, and the next one has a file of its own.
        "always-resume": "true",
        "auto-save-interval": "0",  # it is never used: ``staging`` writes it anew. Saving it stops the transfer for an fsync
        "stream-piece-selector": "inorder",
        "allow-piece-length-change": "true",
        # -- time and rate
        "max-concurrent-downloads": settings.concurrent,
        "max-overall-download-limit": settings.limit_bytes,
        # A connection has a share of the file's rate; the file's own rate is watched by us.
        "lowest-speed-limit": least_rate(settings) // max(1, settings.connections),
        "timeout": _bounded(settings.timeout_seconds, 600),
        "connect-timeout": _bounded(min(settings.timeout_seconds, 15.0), 600),
        "max-tries": 3,  # of a connection; later tries of the source are ours
        "retry-wait": 1,
        "max-file-not-found": 1,
        "max-download-result": 10000,  # an ended download that it forgets looks like a lost one
        "uri-selector": "feedback",
        "server-stat-timeout": 3600,
    }  # fmt: skip
    if authority:
        lines["ca-certificate"] = str(authority)  # the static build and Debian's have different defaults
    if settings.proxy and credentials.text():
        lines["netrc-path"] = str(home / "netrc")  # by host, looked up anew after each redirect; a header would travel along
    else:
        lines["no-netrc"] = "true"
    return "".join(f"{key}={value}\n" for key, value in lines.items())


def least_rate(settings: FetchSettings) -> int:
    """Return the bytes a second below which a file's sources count as slow: never more than the operator's own limit allows it."""
    if not settings.limit_bytes:
        return settings.min_rate_bytes
    return min(settings.min_rate_bytes, settings.limit_bytes // (4 * settings.concurrent))


def connections(settings: FetchSettings, size: int, *, among_others: bool = False) -> int:
    """Return over how many connections a file of *size* bytes comes; *among_others*: as many files as may come at a time wait beside it."""
    if among_others:
        return min(settings.connections, max(1, size // _BYTES_A_CONNECTION_AMONG_OTHERS))
    return min(settings.connections, max(_FEWEST_CONNECTIONS, size // _BYTES_A_CONNECTION))


def _bounded(value: float, most: int) -> int:
    return max(1, min(round(value), most))


# -- answers --------------------------------------------------------------------------------------


class Status(Struct, frozen=True, kw_only=True):
    """The status of a download: sizes in bytes, *speed* in bytes a second; the first *prefix* bytes are complete and final."""

    gid: str
    state: str
    total: int
    done: int
    speed: int
    prefix: int
    bitfield: str = ""
    error: int = 0
    text: str = ""


class Ending(Struct, frozen=True, kw_only=True):
    """Why a download failed. *discard*: what is on the disk cannot be continued. *node*: this machine is at fault, not the source."""

    failure: Failure
    discard: bool = False
    node: bool = False


def status(answer: Mapping[str, str]) -> Status:
    """Return what an answer to tellStatus says."""
    total, done = int(answer["totalLength"]), int(answer["completedLength"])
    bitfield = answer.get("bitfield", "")
    known = prefix(bitfield, int(answer.get("pieceLength", "0")), total) if total else 0
    return Status(
        gid=answer["gid"], state=answer["status"], total=total, done=done, speed=int(answer.get("downloadSpeed", "0")), prefix=known,
        bitfield=bitfield, error=int(answer.get("errorCode", "0") or 0), text=answer.get("errorMessage", ""),
    )  # fmt: skip


def prefix(bitfield: str, piece: int, total: int) -> int:
    """Return the bytes that the unbroken run of set bits at the front stands for; the highest bit of the first digit is piece 0."""
    rest = bitfield.lstrip("f")
    pieces = 4 * (len(bitfield) - len(rest))
    if rest:
        digit = int(rest[0], 16)
        pieces += next(index for index in range(4) if not digit & (8 >> index))
    return min(total, pieces * piece)


#: aria2's exit status by number, as far as it says more than "it failed": permanent, discard, node, text.
_ENDINGS = {
    2: (False, False, False, "it stopped answering"),
    3: (True, False, False, "it does not have the file"),
    4: (True, False, False, "it does not have the file"),
    5: (False, False, False, "it is too slow"),
    6: (False, False, False, "the network failed"),
    8: (False, True, False, "it cannot continue a download"),
    9: (True, True, True, "the disk is full"),
    10: (False, True, False, "what is on the disk does not fit"),
    13: (False, True, False, "what is on the disk does not fit"),
    15: (True, True, True, "the file in staging cannot be opened"),
    16: (True, True, True, "the file in staging cannot be made"),
    17: (True, True, True, "the file in staging cannot be written"),
    18: (True, True, True, "the folder in staging cannot be made"),
    19: (False, False, False, "its host's name leads to no address"),
    21: (False, False, False, "its answer is malformed"),
    22: (False, False, False, "its answer was not expected"),
    23: (True, False, False, "it redirects in a circle"),
    24: (True, False, False, "it asks for credentials that this node does not have"),
    29: (False, False, False, "it is overloaded"),
}


def ending(code: int, text: str) -> Ending:
    """Return what aria2's error *code* and *text* mean. A refusal here may be a URL that expired since it was resolved: not permanent."""
    permanent, discard, node, said = _ENDINGS.get(code, (False, False, False, "the transfer failed"))
    # Its text may hold the whole URL, with a signed query.
    detail = sources.clean(" ".join(word for word in text.split() if "://" not in word), 120)
    kind: sources.Kind = "disk-full" if code == 9 else "source-failed"
    shown = f"{said} ({detail})" if detail else said
    return Ending(failure=Failure(text=shown, permanent=permanent, kind=kind), discard=discard, node=node)


# -- control file ---------------------------------------------------------------------------------


def kept_ranges(runs: Sequence[Run], known: str, piece: int, size: int, coarse: int) -> list[list[Run]]:
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
        ranges = [_whole_blocks(run, start, stop, end, size, coarse) for run in runs if run[0] < stop and run[1] > start]
        found.append([(first, last) for first, last in ranges if first < last])
    return found


def _whole_blocks(run: Run, start: int, stop: int, end: int, size: int, coarse: int) -> Run:
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


def control_file(pieces: Sequence[Sequence[Run]], piece: int, size: int) -> bytes:
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


def total_bytes(pieces: Sequence[Sequence[Run]]) -> int:
    """Return how many bytes are there."""
    return sum(last - first for ranges in pieces for first, last in ranges)


def is_set(bitfield: str, index: int) -> bool:
    """Whether piece *index* is marked in the hexadecimal *bitfield*, whose highest bit is piece 0."""
    digit = bitfield[index // 4 : index // 4 + 1]
    return bool(digit) and bool(int(digit, 16) & (8 >> index % 4))
