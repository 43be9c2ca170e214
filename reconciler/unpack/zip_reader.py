"""
A deliberately minimal zip reader, for which local headers and central directory must agree.

``zipfile`` is not used: it trusts the central directory alone, so members may overlap (CVE-2024-0450, and Fifield's bomb), hide or
differ from what a reader of the local headers sees; and it changes unsafe names silently, so that two members become one file.

Rules that hold here:

1. The file is local members one after another, the central directory, and its end: no gap, no overlap, nothing before or after, no comment.
2. Local header and central directory agree on name, method, flags, sizes and checksum.
3. Stored or deflated, not encrypted, not split. Extra fields are times, owners and zip64's sizes; others may rename a member or link it.
   The bytes of a link, which is one by its attributes, are its target.
4. Zip64 appears where a field is full and nowhere else, and holds exactly those fields.
"""

from __future__ import annotations

import stat
import zlib
from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, NamedTuple

from reconciler.core import archive_rules, snapshot
from reconciler.core.archive_rules import Members
from reconciler.core.errors import UnpackRefused
from reconciler.unpack import decompress

#: A member's path, and its bytes; a folder has none.
Entry = tuple[str, Iterator[bytes] | None]

# PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 (local), 4.3.12 (central), 4.3.14 to 4.3.16 (ends)
_LOCAL = Struct("<4s5H3I2H")
_CENTRAL = Struct("<4s6H3I5H2I")
_END = Struct("<4s4H2IH")
_END64 = Struct("<4sQ2H2I4Q")
_LOCATOR = Struct("<4sIQI")
_FULL16 = 0xFFFF
_FULL32 = 0xFFFFFFFF

_STORED = 0
_DEFLATED = 8
_HAS_DESCRIPTOR = 0x0008  # sizes and checksum stand after the data
_UTF8 = 0x0800
_FLAGS = 0x0006 | _HAS_DESCRIPTOR | _UTF8  # bits 1 and 2 say how hard the packer tried
_ZIP64 = 0x0001
_EXTRAS = {_ZIP64, 0x000A, 0x5455, 0x5855, 0x7855, 0x7875}  # zip64, NTFS times, Unix times, and Info-ZIP's three forms of owners
_DOS_FOLDER = 0x10
_DOS_NOT_PLAIN = 0x08 | 0x400  # volume label, reparse point
_NAME_BYTES = snapshot.MAX_PATH_BYTES + len("./") + len("/")  # all names are held at once
_MAX_VERSION_NEEDED = 45  # the version needed for zip64
_HINT = "the model's publisher packs it again with `zip -X -r`, or as a tar"


