"""
Archives made from bytes, as strangers make them: each field of each header is whatever a test says.

``tar`` and ``zip_of`` put honest archives together, of members whose every part can be overridden; ``hostile_archives`` is made of them.

    data = tar(member(b"a/b", b"bytes"), member(b"l", kind=b"2", link=b"/etc/passwd"))
    data = zip_of(Zipped(b"a", b"bytes", central={"crc": 0}))
"""

from __future__ import annotations

import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec
import zstandard

KINDS = ("tar", "tar.gz", "tar.xz", "tar.zst", "zip")
END = bytes(1024)
USTAR = b"ustar\x0000"
GNU = b"ustar  \0"


# -- tar, from bytes -------------------------------------------------------------------------------


def header(name: bytes, size: int = 0, *, kind: bytes = b"0", link: bytes = b"", magic: bytes = USTAR, **fields: bytes) -> bytes:
    """Return one header block; *fields* override by name: ``size``, ``checksum``, ``prefix``, ``tail`` (all after the prefix)."""
    prefix = fields.get("prefix", b"")
    parts = [
        name.ljust(100, b"\0"), b"0000644\0", b"0001750\0", b"0001750\0", fields.get("size_field", b"%011o\0" % max(size, 0)),
        b"14000000000\0", b" " * 8, kind, link.ljust(100, b"\0"), magic, b"user".ljust(32, b"\0"), b"group".ljust(32, b"\0"),
        b"0000000\0", b"0000000\0", prefix.ljust(155, b"\0"), fields.get("tail", b"").ljust(12, b"\0"),
    ]  # fmt: skip
    block = b"".join(parts)
    assert len(block) == 512, len(block)
    return block[:148] + fields.get("checksum", b"%06o\0 " % sum(block)) + block[156:]


def member(name: bytes, data: bytes = b"", **fields: Any) -> bytes:
    """Return a member of a tar: its header, its bytes, and the zeros that fill the last block."""
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pax(records: Mapping[str, str] | bytes, kind: bytes = b"x") -> bytes:
    """Return a PAX header that carries *records*."""
    data = records if isinstance(records, bytes) else b"".join(pax_record(key, value) for key, value in records.items())
    return member(b"././@PaxHeader", data, kind=kind)


def pax_record(key: str, value: str) -> bytes:
    """Return one record, whose length counts itself."""
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while length != len(str(length)) + len(rest):
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def tar(*members: bytes, end: bytes = END) -> bytes:
    """Return a tar of members and other blocks."""
    return b"".join(members) + end


def packed(data: bytes, kind: str) -> bytes:
    """Return the tar *data* compressed as *kind* says, by the standard library and zstandard."""
    if kind == "tar.gz":
        return gzip.compress(data, mtime=0)
    if kind == "tar.xz":
        return lzma.compress(data, preset=0)
    if kind == "tar.zst":
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
    return data


# -- zip, from bytes -------------------------------------------------------------------------------


class Zipped(msgspec.Struct):
    """A member of a zip, with what its two headers say where that is not the truth."""

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0x800
    attributes: int = (stat.S_IFREG | 0o644) << 16
    #: What stands for the data, if not they themselves.
    payload: bytes | None = None
    descriptor: bytes = b""
    #: Bytes before the local header, which nothing lists.
    before: bytes = b""
    local: dict[str, Any] = {}
    central: dict[str, Any] = {}

    def truth(self) -> dict[str, Any]:
        """Return what both headers say of an honest member."""
        payload = self.bytes
        return {
            "signature": b"", "made": 0x0314, "needed": 20, "flags": self.flags, "method": self.method, "crc": zlib.crc32(self.data),
            "packed": len(payload), "size": len(self.data), "name": self.name, "extra": b"", "comment": b"", "disk": 0,
            "attributes": self.attributes,
        }  # fmt: skip

    @property
    def bytes(self) -> bytes:
        """The member's data as they lie in the archive."""
        if self.payload is not None:
            return self.payload
        return deflated(self.data) if self.method == 8 else self.data


def deflated(data: bytes) -> bytes:
    """Return *data* as a raw deflate stream."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return machine.compress(data) + machine.flush()


def local_header(fields: Mapping[str, Any]) -> bytes:
    """Return a local header."""
    numbers = (fields["needed"], fields["flags"], fields["method"], 0, 33, fields["crc"], fields["packed"], fields["size"])
    name: bytes = fields["name"]
    extra: bytes = fields["extra"]
    return struct.pack("<4s5H3I2H", fields["signature"] or b"PK\x03\x04", *numbers, len(name), len(extra)) + name + extra


def central_header(fields: Mapping[str, Any], offset: int) -> bytes:
    """Return an entry of the central directory."""
    numbers = (fields["made"], fields["needed"], fields["flags"], fields["method"], 0, 33, fields["crc"], fields["packed"], fields["size"])
    name: bytes = fields["name"]
    extra: bytes = fields["extra"]
    comment: bytes = fields["comment"]
    lengths = (len(name), len(extra), len(comment), fields["disk"], 0, fields["attributes"], fields.get("offset", offset))
    return struct.pack("<4s6H3I5H2I", fields["signature"] or b"PK\x01\x02", *numbers, *lengths) + name + extra + comment


def zip_of(*members: Zipped, gap: bytes = b"", end: Mapping[str, Any] | None = None, end64: bytes = b"") -> bytes:
    """Return a zip of *members*; *gap* lies before the directory, *end64* before the end, whose fields *end* overrides."""
    made, listed = b"", b""
    for one in members:
        made += one.before
        listed += central_header(one.truth() | one.central, len(made))
        made += local_header(one.truth() | one.local) + one.bytes + one.descriptor
    made += gap
    said: dict[str, Any] = {"disk": 0, "first": 0, "here": len(members), "count": len(members), "size": len(listed), "start": len(made)}
    said |= end or {}
    comment: bytes = said.get("comment", b"")
    numbers = [said[key] for key in ("disk", "first", "here", "count", "size", "start")]
    return made + listed + end64 + struct.pack("<4s4H2IH", b"PK\x05\x06", *numbers, len(comment)) + comment


def zip64_end(*, count: int, size: int, start: int, at: int, **said: Any) -> bytes:
    """Return the zip64 end and its locator, for an archive whose directory ends *at*."""
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", said.get("rest", 44), 45, 45, said.get("disk", 0), 0, count, count, size, start)
    return end + struct.pack("<4sIQI", b"PK\x06\x07", 0, said.get("offset", at), said.get("disks", 1))


# -- honest archives, by the standard library ------------------------------------------------------


def honest(files: Mapping[str, bytes], kind: str) -> bytes:
    """Return an archive of *files* as Python's own libraries write it."""
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        return made.getvalue()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as written:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            written.addfile(info, io.BytesIO(data))
    return packed(made.getvalue(), kind)
