"""
A deliberately minimal tar reader.

``tarfile`` is not used: up to Python 3.11.12 its ``data`` filter lets a chain of links past PATH_MAX write outside (CVE-2025-4517),
a negative size makes it loop (CVE-2025-8194), and what it calls a file another reader calls a folder (CVE-2025-13462).

Rules that hold here:

1. A header is POSIX ustar, or what GNU tar writes for the same: files (``0`` or NUL) and folders (``5``).
2. No header changes what another one says: GNU long names, PAX paths, sizes and sparse maps are refused. A PAX header may carry
   times and owners, which are ignored.
3. Numbers are octal digits. Base-256, which holds negative ones, is refused, so a file in a tar is under 8 GiB; a zip has no such bound.
4. Every byte has one meaning: fields are padded with NUL, files with zeros, and after the two zero blocks at the end come zeros alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reconciler.core import archive_rules
from reconciler.core.archive_rules import Members
from reconciler.core.errors import UnpackRefused

#: A member's path, and its bytes; a folder has none.
Entry = tuple[str, Iterator[bytes] | None]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
#: The most zeros after the end: the largest record that GNU tar writes (``-b 2048``).
_PADDING = 1 << 20
_PAX_BYTES = 64 << 10
_OCTAL = re.compile(rb" *([0-7]{1,11})[ \0]*")
_KINDS = {
    b"0": "file", b"\0": "file", b"5": "folder", b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device",
    b"6": "FIFO", b"7": "contiguous file", b"S": "sparse file", b"M": "part of another volume", b"V": "volume label",
    b"D": "GNU dump folder", b"L": "GNU long name", b"K": "GNU long link",
}  # fmt: skip
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,4}) ([^=\n]+)=")
_PAX_HARMLESS = re.compile(
    r"(?:atime|ctime|mtime|uid|gid|uname|gname|comment|SCHILY\.(?:dev|ino|nlink|fflags|xattr\..+|acl\..+)"
    r"|LIBARCHIVE\.(?:creationtime|xattr\..+)|RHT\.security\.selinux)",
)
_HINT = "the model's publisher packs it again with `tar --format=ustar`, or as zip where a path or a file is too long for that"


def entries(pieces: Iterator[bytes], members: Members) -> Iterator[Entry]:
    """
    Yield the members of the tar that *pieces* make up; each one's bytes must be read before the next is asked for.

    Raises:
        UnpackRefused: it is no strict tar, or a member breaks a rule.
    """
    stream = _Stream(pieces, members)
    described = False  # by a PAX header that belongs to the next member
    while (header := stream.read_exactly(_BLOCK)) != _ZEROS:
        _check_header(header)
        size = _number(header[124:136], "size")
        flag = header[156:157]
        if flag in {b"x", b"g"}:
            if described:
                raise UnpackRefused("a PAX header is followed by no member")
            archive_rules.count(members)
            _check_pax(stream, size)
            described = flag == b"x"
            continue
        described = False
        path = archive_rules.check(
            members, _name(header), _KINDS.get(flag, f"member of the unknown type {archive_rules.shown(flag)}"), size
        )
        if flag == b"5":
            yield path, None
        else:
            yield path, stream.body(size)
    if described:
        raise UnpackRefused("a PAX header is followed by no member")
    _check_end(stream)


class _Stream:
    """The bytes of a tar; each chunk of the decompressor is counted against the limits here."""

    def __init__(self, pieces: Iterator[bytes], members: Members) -> None:
        self._pieces = pieces
        self._members = members
        self._piece = b""
        self._at = 0

    def read_some(self, most: int) -> bytes:
        """Return at least one and at most *most* bytes, or none at the end."""
        while self._at == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            archive_rules.spend(self._members, len(piece))
            self._piece, self._at = piece, 0
        data = self._piece[self._at : self._at + most]
        self._at += len(data)
        return data

    def read_exactly(self, count: int) -> bytes:
        """Return exactly *count* bytes, which are few."""
        data = self.read_some(count)
        while len(data) < count:
            more = self.read_some(count - len(data))
            if not more:
                raise UnpackRefused("the tar is cut short")
            data += more
        return data

    def body(self, size: int) -> Iterator[bytes]:
        """Yield the *size* bytes of a file, then read the zeros that fill its last block."""
        left = size
        while left:
            data = self.read_some(left)
            if not data:
                raise UnpackRefused("the tar is cut short")
            left -= len(data)
            yield data
        if padding := -size % _BLOCK:
            _check_zeros(self.read_exactly(padding), "a file's last block")


def _check_header(header: bytes) -> None:
    """Refuse a header that is not exactly ustar's, or GNU's with nothing of its own in it."""
    found = _number(header[148:156], "checksum")
    if found != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise UnpackRefused("a tar header does not match its checksum")
    magic = header[257:265]
    if magic == b"ustar\x0000":
        _check_zeros(header[500:], "a tar header's end")
    elif magic == b"ustar  \0":
        _check_zeros(header[345:], "a GNU header's own part (dump times, offset, sparse map)")
    else:
        raise UnpackRefused("a tar header is neither ustar nor GNU", hint=_HINT)


def _name(header: bytes) -> bytes:
    """Return the member's name, of a header that was checked."""
    kind = header[156:157]
    if kind in {b"L", b"K"}:
        raise UnpackRefused(f"the archive holds a {_KINDS[kind]}, which changes the next member's", hint=_HINT)
    name = _text(header[:100], "name")
    prefix = _text(header[345:500], "prefix")
    if kind in {b"0", b"\0", b"5"} and header[157:257].strip(b"\0"):
        raise UnpackRefused(f"member {archive_rules.shown(name)} is no link and names a target")
    if prefix and not name:
        raise UnpackRefused(f"a tar header has the prefix {archive_rules.shown(prefix)} and no name")
    return prefix + b"/" + name if prefix else name