class _Member(NamedTuple):
    """One member as the central directory describes it, with zip64 resolved."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    is_link: bool

    @property
    def is_folder(self) -> bool:
        return self.name.endswith(b"/")


def entries(file: BinaryIO, length: int, members: Members) -> Iterator[Entry]:
    """
    Yield the members of the zip *file* of *length* bytes; each one's bytes must be read before the next is asked for.

    Raises:
        UnpackRefused: it is no strict zip, or a member breaks a rule.
    """
    count, start, size = _directory(file, length)
    if count > members.limits.archive_members:  # before they are read; each is counted again when it is checked
        raise UnpackRefused(f"the zip lists {count} members; the most is {members.limits.archive_members}")
    listed = sorted(_central(file, count, start, size), key=lambda member: member.offset)
    at = 0
    for member in listed:
        if member.offset != at:
            raise UnpackRefused(f"member {archive_rules.shown(member.name)} does not begin where the one before it ends")
        if not member.is_link:
            path = archive_rules.check(members, _name(member), "folder" if member.is_folder else "file", member.size)
        described, wide, at = _check_local(file, member)
        body = _body(file, member, members)
        if member.is_link:
            archive_rules.check_link(members, _name(member), _target(member, body), hard=False)
        elif member.is_folder:
            for _ in body:
                raise UnpackRefused(f"the folder {archive_rules.shown(member.name)} has bytes")
            yield path, None
        else:
            yield path, body
        if described:
            at += _check_descriptor(file, member, wide=wide)
    if at != start:
        raise UnpackRefused("the last member does not end where the directory begins")


def _directory(file: BinaryIO, length: int) -> tuple[int, int, int]:
    """Return how many members the directory lists, where it starts and its size."""
    if length < _END.size:
        raise UnpackRefused("the zip is cut short")
    signature, disk, first, here, count, size, start, comment = _END.unpack(_read(file, _END.size, length - _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise UnpackRefused("the zip does not end with its directory: it is cut short, or a comment or other bytes follow")
    end = length - _END.size
    if end >= _LOCATOR.size and (locator := _read(file, _LOCATOR.size, end - _LOCATOR.size))[:4] == b"PK\x06\x07":
        narrow = (disk, first, here, count, size, start)
        disk, first, here, count, size, start = _directory64(file, locator, end - _LOCATOR.size, narrow)
        end -= _LOCATOR.size + _END64.size
    if disk or first or here != count:
        raise UnpackRefused("the zip is one part of several")
    if start + size != end:
        raise UnpackRefused("the zip's directory is not where its end says: bytes were put before or after it")
    return count, start, size


_Numbers = tuple[int, int, int, int, int, int]


def _directory64(file: BinaryIO, locator: bytes, end: int, narrow: _Numbers) -> _Numbers:
    """Return the numbers of the zip64 end, which lies right before its locator and agrees with the *narrow* ones that are not full."""
    _, disk, offset, disks = _LOCATOR.unpack(locator)
    if disk or disks != 1 or offset != end - _END64.size:
        raise UnpackRefused("the zip64 end is not where its locator says")
    signature, rest, _, needed, *numbers = _END64.unpack(_read(file, _END64.size, offset))
    if signature != b"PK\x06\x06" or rest != _END64.size - 12 or needed > _MAX_VERSION_NEEDED:
        raise UnpackRefused("the zip64 end is malformed")
    this, first, here, count, size, start = numbers
    for value, small, full in zip(numbers, narrow, (_FULL16,) * 4 + (_FULL32,) * 2, strict=True):
        if small not in {value, full}:
            raise UnpackRefused("the zip's two ends disagree")
    return this, first, here, count, size, start


def _central(file: BinaryIO, count: int, start: int, size: int) -> list[_Member]:
    """Return the members that the directory lists."""
    file.seek(start)
    left = size
    found = []
    for _ in range(count):
        fields = _CENTRAL.unpack(_take(file, _CENTRAL.size))
        signature, _, needed, flags, method, _, _, crc, packed, whole, named, extra, comment, disk, _, attributes, offset = fields
        left -= _CENTRAL.size + named + extra + comment
        if signature != b"PK\x01\x02" or named > _NAME_BYTES:
            raise UnpackRefused("the zip's directory is malformed, or holds a name that is too long")
        name = _take(file, named)
        whole, packed, offset = _resolve_zip64(name, _take(file, extra), (whole, packed, offset))
        _take(file, comment)
        if disk or needed & 0xFF > _MAX_VERSION_NEEDED:
            raise UnpackRefused(f"member {archive_rules.shown(name)} needs a zip reader that knows more")
        is_link = stat.S_ISLNK(attributes >> 16) and not name.endswith(b"/")
        member = _Member(name, flags, method, crc, packed, whole, offset, is_link)
        _check_member(member, attributes)
        found.append(member)
    if left:
        raise UnpackRefused("the zip's directory is not as long as what it lists")
    return found


def _check_member(member: _Member, attributes: int) -> None:
    """Refuse what is no plain file or folder by its method, flags or attributes, whichever system it says that it is from."""
    name = archive_rules.shown(member.name)
    if member.flags & ~_FLAGS:
        raise UnpackRefused(f"member {name} is encrypted, or packed in a way that no model needs (flags {member.flags:#06x})", hint=_HINT)
    if member.method not in {_STORED, _DEFLATED}:
        raise UnpackRefused(f"member {name} is packed by method {member.method}; only stored and deflated are read", hint=_HINT)
    odd = attributes & _DOS_NOT_PLAIN or (attributes & _DOS_FOLDER and not member.is_folder)
    plain = stat.S_IFDIR if member.is_folder else stat.S_IFLNK if member.is_link else stat.S_IFREG
    if odd or stat.S_IFMT(attributes >> 16) not in {0, plain}:
        raise UnpackRefused(f"member {name} is not the plain file or folder that its name says: its attributes are {attributes:#x}")


def _name(member: _Member) -> bytes:
    """Return the name as UTF-8; without the flag for it, it is in whatever code page the reader likes, unless it is ASCII."""
    if not member.flags & _UTF8 and not member.name.isascii():
        raise UnpackRefused(f"the name of member {archive_rules.shown(member.name)} does not say that it is UTF-8", hint=_HINT)
    return member.name


def _target(member: _Member, body: Iterator[bytes]) -> bytes:
    """Return what the link *member* leads to, which is its *body*."""
    if member.size > snapshot.MAX_PATH_BYTES:
        raise UnpackRefused(f"the target of link {archive_rules.shown(member.name)} has {member.size} bytes")
    return b"".join(body)


def _check_local(file: BinaryIO, member: _Member) -> tuple[bool, bool, int]:
    """Read the local header up to the data; return whether a descriptor follows them, in zip64's width, and where they end."""
    name = archive_rules.shown(member.name)
    fields = _LOCAL.unpack(_read(file, _LOCAL.size, member.offset))
    signature, needed, flags, method, _, _, crc, packed, size, named, extra = fields
    if signature != b"PK\x03\x04" or needed & 0xFF > _MAX_VERSION_NEEDED:
        raise UnpackRefused(f"member {name} has no local header that can be read")
    if _take(file, named) != member.name or (flags, method) != (member.flags, member.method):
        raise UnpackRefused(f"member {name} has another name, method or flags in its local header")
    data = _take(file, extra)
    wide = _ZIP64 in _extras(member.name, data)
    size, packed = _resolve_zip64(member.name, data, (size, packed))
    described = bool(flags & _HAS_DESCRIPTOR)
    said = zip((crc, packed, size), (member.crc, member.packed, member.size), strict=True)
    if any(value != truth and not (described and value == 0) for value, truth in said):  # a packer that streams knows some of them
        raise UnpackRefused(f"member {name} has other sizes or another checksum in its local header")
    return described, wide, file.tell() + member.packed


