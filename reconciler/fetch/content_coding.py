"""
Content codings of documents (RFC 9110, 8.4): what came in as gzip or zstd (RFC 8878), decoded up to a cap.

A small body may stand for a large one, so the cap is on what comes out, and decoding stops there. What is decoded is no more trusted than
what was not: it is judged by its signatures.
"""

from __future__ import annotations

import zlib

from reconciler.core.errors import FetchError, TooLarge

#: What a request for a document says it takes.
ACCEPTED = "gzip, zstd"
_GZIP = 16 + zlib.MAX_WBITS
#: The largest window that a sender may use for HTTP (RFC 9659, 3).
_ZSTD_WINDOW = 8 << 20


def decoded(data: bytes, coding: str, *, max_bytes: int, shown: str) -> bytes:
    """
    Return *data*, a whole body from *shown*, without its *coding*.

    Raises:
        FetchError: the coding is none that was asked for, or the body is not whole.
        TooLarge: more than *max_bytes* come out.
    """
    if coding in {"", "identity"}:
        return data
    if coding in {"gzip", "x-gzip"}:
        return _from_gzip(data, max_bytes, shown)
    if coding == "zstd":
        return _from_zstd(data, max_bytes, shown)
    raise FetchError(f"{shown} sends a body in the coding {coding[:40]!r}, which nobody asked for")


def _from_gzip(data: bytes, max_bytes: int, shown: str) -> bytes:
    decoder = zlib.decompressobj(_GZIP)
    try:
        made = decoder.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise FetchError(f"{shown} sends a body that is not gzip: {error}") from None
    if len(made) > max_bytes:
        raise _too_large(max_bytes, shown)
    if not decoder.eof or decoder.unused_data:
        raise FetchError(f"{shown} sends a compressed body that {'has more after its end' if decoder.eof else 'ends early'}")
    return made


def _from_zstd(data: bytes, max_bytes: int, shown: str) -> bytes:
    import zstandard  # few servers send it

    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    try:
        told = zstandard.frame_content_size(data)
        if told > max_bytes:
            raise _too_large(max_bytes, shown)
        # Where the size is not told (-1), this much is made room for, and a frame that needs more is an error.
        return decoder.decompress(data, max_output_size=max_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FetchError(f"{shown} sends a body that is not one whole zstd frame of at most {max_bytes:,} bytes: {error}") from None


def _too_large(max_bytes: int, shown: str) -> TooLarge:
    return TooLarge(f"{shown} sends more than {max_bytes:,} bytes, compressed")
