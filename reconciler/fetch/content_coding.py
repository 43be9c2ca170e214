"""
Content codings of documents (RFC 9110, 8.4): what came in as gzip, decoded up to a cap.

A small body may stand for a large one, so the cap is on what comes out, and decoding stops there. What is decoded is no more trusted than
what was not: it is judged by its signatures.
"""

from __future__ import annotations

import zlib

from reconciler.core.errors import FetchError, TooLarge

#: What a request for a document says it takes.
ACCEPTED = "gzip"
_GZIP = 16 + zlib.MAX_WBITS


def decoded(data: bytes, coding: str, *, max_bytes: int, shown: str) -> bytes:
    """
    Return *data*, a whole body from *shown*, without its *coding*.

    Raises:
        FetchError: the coding is another than gzip, or the body is not whole.
        TooLarge: more than *max_bytes* come out.
    """
    if coding in {"", "identity"}:
        return data
    if coding not in {"gzip", "x-gzip"}:
        raise FetchError(f"{shown} sends a body in the coding {coding[:40]!r}, which nobody asked for")
    decoder = zlib.decompressobj(_GZIP)
    try:
        made = decoder.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise FetchError(f"{shown} sends a body that is not gzip: {error}") from None
    if len(made) > max_bytes:
        raise TooLarge(f"{shown} sends more than {max_bytes:,} bytes, compressed")
    if not decoder.eof or decoder.unused_data:
        raise FetchError(f"{shown} sends a compressed body that {'has more after its end' if decoder.eof else 'ends early'}")
    return made
