"""
Digest, size, first bytes and role of a file that a network is about to sign.

The digest is computed here over every byte, and never taken from a server's headers or a web page.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from reconciler.core import digest as digests
from reconciler.core import file_type, gguf, roles
from reconciler.core.errors import PublishError

_STEP = 1 << 20
_POINTERS = ("lfs-pointer", "annex-pointer", "aria2-control")
_ERROR_PAGES = ("html", "xml", "json", "zeros")
#: What downloaders lay beside a file that is not whole yet, or call it until it is.
_PARTIAL = (".aria2", ".part", ".crdownload", ".incomplete", ".download")


class Measured(Struct, frozen=True, kw_only=True):
    """A file's digest and size, with its first bytes."""

    digest: str
    size: int
    head: bytes
    #: How many zero bytes it ends in.
    trailing_zeros: int = 0

    def __repr__(self) -> str:
        """Leave the bytes out: they are up to 64 MiB."""
        return f"Measured(digest={self.digest!r}, size={self.size})"


def measure(chunks: Iterable[bytes], *, algorithm: str = "sha256", head_bytes: int = 0, may_be_empty: bool = False) -> Measured:
    """
    Return what the bytes in *chunks* are, and the first *head_bytes* of them.

    Raises:
        PublishError: there are none, and it may not be empty.
    """
    hasher, size, zeros, head = digests.hasher(algorithm), 0, 0, bytearray()
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        zeros = _trailing_zeros(chunk, zeros)
        if len(head) < head_bytes:
            head += chunk[: head_bytes - len(head)]
    if not (size or may_be_empty):
        raise PublishError("the file is empty")
    return Measured(digest=f"{algorithm}:{hasher.hexdigest()}", size=size, head=bytes(head), trailing_zeros=zeros)


def _trailing_zeros(chunk: bytes, before: int) -> int:
    if not chunk or chunk[-1]:
        return 0 if chunk else before
    kept = len(chunk.rstrip(b"\0"))
    return len(chunk) - kept if kept else before + len(chunk)


def gguf_facts(measured: Measured) -> gguf.GgufFacts | None:
    """
    Return what the header of a GGUF file tells, or None if it is another file. Works on the first bytes alone, so that a file which
    was read from a server need not be kept: the rest of it is a hole.

    Raises:
        Malformed: it says that it is a GGUF file, and is no sound one; or its header is longer than the bytes that were kept.
    """
    if not measured.head.startswith(gguf.MAGIC):
        return None
    if measured.trailing_zeros >= _STEP:
        raise gguf.Malformed(f"it ends in {measured.trailing_zeros:,} zero bytes: a download that did not end?")
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(measured.head)
        file.truncate(measured.size)
        file.flush()
        return gguf.check(Path(file.name))


def refuse_substitute(source: str, measured: Measured) -> None:
    """
    Refuse what nobody publishes on purpose: a pointer to a file, a downloader's own file, an error page under the name of a model.

    Raises:
        PublishError: it is such a file; the message says which.
    """
    kind = file_type.identify(measured.head, measured.size)
    if kind.name in _POINTERS or (source.endswith(".gguf") and kind.name in _ERROR_PAGES):
        raise PublishError(f"{source} is {kind.text}", hint=kind.hint)


def assign_roles(headers: Mapping[str, gguf.GgufFacts | None], given: Mapping[str, str], entrypoint: str, *, engine: str) -> dict[str, str]:
    """
    Return what each file of a model is for: as *given*, else as its header or its name says; *headers* has all files, by path.

    Raises:
        PublishError: every node would refuse it: a role contradicts a header, the entrypoint is no model, a split is missing or too many.
    """
    if unknown := next((path for path in given if path not in headers), ""):
        raise PublishError(f"--role names {unknown!r}, which is none of the files", hint=f"they are: {', '.join(sorted(headers)[:10])}")
    found = {path: given.get(path) or roles.infer(path, facts) for path, facts in headers.items()}
    if facts := headers.get(entrypoint):  # a model that is named a draft, and has no other beside it
        found[entrypoint] = given.get(entrypoint) or roles.of_header(facts)
    native = engine == "llama-cpp"
    if native:  # it loads GGUF files alone: a name claims nothing of others
        claims = {path for path, facts in headers.items() if facts is None and path not in given and found[path] in {"lora", "split"}}
        found |= dict.fromkeys(claims, "other")
    for path, facts in headers.items():
        if fault := roles.contradiction(found[path], facts) if facts else "":
            raise PublishError(f"{path}: {fault}", hint="leave --role out: the header says what the file is for")
        if native and facts is None and path in given and given[path] in roles.LOADED:
            raise PublishError(f"{path}: its role is {given[path]!r}, and it is no GGUF file, which llama-cpp loads alone")
    if native and headers[entrypoint] and found[entrypoint] not in {"model", "split"}:
        raise PublishError(f"the entrypoint {entrypoint} has the role {found[entrypoint]!r}", hint="name the model with --entrypoint")
    if fault := roles.split_fault(headers, entrypoint):
        raise PublishError(fault, hint="name every split as SOURCE, with the names that the engine's own tool gave them")
    return found


def read_chunks(path: Path, *, max_bytes: int) -> Iterator[bytes]:
    """
    Yield the bytes of the plain file *path*.

    Raises:
        PublishError: it is no plain file, it cannot be read, it is larger than *max_bytes*, or it changes meanwhile.
    """
    if beside := next((suffix for suffix in _PARTIAL if path.name.endswith(suffix) or os.path.lexists(f"{path}{suffix}")), ""):
        where = f"{path.name} is" if path.name.endswith(beside) else f"{path.name}{beside} lies beside it:"
        raise PublishError(f"{path} is no whole file: {where} a download that did not end", hint="let the download end, or begin it again")
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
