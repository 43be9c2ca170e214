"""
A deliberately minimal tar reader.

``tarfile`` is not used: up to Python 3.11.12 its ``data`` filter lets a chain of links past PATH_MAX write outside (CVE-2025-4517),
a negative size makes it loop (CVE-2025-8194), and what it calls a file another reader calls a folder (CVE-2025-13462).

Rules that hold here:

1. A header is POSIX ustar, or what GNU tar writes for the same: files (``0`` or NUL), folders (``5``) and links (``1``, ``2``).
2. A header before it may say of the next member only what its own cannot hold: a name or a target that is too long or not ASCII (GNU
   ``L`` and ``K``, PAX ``path`` and ``linkpath``), and a size of 8 GiB or more (PAX ``size``). What the member can say itself, both say
   alike, and what a long name was cut to is what tar programs cut it to. Sparse maps are refused; times and owners are ignored.
3. Numbers are octal digits. Base-256 is a size of 8 GiB or more, and nothing else: no negative number.
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
_MOST_OCTAL = 8**11 - 1
_DECIMAL = re.compile(rb"[1-9][0-9]{0,18}")
_NAME_BYTES = 100
_LONG_BYTES = 4096
#: What 7-Zip puts in the place of a name that does not fit.
_CUT_BY_7ZIP = b"@PathCut/"
#: What bsdtar puts in the place of a target that does not fit.
_CUT_BY_BSDTAR = b"././@LongSymLink"
#: What another header may say of the next member.
_SAID = {b"L": "path", b"K": "linkpath"}
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
_HINT = "the model's publisher packs it again with GNU tar, or with `bsdtar --no-read-sparse`"


def entries(pieces: Iterator[bytes], members: Members) -> Iterator[Entry]:
    """
    Yield the members of the tar that *pieces* make up; each one's bytes must be read before the next is asked for.

    Raises:
        UnpackRefused: it is no strict tar, or a member breaks a rule.
    """
    stream = _Stream(pieces, members)
    said = _Said()
    while (header := stream.read_exactly(_BLOCK)) != _ZEROS:
        _check_header(header)
        flag = header[156:157]
        if flag in {b"x", b"g", b"L", b"K"}:
            archive_rules.count(members)
            said.read(stream, header)
            continue
        name, target, size = said.name(header), said.target(header), said.size(header)
        said = _Said()
        if flag in {b"1", b"2"}:
            if size:
                raise UnpackRefused(f"link {archive_rules.shown(name)} has {size} bytes")
            archive_rules.check_link(members, name, target, hard=flag == b"1")
            continue
        kind = _KINDS.get(flag, f"member of the unknown type {archive_rules.shown(flag)}")
        path = archive_rules.check(members, name, kind, size)
        yield path, None if flag == b"5" else stream.body(size)
    said.check_used()
    _check_end(stream)


class _Said:
    """What headers said of the member that follows them."""

    def __init__(self) -> None:
        self._by: list[bytes] = []
        self._values: dict[str, bytes] = {}

    def read(self, stream: _Stream, header: bytes) -> None:
        """Read what follows *header*, of one of the types ``x``, ``g``, ``L`` and ``K``."""
        flag, size = header[156:157], _number(header[124:136], "size")
        if b"x" in self._by or flag in self._by or (flag in {b"x", b"g"} and self._by):
            raise UnpackRefused("headers for one member are followed by others, and by no member")
        if flag in _SAID:
            self._values[_SAID[flag]] = _long(stream, header, size)
        else:
            found = _pax(stream, size)
            if flag == b"g" and found:
                raise UnpackRefused(f"a PAX header for all members carries {archive_rules.shown(min(found))}", hint=_HINT)
            self._values |= found
        if flag != b"g":
            self._by.append(flag)

    def check_used(self) -> None:
        """Refuse what was said of no member."""
        if self._by:
            raise UnpackRefused("a PAX header, or a GNU long name, is followed by no member")

    def name(self, header: bytes) -> bytes:
        """Return the name of the member with *header*."""
        return self._longer("path", _name(header), (_CUT_BY_7ZIP,))

    def target(self, header: bytes) -> bytes:
        """Return the target of the member with *header*, which is empty for what is no link."""
        own = _text(header[157:257], "link's target")
        if header[156:157] in {b"1", b"2"}:
            return self._longer("linkpath", own, (_CUT_BY_BSDTAR,))
        if own or "linkpath" in self._values:
            raise UnpackRefused(f"member {archive_rules.shown(_name(header))} is no link and names a target")
        return b""

    def _longer(self, what: str, own: bytes, cuts: tuple[bytes, ...]) -> bytes:
        said = self._values.get(what)
        if said is None or said == own:
            return own
        if b"x" in self._by and (len(said) > _NAME_BYTES or not said.isascii()):
            return said
        if b"x" not in self._by and len(said) >= _NAME_BYTES and (own == said[:_NAME_BYTES] or own.startswith(cuts)):
            return said
        shown = archive_rules.shown(own), archive_rules.shown(said)
        raise UnpackRefused(f"member {shown[0]} is called {shown[1]} by the header before it", hint=_HINT)

    def size(self, header: bytes) -> int:
        """Return the size of the member with *header*."""
        said = self._values.get("size")
        if said is None:
            return _size(header[124:136])
        if not _DECIMAL.fullmatch(said) or (int(said) <= _MOST_OCTAL and int(said) != _number(header[124:136], "size")):
            raise UnpackRefused(f"a PAX header says another size than its member: {archive_rules.shown(said)}", hint=_HINT)
        return int(said)


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
    name = _text(header[:100], "name")
    prefix = _text(header[345:500], "prefix")
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


def _size(field: bytes) -> int:
    """Return a member's size: octal digits, or GNU's base-256 for one that they cannot hold."""
    if field[:1] != b"\x80":
        return _number(field, "size")
    found = int.from_bytes(field[1:], "big")
    if not _MOST_OCTAL < found < 1 << 63:
        raise UnpackRefused(f"the size in a tar header is in base-256, and is {found}", hint=_HINT)
    return found


def _long(stream: _Stream, header: bytes, size: int) -> bytes:
    """Read the long name, or target, that follows a GNU *header*: it ends with a NUL, and has no other."""
    if header[257:265] != b"ustar  \0" or not _NAME_BYTES < size <= _LONG_BYTES:
        raise UnpackRefused(f"a {_KINDS[header[156:157]]} has {size} bytes, or is in a header that is not GNU's", hint=_HINT)
    data = stream.read_exactly(size)
    _check_zeros(stream.read_exactly(-size % _BLOCK), "a long name's last block")
    if data.find(b"\0") != size - 1:
        raise UnpackRefused(f"a {_KINDS[header[156:157]]} does not end with its only NUL", hint=_HINT)
    return data[:-1]


def _pax(stream: _Stream, size: int) -> dict[str, bytes]:
    """
    Read a PAX header (POSIX.1-2017, pax, extended header) and return its path, linkpath and size, those that it has.

    Raises:
        UnpackRefused: it is malformed, or has another record that would change what a member is.
    """
    found: dict[str, bytes] = {}
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
        if key in {"path", "linkpath", "size"} and key not in found:
            found[key] = data[record.end() : end - 1]
        elif not _PAX_HARMLESS.fullmatch(key):
            raise UnpackRefused(f"a PAX header carries {archive_rules.shown(key)}, which may change what a member is", hint=_HINT)
        at = end
    return found


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
