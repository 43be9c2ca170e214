"""
What a file is by its first bytes, for messages about one that should be a model.

Rules that hold here:

1. Pure: the first bytes and the size are arguments, and nothing is decompressed, imported or run.
2. It names what a file looks like and decides nothing: what a model is, its digest and its test say.
3. What a file quotes of itself is anybody's text: it is short and printable where it enters a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from reconciler.core import units
from reconciler.core.text import printable

#: So many first bytes are enough for ``identify``.
HEAD_BYTES = 4096
GGUF_MAGIC = b"GGUF"

_UNPACK = {"gzip": "tar.gz", "xz": "tar.xz", "zstd": "tar.zst", "zip": "zip", "tar": "tar"}
_CONVERT = "convert it to GGUF, for example with llama.cpp's convert_hf_to_gguf.py"
_OLD = "it was written before GGUF (August 2023): convert it, or publish a newer file of the model"
_AGAIN = "download the file again, and compare its size with the one that its source names"


class _Signature(NamedTuple):
    """First bytes, the word, what people call it, and what to do about it."""

    magic: bytes
    name: str
    text: str
    hint: str


_SIGNATURES = (
    _Signature(
        b"FUGG",
        "gguf-big-endian",
        "a big-endian GGUF file",
        "convert it with gguf-py's gguf_convert_endian.py: engines here are little-endian",
    ),
    _Signature(b"lmgg", "ggml", "an old GGML file", _OLD),
    _Signature(b"fmgg", "ggml", "an old GGMF file", _OLD),
    _Signature(b"tjgg", "ggml", "an old GGJT file", _OLD),
    _Signature(b"algg", "ggml", "an old GGLA adapter file", _OLD),
    _Signature(b"\x1f\x8b", "gzip", "a gzip archive", ""),
    _Signature(b"\xfd7zXZ\x00", "xz", "an xz archive", ""),
    _Signature(b"\x28\xb5\x2f\xfd", "zstd", "a Zstandard archive", ""),
    _Signature(b"BZh", "bzip2", "a bzip2 archive", "pack it again as one of tar, tar.gz, tar.xz, tar.zst, zip"),
    _Signature(b"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive", "pack it again as one of tar, tar.gz, tar.xz, tar.zst, zip"),
    _Signature(b"Rar!\x1a\x07", "rar", "a RAR archive", "pack it again as one of tar, tar.gz, tar.xz, tar.zst, zip"),
    _Signature(b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file, as Keras writes it", _CONVERT),
    _Signature(b"\x93NUMPY", "numpy", "a NumPy array", _CONVERT),
    _Signature(b"%PDF-", "pdf", "a PDF document", _AGAIN),
    _Signature(b"\x7fELF", "elf", "a program for Linux", _AGAIN),
)
_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n(?:[a-z0-9.-]+ .*\n)*?oid (sha256:[0-9a-f]{64})\nsize ([0-9]{1,18})\n")
_HTML = re.compile(rb"\s*(?>(?:<!--.*?-->\s*)*)<(?:!doctype\s+html|html|head|body|title)\b", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(rb"<title[^>]*>(.{1,400}?)</title>", re.IGNORECASE | re.DOTALL)
_XML_WORD = re.compile(rb"<(?:code|message|title)>([^<]{1,200})<", re.IGNORECASE)
_JSON_WORD = re.compile(rb'"(?:error|message|detail|title)"\s*:\s*"([^"]{1,200})"')
_PRODUCER = re.compile(rb"\x08[\x01-\x20](?:\x12[\x01-\x40][ -~]{3}|\x3a|\x42)", re.DOTALL)


class FileType(Struct, frozen=True, kw_only=True):
    """What a file looks like."""

    #: A word for programs; ``gguf`` and ``unknown`` among them.
    name: str
    #: What it is, for a sentence: ``it is`` this.
    text: str
    #: What to do about it where a model was expected; empty: nothing in general.
    hint: str = ""


def identify(head: bytes, size: int) -> FileType:
    """Return what the file is that begins with *head* (``HEAD_BYTES`` of it, or all) and has *size* bytes."""
    return next(_candidates(head[:HEAD_BYTES], size))


def _candidates(head: bytes, size: int) -> Iterator[FileType]:
    if not size:
        yield FileType(name="empty", text="an empty file", hint=_AGAIN)
    if head.startswith(GGUF_MAGIC):
        yield _gguf(head)
    for one in _SIGNATURES:
        if head.startswith(one.magic):
            yield FileType(name=one.name, text=one.text, hint=one.hint or _unpack(one.name))
    if head.startswith(b"PK\x03\x04"):
        yield _zip(head)
    if head[257:262] == b"ustar":
        yield FileType(name="tar", text="a tar archive", hint=_unpack("tar"))
    yield from _of_other_engines(head, size)
    yield from _of_transfers(head, size)
    yield from _of_text(head)
    yield FileType(name="unknown", text="a file of no kind that is known here")


def _gguf(head: bytes) -> FileType:
    version = head[4:8]
    if len(version) == 4 and version[:2] == b"\0\0" and version[2:] != b"\0\0":
        text = f"a big-endian GGUF file (version {int.from_bytes(version, 'big')})"
        return FileType(name="gguf-big-endian", text=text, hint=_SIGNATURES[0].hint)
    return FileType(name="gguf", text="a GGUF file")


def _zip(head: bytes) -> FileType:
    if b"/data.pkl" in head or b"data.pkl" in head[30:60]:
        return FileType(name="pytorch", text="a PyTorch checkpoint (a zip with a pickle, which runs code when it is loaded)", hint=_CONVERT)
    return FileType(name="zip", text="a zip archive", hint=_unpack("zip"))


def _unpack(name: str) -> str:
    return f"if the model is inside, its publisher adds it with --unpack {_UNPACK[name]}" if name in _UNPACK else ""


def _of_other_engines(head: bytes, size: int) -> Iterator[FileType]:
    length = int.from_bytes(head[:8], "little")
    if len(head) > 9 and head[8:9] == b"{" and 2 <= length <= size - 8 and length <= 100 << 20:
        yield FileType(name="safetensors", text="a safetensors file", hint=_CONVERT)
    if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        yield FileType(name="pickle", text="a Python pickle, as PyTorch writes it, which runs code when it is loaded", hint=_CONVERT)
    if _PRODUCER.match(head):
        yield FileType(name="onnx", text="an ONNX model", hint=_CONVERT)


def _of_transfers(head: bytes, size: int) -> Iterator[FileType]:
    if pointer := _LFS.match(head):
        oid, whole = pointer[1].decode(), int(pointer[2])
        text = f"a git LFS pointer to {oid}, {whole:,} bytes ({units.human_size(whole)}), and not that file"
        yield FileType(name="lfs-pointer", text=text, hint="fetch the file itself: `git lfs pull`, or a URL with /resolve/ and not /raw/")
    if b"/annex/objects/" in head[:300] and size < 32768:
        hint = "fetch the file itself: `git annex get`"
        yield FileType(name="annex-pointer", text="a git-annex pointer, and not the file that it points to", hint=hint)
    if head[:6] in {b"\x00\x00\x00\x00\x00\x00", b"\x00\x01\x00\x00\x00\x00"} and any(head[6:]) and size < 16 << 20:
        yield FileType(name="aria2-control", text="a control file of aria2, and not the download beside it", hint=_AGAIN)
    if head and not any(head):
        text = f"a file that begins with {len(head):,} zero bytes: a download that did not end?"
        yield FileType(name="zeros", text=text, hint=_AGAIN)


def _of_text(head: bytes) -> Iterator[FileType]:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML.match(text):
        yield FileType(
            name="html", text=f"a web page{_quote(_TITLE.search(text))}", hint="look at the URL in a browser: it may ask for a login"
        )
    elif text.startswith((b"<?xml", b"<Error")):
        yield FileType(name="xml", text=f"an XML document{_quote(_XML_WORD.search(text))}", hint="a bucket's refusal? " + _AGAIN)
    elif text.startswith((b"{", b'["', b"[{")):
        yield FileType(name="json", text=f"a JSON document{_quote(_JSON_WORD.search(text))}", hint="a server's refusal? " + _AGAIN)
    elif text and re.fullmatch(rb"[\t\r\n -~\x80-\xff]+", text) and _is_utf8(text):
        shown = printable(text.decode(errors="ignore").strip(), 60)
        yield FileType(name="text", text=f'a text that begins "{shown}"', hint=_AGAIN)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(text) - 3  # the last character may be cut
    return True


def _quote(found: re.Match[bytes] | None) -> str:
    return f' ("{printable(" ".join(found[1].decode(errors="replace").split()), 120)}")' if found else ""
