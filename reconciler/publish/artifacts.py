"""
Digest, size and first bytes of a file that a network is about to sign.

The digest is computed here over every byte, and never taken from a server's headers or a web page.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.core import gguf
from reconciler.core.errors import PublishError

_STEP = 1 << 20


class Measured(Struct, frozen=True, kw_only=True):
    """A file's digest and size, with its first bytes."""

    digest: str
    size: int
    head: bytes

    def __repr__(self) -> str:
        """Leave the bytes out: they are up to 64 MiB."""
        return f"Measured(digest={self.digest!r}, size={self.size})"


def measure(chunks: Iterable[bytes], *, algorithm: str = "sha256", head_bytes: int = 0) -> Measured:
    """
    Return what the bytes in *chunks* are, and the first *head_bytes* of them.

    Raises:
        PublishError: there are none.
    """
    hasher, size, head = digests.hasher(algorithm), 0, bytearray()
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        if len(head) < head_bytes:
            head += chunk[: head_bytes - len(head)]
    if not size:
        raise PublishError("the file is empty")
    return Measured(digest=f"{algorithm}:{hasher.hexdigest()}", size=size, head=bytes(head))


def gguf_facts(measured: Measured) -> gguf.GgufFacts | None:
    """
    Return what the header of a GGUF file tells, or None if it is another file. Works on the first bytes alone, so that a file which
    was read from a server need not be kept: the rest of it is a hole.

    Raises:
        Malformed: it says that it is a GGUF file, and is no sound one; or its header is longer than the bytes that were kept.
    """
    if not measured.head.startswith(gguf.MAGIC):
        return None
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(measured.head)
        file.truncate(measured.size)
        file.flush()
        return gguf.check(Path(file.name))


def read_chunks(path: Path, *, max_bytes: int) -> Iterator[bytes]:
    """
    Yield the bytes of the plain file *path*.

    Raises:
        PublishError: it is no plain file, it cannot be read, it is larger than *max_bytes*, or it changes meanwhile.
    """
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise PublishError(f"{path} is not a plain file")
            if before.st_size > max_bytes:
                raise PublishError(f"{path} has {before.st_size:,} bytes, more than {max_bytes:,}", hint="raise --max-size")
            while chunk := file.read(_STEP):
                yield chunk
            after = os.fstat(file.fileno())
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error.strerror}") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise PublishError(f"{path} changed while it was read")