def _text(field: bytes, what: str) -> bytes:
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise UnpackRefused(f"a {what} in a tar header has a NUL in it: {archive_rules.shown(field.rstrip(bytes(1)))}")
    return text


def _number(field: bytes, what: str) -> int:
    found = _OCTAL.fullmatch(field)
    if not found:
        raise UnpackRefused(f"the {what} in a tar header is not octal digits: {archive_rules.shown(field)}", hint=_HINT)
    return int(found[1], 8)


def _check_pax(stream: _Stream, size: int) -> None:
    """Read a PAX header (POSIX.1-2017, pax, extended header) and refuse any record that would change what a member is."""
    if not 0 < size <= _PAX_BYTES:
        raise UnpackRefused(f"a PAX header has {size} bytes")
    data = stream.read_exactly(size)
    _check_zeros(stream.read_exactly(-size % _BLOCK), "a PAX header's last block")
    at = 0
    while at < size:
        record = _PAX_RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if not record or end > size or data[end - 1 : end] != b"\n":
            raise UnpackRefused("a PAX header is malformed")
        key = record[2].decode("utf-8", "backslashreplace")
        if not _PAX_HARMLESS.fullmatch(key):
            raise UnpackRefused(f"a PAX header carries {archive_rules.shown(key)}, which may change what a member is", hint=_HINT)
        at = end


def _check_end(stream: _Stream) -> None:
    """Read the second zero block, and refuse anything but zeros after it."""
    _check_zeros(stream.read_exactly(_BLOCK), "the second block at the end")
    padding = 0
    while data := stream.read_some(_BLOCK * 128):
        _check_zeros(data, "what follows the end of the tar")
        padding += len(data)
        if padding > _PADDING:
            raise UnpackRefused("the tar is followed by more zeros than any tar program writes")


def _check_zeros(data: bytes, what: str) -> None:
    if data.count(0) != len(data):
        raise UnpackRefused(f"{what} is not zeros, so another reader may see another archive")
