"""
Decompression in bounded memory.

The streams of the standard library and of zstandard are not used whole: ``gzip.GzipFile`` and ``lzma.open`` silently read concatenated
streams and ignore or mend what follows them, ``lzma.open`` has no limit of memory, and zstandard's reader drops what follows the frame.
Their decompressor objects are used instead.

Rules that hold here:

1. Output comes in chunks of at most ``CHUNK_BYTES`` bytes, whatever the input is; nothing is ever read whole.
2. The memory that a stream may ask for is capped: the headers of xz and zstd may name a dictionary of any size.
3. A file holds one stream, and nothing after it: other readers would see a second stream or trailing bytes, and this one would not.
"""

from __future__ import annotations

import contextlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from reconciler.core.errors import UnpackRefused

#: The largest chunk of output, in bytes.
CHUNK_BYTES = 1 << 20
#: The most memory that one decompressor may take: ``xz -9`` asks for 65 MiB, ``zstd --ultra -22`` for 128.
MAX_MEMORY_BYTES = 128 << 20

_READ_BYTES = 64 << 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def chunks(file: BinaryIO, kind: str) -> Iterator[bytes]:
    """
    Yield what *file*, of a tar *kind*, decompresses to.

    Raises:
        UnpackRefused: it is malformed, cut short, has anything after its end, or asks for too much memory.
    """
    if kind not in _READERS:
        raise UnpackRefused(f"unknown kind of archive: {kind!r}")
    with refuse_malformed(kind):
        yield from _READERS[kind](file)


@contextlib.contextmanager
def refuse_malformed(what: str) -> Iterator[None]:
    """Raise what a decompressor reports of *what* as ``UnpackRefused``."""
    from zstandard import ZstdError  # only unpacking needs it

    try:
        yield
    except (zlib.error, lzma.LZMAError, ZstdError) as error:
        raise UnpackRefused(f"the {what} stream cannot be read within {MAX_MEMORY_BYTES >> 20} MiB of memory: {error}") from None


def inflate(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield what the next *size* bytes of *file* inflate to: one raw deflate stream (RFC 1951) that ends exactly there."""
    decompressor = zlib.decompressobj(wbits=-15)
    left = size
    while not decompressor.eof:
        data = decompressor.unconsumed_tail
        if not data:
            data = file.read(min(left, _READ_BYTES))
            left -= len(data)
        out = decompressor.decompress(data, CHUNK_BYTES)
        if not data and not out and not decompressor.eof:
            raise UnpackRefused("a deflate stream is cut short")
        yield out
    if decompressor.unused_data or left:
        raise UnpackRefused("a deflate stream ends before its member does")


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(CHUNK_BYTES):
        yield data


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=31)
    while not decompressor.eof:
        data = decompressor.unconsumed_tail or file.read(_READ_BYTES)
        out = decompressor.decompress(data, CHUNK_BYTES)
        if not data and not out and not decompressor.eof:
            raise UnpackRefused("the gzip stream is cut short")
        yield out
    _check_end(file, decompressor.unused_data)


def _xz(file: BinaryIO) -> Iterator[bytes]:
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_MEMORY_BYTES)
    while not decompressor.eof:
        data = file.read(_READ_BYTES) if decompressor.needs_input else b""
        if decompressor.needs_input and not data:
            raise UnpackRefused("the xz stream is cut short")
        yield decompressor.decompress(data, CHUNK_BYTES)
    _check_end(file, decompressor.unused_data)


def _zst(file: BinaryIO) -> Iterator[bytes]:
    """
    Yield what a frame decompresses to, handing it over block by block (RFC 8878, section 3.1.1).

    zstandard's stream reader swallows what follows the frame, and its decompressor has no bound on what one call returns. A block
    is at most 128 KiB unpacked, so to walk the blocks gives both the bound and the frame's exact end.
    """
    import zstandard

    head = file.read(18)  # the longest frame header
    if head[:4] != _ZSTD_MAGIC:
        raise UnpackRefused("not a zstd frame, or one that is skippable and so hides bytes")
    frame = zstandard.get_frame_parameters(head)
    length = zstandard.frame_header_size(head)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_MEMORY_BYTES).decompressobj()
    yield decompressor.decompress(head[:length])
    file.seek(length)
    for data in _blocks(file, checksum=frame.has_checksum):
        yield decompressor.decompress(data)
    if not decompressor.eof:
        raise UnpackRefused("the zstd frame is cut short")
    _check_end(file, decompressor.unused_data)


def _blocks(file: BinaryIO, *, checksum: bool) -> Iterator[bytes]:
    """Yield the blocks of a frame, each with its header, the last with the checksum."""
    last = False
    while not last:
        head = file.read(3)
        field = int.from_bytes(head, "little")
        last = bool(field & 1)
        size = 1 if field >> 1 & 3 == 1 else field >> 3  # a run-length block is one byte, repeated
        size += 4 if last and checksum else 0
        data = file.read(size)
        if len(head) + len(data) != 3 + size:
            raise UnpackRefused("the zstd frame is cut short")
        yield head + data


def _check_end(file: BinaryIO, unused: bytes) -> None:
    if unused or file.read(1):
        raise UnpackRefused("something follows the end of the compressed stream")


_READERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"tar": _plain, "tar.gz": _gzip, "tar.xz": _xz, "tar.zst": _zst}