def _check_descriptor(file: BinaryIO, member: _Member, *, wide: bool) -> int:
    """Read the descriptor after the data, which repeats what the directory says; return its length."""
    form = Struct("<4sI2Q" if wide else "<4s3I")
    if form.unpack(_take(file, form.size)) != (b"PK\x07\x08", member.crc, member.packed, member.size):
        raise UnpackRefused(f"member {archive_rules.shown(member.name)} has other sizes or another checksum after its data")
    return form.size


def _body(file: BinaryIO, member: _Member, members: Members) -> Iterator[bytes]:
    """Yield the member's bytes, from where the file stands, and check that they are what was announced."""
    crc = 0
    size = 0
    with decompress.refuse_malformed("deflate"):
        for piece in _stored(file, member.packed) if member.method == _STORED else decompress.inflate(file, member.packed):
            archive_rules.spend(members, len(piece))
            crc = zlib.crc32(piece, crc)
            size += len(piece)
            if size > member.size:
                break
            if piece:
                yield piece
    if (crc, size) != (member.crc, member.size):
        raise UnpackRefused(f"member {archive_rules.shown(member.name)} unpacks to other bytes than it announces")


def _stored(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = _take(file, min(size, decompress.CHUNK_BYTES))
        size -= len(piece)
        yield piece


def _resolve_zip64(name: bytes, extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return *numbers*, those that are full replaced by what zip64's extra field holds (APPNOTE 4.5.3)."""
    found = _extras(name, extra)
    full = [number == _FULL32 for number in numbers]
    if _ZIP64 not in found:
        if any(full):
            raise UnpackRefused(f"member {archive_rules.shown(name)} is of a size that only zip64 holds, and says none")
        return numbers
    field = found[_ZIP64]
    if len(field) != 8 * sum(full):
        raise UnpackRefused(f"member {archive_rules.shown(name)} has a zip64 field that does not match the others")
    wide = iter([int.from_bytes(field[at : at + 8], "little") for at in range(0, len(field), 8)])
    return tuple(next(wide) if is_full else number for number, is_full in zip(numbers, full, strict=True))


def _extras(name: bytes, extra: bytes) -> dict[int, bytes]:
    """Return the extra fields by their ids, each known and once."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(extra):
        key = int.from_bytes(extra[at : at + 2], "little")
        end = at + 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
        if end > len(extra) or at + 4 > len(extra) or key in found or key not in _EXTRAS:
            raise UnpackRefused(f"member {archive_rules.shown(name)} has an extra field that is not read here ({key:#06x})", hint=_HINT)
        found[key] = extra[at + 4 : end]
        at = end
    return found


def _read(file: BinaryIO, size: int, at: int) -> bytes:
    file.seek(at)
    return _take(file, size)


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UnpackRefused("the zip is cut short")
    return data
