"""
Digests: what blobs are named by.

Rules that hold here:

1. A digest is ``algorithm:lowercase-hex`` of the algorithm's exact length. Nothing else ever passes. A snapshot may name the digest of an
   algorithm that a newer version knows (``AnyDigest``): it is text that is compared and written, and ``parse`` refuses it.
2. ``parse`` alone turns a digest into the parts that a path or a URL is made of. It checks again, since a value that was built and
   not decoded was never checked (Ollama's CVE-2024-37032 came back through a second path).
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Protocol

import msgspec

#: Hex digits by algorithm. The order is that of preference.
HEX_LENGTHS = {"sha256": 64, "sha512": 128, "blake3": 64}

# `$` alone accepts a trailing newline, hence the look-ahead; `[0-9a-f]` and not `\d`, which takes any script's digits.
_KNOWN = r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}|blake3:[0-9a-f]{64}"
PATTERN = rf"^(?:{_KNOWN})(?!\n)$"
_MATCH = re.compile(PATTERN)

#: The text of a digest, as documents carry it. Checked wherever it is decoded.
Digest = Annotated[str, msgspec.Meta(pattern=PATTERN)]
_OTHER = r"(?!sha256:|sha512:|blake3:)[a-z][a-z0-9]{0,31}(?:-[a-z0-9]{1,32}){0,3}:(?:[0-9a-f]{2}){16,128}"
#: A digest, or one of an algorithm that is not known here: it never becomes a path.
AnyDigest = Annotated[str, msgspec.Meta(pattern=rf"^(?:{_KNOWN}|{_OTHER})(?!\n)$")]


class Hasher(Protocol):
    """What hashes bytes as they come."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Return the lowercase hex of all bytes so far."""


def parse(text: str) -> tuple[str, str]:
    """
    Split a digest into its algorithm and its hex digits.

    Raises:
        ValueError: it is not exactly a digest.
    """
    if not _MATCH.fullmatch(text):
        raise ValueError(f"not a digest: {text[:160]!r}")
    algorithm, _, digits = text.partition(":")
    return algorithm, digits


def hasher(algorithm: str, *, threads: int = 1) -> Hasher:
    """
    Return a new hasher for *algorithm*; *threads* are used by blake3 alone, the others are sequential by nature.

    Raises:
        ValueError: the algorithm is not one of ``HEX_LENGTHS``.
    """
    if algorithm == "blake3":
        from blake3 import blake3  # a tenth of all starts needs it

        return blake3(max_threads=threads)
    if algorithm not in HEX_LENGTHS:
        raise ValueError(f"unknown digest algorithm: {algorithm!r}")
    return hashlib.sha256() if algorithm == "sha256" else hashlib.new(algorithm)  # looking a name up takes longer than a short hash


def of(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of *data*."""
    made = hasher(algorithm)
    made.update(data)
    return f"{algorithm}:{made.hexdigest()}"


def is_digest(text: str) -> bool:
    """Return whether *text* is exactly a digest."""
    return _MATCH.fullmatch(text) is not None
