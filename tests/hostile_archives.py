"""
The attack collection: archives that must be refused, each named after what it tries.

``attacks()`` break a rule, ``bombs()`` a limit. Most are from the history of ``tarfile``, ``zipfile``, libarchive and Info-ZIP.
"""

from __future__ import annotations

import io
import lzma
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.archives import (
    END,
    GNU,
    KINDS,
    Zipped,
    central_header,
    deflated,
    header,
    local_header,
    member,
    packed,
    pax,
    pax_record,
    tar,
    zip64_end,
    zip_of,
)


class Attack(NamedTuple):
    """An archive of a kind, named after what it tries."""

    name: str
    kind: str
    data: bytes


UNSAFE_NAMES = {
    "absolute": b"/etc/passwd",
    "two-slashes": b"//etc/passwd",
    "parent": b"../up",
    "parent-inside": b"a/../../up",
    "parent-at-the-end": b"a/..",
    "only-parent": b"..",
    "only-dot": b".",
    "empty": b"",
    "dot-inside": b"a/./b",
    "dot-twice": b"././a",
    "dot-then-absolute": b".//etc/passwd",
    "empty-component": b"a//b",
    "backslash": b"a\\b",
    "backslash-parent": b"..\\up",
    "drive": b"C:\\up",
    "newline": b"a\nb",
    "escape": b"a\x1b[31mb",
    "delete": b"a\x7f",
    "right-to-left": "a\u202egnp".encode(),
    "zero-width": "a\u200bb".encode(),
    "byte-order-mark": "\ufeffa".encode(),
    "line-separator": "a\u2028b".encode(),
    "not-normalised": "e\u0301".encode(),
    "kelvin": "\u212a".encode(),
    "latin-1": b"na\xefve",
    "overlong": b"\xc0\xae\xc0\xae/up",
    "surrogate": b"a\xed\xa0\x80",
    "too-deep": b"/".join([b"d"] * 17),
}

COLLIDING = {
    "duplicate": (b"a", b"a"),
    "dot-and-plain": (b"a", b"./a"),
    "case": (b"a", b"A"),
    "case-of-a-folder": (b"A/x", b"a/y"),
    "sharp-s": ("straße".encode(), b"STRASSE"),
    "long-s": ("ſ".encode(), b"s"),
    "accent-that-folding-moves": ("ᾳ\u0323".encode(), "α\u0323ι".encode()),
    "accent-after-folding": ("ᾳ".encode(), "αι".encode()),
    "file-then-folder": (b"a", b"a/b"),
    "folder-then-file": (b"a/b", b"a"),
    "deep-file-as-folder": (b"a/b", b"a/b/c/d"),
}


def attacks() -> Iterator[Attack]:
    """Yield every archive that must be refused under the limits that nodes have."""
    for source in (_tar_names, _tar_links, _tar_headers, _tar_pax, _tar_ends, _compressed, _zip_names, _zip_members, _zip_shapes, _zip64):
        yield from source()


def bombs() -> Iterator[Attack]:
    """Yield archives of some kilobytes that unpack to more than the 16 MiB that a small one may."""
    zeros = tar(member(b"zeros", bytes(17 << 20)))
    for kind in KINDS[1:4]:
        yield Attack(f"ratio-{kind}", kind, packed(zeros, kind))
    yield Attack("ratio-zip", "zip", zip_of(Zipped(b"zeros", bytes(17 << 20), method=8)))
    many = [Zipped(b"%d" % index, bytes(1 << 20), method=8) for index in range(17)]
    yield Attack("ratio-zip-spread-over-members", "zip", zip_of(*many))
    lie = Zipped(b"zeros", bytes(17 << 20), method=8, local={"size": 1}, central={"size": 1})
    yield Attack("more-than-announced-zip", "zip", zip_of(lie))
    links = [member(b"l%d" % index, kind=b"1", link=b"zeros") for index in range(17)]
    yield Attack("links-to-one-file", "tar.gz", packed(tar(member(b"zeros", bytes(1 << 20)), *links), "tar.gz"))
    linked = [Zipped(b"l%d" % index, b"zeros", attributes=(stat.S_IFLNK | 0o777) << 16) for index in range(17)]
    yield Attack("links-to-one-file-zip", "zip", zip_of(Zipped(b"zeros", bytes(1 << 20), method=8), *linked))
    yield Attack("endless-zeros-after-the-end", "tar.gz", packed(tar(member(b"a", b"x"), end=bytes(32 << 20)), "tar.gz"))
    yield Attack("gzip-in-one-name", "tar.gz", b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (1 << 20))


def overlapping(count: int = 50) -> bytes:
    """Return a zip whose *count* members are one and the same kernel of 100 kB (CVE-2024-0450)."""
    kernel = Zipped(b"0", bytes(100_000), method=8)
    made = local_header(kernel.truth()) + kernel.bytes
    listed = b"".join(central_header(kernel.truth() | {"name": b"%d" % index}, 0) for index in range(count))
    return made + listed + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(listed), len(made), 0)


def quoting(count: int = 50) -> bytes:
    """Return Fifield's bomb: each member quotes the next one's local header in a stored deflate block and runs on into the kernel."""
    data = bytes(100_000)
    truth = Zipped(b"%03d" % (count - 1), data, method=8).truth()
    made = local_header(truth) + deflated(data)
    truths = [truth]
    for index in range(count - 2, -1, -1):  # outwards from the kernel: a block header of 5 bytes and the quoted one come in front
        quoted = made[: 30 + 3]
        data = quoted + data
        body = b"\x00" + struct.pack("<HH", len(quoted), len(quoted) ^ 0xFFFF) + made
        truth = Zipped(b"%03d" % index, data, method=8, payload=body).truth()
        truths.insert(0, truth)
        made = local_header(truth) + body
    listed = b"".join(central_header(one, index * (30 + 3 + 5)) for index, one in enumerate(truths))
    return made + listed + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(listed), len(made), 0)


def link_chain(victim: str) -> bytes:
    """
    Return the tar of CVE-2025-4517: links whose real path is past PATH_MAX, so that ``realpath`` stops resolving, and a file through them.

    *victim* is the path that is written to, relative to the parent of the folder that is unpacked into.
    """
    made = io.BytesIO()
    long = "d" * 247
    steps = "abcdefghijklmnop"
    with tarfile.open(fileobj=made, mode="w") as archive:
        path = ""
        for step in steps:
            archive.addfile(_info(f"{path}{long}", tarfile.DIRTYPE))
            archive.addfile(_info(f"{path}{step}", tarfile.SYMTYPE, long))
            path += f"{step}/"
        end = "/".join(steps) + "/" + "l" * 254
        archive.addfile(_info(end, tarfile.SYMTYPE, "../" * len(steps)))
        archive.addfile(_info("escape", tarfile.SYMTYPE, f"{end}/../{victim}"))
        archive.addfile(_info("hard", tarfile.LNKTYPE, "escape"))
        written = _info("hard", tarfile.REGTYPE)
        written.size = len(OVERWRITTEN)
        archive.addfile(written, io.BytesIO(OVERWRITTEN))
    return made.getvalue()


OVERWRITTEN = b"overwritten\n"


def _info(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.mode = 0o755
    return info


def _tar_names() -> Iterator[Attack]:
    for label, name in UNSAFE_NAMES.items():
        yield Attack(f"name-{label}", "tar", tar(member(b"good", b"1"), member(name, b"x")))
        yield Attack(f"folder-{label}", "tar", tar(member(name + b"/" if label not in {"empty", "only-dot"} else b"/", kind=b"5")))
    for label, names in COLLIDING.items():
        yield Attack(f"names-{label}", "tar", tar(*(member(name, b"x") for name in names)))
    yield Attack("folder-twice", "tar", tar(member(b"a/", kind=b"5"), member(b"a/", kind=b"5")))
    yield Attack("folder-then-file-of-its-name", "tar", tar(member(b"a/", kind=b"5"), member(b"a", b"x")))
    yield Attack("file-then-folder-of-its-name", "tar", tar(member(b"a", b"x"), member(b"a/", kind=b"5")))
    yield Attack("file-that-others-take-for-a-folder", "tar", tar(member(b"a/", b"x", kind=b"\0")))
    yield Attack("file-with-a-slash", "tar", tar(member(b"a/", b"x")))
    yield Attack("prefix-parent", "tar", tar(member(b"up", b"x", prefix=b"..")))
    yield Attack("prefix-absolute", "tar", tar(member(b"passwd", b"x", prefix=b"/etc")))
    yield Attack("prefix-and-absolute", "tar", tar(member(b"/etc/passwd", b"x", prefix=b"a")))
    yield Attack("nul-in-the-name", "tar", tar(member(b"a\0../../up", b"x")))
    yield Attack("nul-in-the-prefix", "tar", tar(member(b"a", b"x", prefix=b"b\0../..")))


def _tar_links() -> Iterator[Attack]:
    targets = {"absolute": b"/etc/passwd", "parent": b"../victim", "itself": b"l", "dangling": b"none", "folder": b"d"}
    for label, target in targets.items():
        for word, kind in {"symbolic": b"2", "hard": b"1"}.items():
            linked = tar(member(b"good", b"1"), member(b"d/", kind=b"5"), member(b"l", kind=kind, link=target))
            yield Attack(f"{word}-link-{label}", "tar", linked)
            yield Attack(f"{word}-link-{label}-then-a-file-over-it", "tar", tar(linked[:-1024], member(b"l", b"x")))
    for word, kind in {"symbolic": b"2", "hard": b"1"}.items():
        over_it = tar(member(b"good", b"1"), member(b"l", kind=kind, link=b"good"), member(b"l", b"x"))
        yield Attack(f"{word}-link-inside-then-a-file-over-it", "tar", over_it)
    good = member(b"a/good", b"1")
    for label, target in {
        "out-and-in-again": b"../into/a/good", "parent-inside": b"b/../good", "dot-inside": b"./././good", "empty": b"",
        "nothing-but-parents": b"..", "slash-at-the-end": b"good/", "backslash": b"..\\good", "not-utf-8": b"go\xffd", "nul": b"good\0x",
        "another-case": b"GOOD",
    }.items():  # fmt: skip
        yield Attack(f"symbolic-link-{label}", "tar", tar(good, member(b"a/l", kind=b"2", link=target)))
    circle = (member(b"x", kind=b"2", link=b"y"), member(b"y", kind=b"2", link=b"x"))
    yield Attack("links-in-a-circle", "tar", tar(good, *circle))
    through = tar(good, member(b"b", kind=b"2", link=b"a"), member(b"l", kind=b"2", link=b"b/good"))
    yield Attack("link-through-a-link-to-a-folder", "tar", through)
    yield Attack("hard-link-from-its-own-folder", "tar", tar(good, member(b"a/l", kind=b"1", link=b"good")))
    yield Attack("link-to-a-name-with-a-folder-of-it", "tar", tar(good, member(b"l", kind=b"2", link=b"a/good"), member(b"l/x", b"x")))
    through = tar(member(b"d", kind=b"2", link=b".."), member(b"d/victim", b"x"))
    yield Attack("file-through-a-symbolic-link", "tar", through)
    over = tar(member(b"d", kind=b"2", link=b".."), member(b"d/", kind=b"5"), member(b"d/victim", b"x"))
    yield Attack("folder-over-a-symbolic-link", "tar", over)
    yield Attack("hard-link-to-a-symbolic-link", "tar", tar(member(b"s", kind=b"2", link=b"../victim"), member(b"h", kind=b"1", link=b"s")))
    two = (member(b"a", kind=b"2", link=b"."), member(b"a/b", kind=b"2", link=b".."), member(b"a/b/victim", b"x"))
    yield Attack("chain-of-links", "tar", tar(*two))
    yield Attack("chain-of-links-past-path-max", "tar", link_chain("victim"))
    yield Attack("file-with-a-link-target", "tar", tar(member(b"a", b"x", link=b"/etc/passwd")))
    yield Attack("link-with-bytes", "tar", tar(member(b"a", b"x" * 600, kind=b"2", link=b"b")))
    for label, kind in {"character-device": b"3", "block-device": b"4", "fifo": b"6", "contiguous": b"7", "unknown": b"Z"}.items():
        yield Attack(label, "tar", tar(member(b"a", kind=kind)))


def _tar_headers() -> Iterator[Attack]:
    sizes = {
        "base-256": b"\x80" + bytes(10) + b"\x01", "base-256-negative": b"\xff" * 12, "base-256-huge": b"\x80" + b"\xff" * 11,
        "minus": b"-0000000001\0", "hexadecimal": b"0x10       \0", "two-numbers": b"0001 000001\0", "not-octal": b"00000000008\0",
        "none": bytes(12), "twelve-digits": b"777777777777", "plus": b"+0000000001\0",
        "underscore": b"0000_000001\0", "beyond-the-end": b"00000002000\0",
        "eight-gibibytes": b"77777777777\0", "only-spaces": b" " * 12,
    }  # fmt: skip
    for label, field in sizes.items():
        yield Attack(f"size-{label}", "tar", tar(header(b"a", size_field=field), b"x".ljust(512, b"\0")))
    good = member(b"a", b"x")
    signed = header("é".encode())  # bytes over 127, which some old programs summed up as negative numbers
    total = sum(byte - 256 if byte > 127 else byte for byte in signed[:148] + b" " * 8 + signed[156:])
    yield Attack("checksum-wrong", "tar", tar(header(b"a", checksum=b"%06o\0 " % 1)))
    yield Attack("checksum-none", "tar", tar(header(b"a", checksum=b" " * 8)))
    yield Attack("checksum-signed", "tar", tar(header("é".encode(), checksum=b"%06o\0 " % total)))
    yield Attack("version-7", "tar", tar(member(b"a", b"x", magic=bytes(8))))
    yield Attack("magic-unknown", "tar", tar(member(b"a", b"x", magic=b"ustar\x0099")))
    yield Attack("header-with-a-tail", "tar", tar(member(b"a", b"x", tail=b"tar\0")))
    yield Attack("gnu-with-a-prefix", "tar", tar(member(b"a", b"x", magic=GNU, prefix=b"b")))
    yield Attack("gnu-with-a-real-size", "tar", tar(member(b"a", b"x", magic=GNU, prefix=bytes(138) + b"77777777777\0")))
    for label, kind in {"sparse": b"S", "long-link": b"K", "dump-folder": b"D", "names": b"N"}.items():
        yield Attack(f"gnu-{label}", "tar", tar(member(b"a", b"x", magic=GNU, kind=kind), good))
    sparse = b"%011o\0%011o\0" % (0, 1)
    yield Attack("gnu-sparse-with-a-map", "tar", tar(member(b"a", b"x", magic=GNU, kind=b"S", prefix=bytes(41) + sparse)))
    yield Attack("gnu-long-name", "tar", tar(member(b"././@LongLink", b"../up\0", magic=GNU, kind=b"L"), good))
    yield Attack("gnu-long-name-of-a-safe-path", "tar", tar(member(b"././@LongLink", b"b" * 120 + b"\0", magic=GNU, kind=b"L"), good))
    long = b"b" * 120
    cut = member(long[:100], b"x", magic=GNU)

    def named(data: bytes, kind: bytes = b"L", magic: bytes = GNU) -> bytes:
        return member(b"././@LongLink", data, magic=magic, kind=kind)

    up = b"../" * 40 + b"up"
    yield Attack("gnu-long-name-that-leads-out", "tar", tar(named(up + b"\0"), member(up[:100], b"x", magic=GNU)))
    yield Attack("gnu-long-name-without-nul", "tar", tar(named(long), cut))
    yield Attack("gnu-long-name-with-a-nul-inside", "tar", tar(named(long + b"\0c\0"), cut))
    yield Attack("gnu-long-name-of-a-short-one", "tar", tar(named(b"a\0"), member(b"a", b"x", magic=GNU)))
    yield Attack("gnu-long-name-twice", "tar", tar(named(long + b"\0"), named(long + b"\0"), cut))
    yield Attack("gnu-long-name-and-pax", "tar", tar(named(long + b"\0"), pax({"path": "c" * 120}), cut))
    yield Attack("pax-and-gnu-long-name", "tar", tar(pax({"path": "c" * 120}), named(long + b"\0"), cut))
    yield Attack("gnu-long-name-in-a-posix-header", "tar", tar(named(long + b"\0", magic=b"ustar\x0000"), cut))
    yield Attack("gnu-long-name-of-nothing", "tar", tar(good, named(long + b"\0")))
    yield Attack("gnu-long-name-of-4097-bytes", "tar", tar(named(b"b" * 4096 + b"\0"), cut))
    yield Attack("gnu-long-name-with-bytes-in-its-last-block", "tar", tar(named(long + b"\0")[:-1] + b"x", cut))
    yield Attack("gnu-long-link-of-a-file", "tar", tar(named(long + b"\0", b"K"), good))
    linked = member(b"l", kind=b"2", link=long[:100], magic=GNU)
    yield Attack("gnu-long-link-that-leads-out", "tar", tar(named(up + b"\0", b"K"), member(b"l", kind=b"2", link=up[:100], magic=GNU)))
    yield Attack("gnu-long-link-of-another-link", "tar", tar(cut, named(b"c" * 120 + b"\0", b"K"), linked))
    yield Attack("gnu-second-volume", "tar", tar(member(b"a", b"x", magic=GNU, kind=b"M")))
    yield Attack("gnu-volume-label", "tar", tar(member(b"a", magic=GNU, kind=b"V")))
    yield Attack("folder-with-bytes", "tar", tar(member(b"a/", b"x" * 512, kind=b"5")))


def _tar_pax() -> Iterator[Attack]:
    good = member(b"a", b"x")
    carried = {
        "path": "b", "path-parent": "../up", "linkpath": "/etc/passwd", "size": "0", "size-negative": "-512", "size-huge": str(1 << 62),
        "hdrcharset": "BINARY", "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "../up", "GNU.sparse.realsize": "99",
        "GNU.sparse.map": "0,1", "GNU.sparse.size": "1", "SCHILY.realsize": "99", "SCHILY.filetype": "sym", "VENDOR.unknown": "1",
    }  # fmt: skip
    for label, value in carried.items():
        key = label.split("-")[0]
        yield Attack(f"pax-{label}", "tar", tar(pax({key: value}), good))
        yield Attack(f"pax-global-{label}", "tar", tar(pax({key: value}, b"g"), good))
    long = "b" * 120
    yield Attack("pax-path-that-leads-out", "tar", tar(pax({"path": "../" * 40 + "up"}), good))
    yield Attack("pax-path-for-all", "tar", tar(pax({"path": long}, b"g"), good))
    yield Attack("pax-path-twice", "tar", tar(pax(pax_record("path", long) + pax_record("path", "c" * 120)), good))
    yield Attack("pax-path-not-utf-8", "tar", tar(pax(b"12 path=a\xff\n"), good))
    yield Attack("pax-linkpath-of-a-file", "tar", tar(pax({"linkpath": long}), good))
    yield Attack("pax-linkpath-that-leads-out", "tar", tar(pax({"linkpath": "../" * 40 + "victim"}), member(b"l", kind=b"2")))
    yield Attack("pax-size-of-eight-gibibytes", "tar", tar(pax({"size": str(8 << 30)}), good))
    yield Attack("pax-size-that-the-member-has-otherwise", "tar", tar(pax({"size": "2"}), good))
    yield Attack("pax-size-of-a-link", "tar", tar(good, pax({"size": str(8 << 30)}), member(b"l", kind=b"2", link=b"a")))
    yield Attack("pax-size-with-a-sign", "tar", tar(pax({"size": "+1"}), good))
    malformed = {
        "no-length": b"mtime=1\n",
        "length-short": b"6 mtime=1\n",
        "length-long": b"99 mtime=1\n",
        "length-zero": b"0 mtime=1\n",
        "length-signed": b"+10 mtime=1\n",
        "length-padded": b"0010 mtime=1\n",
        "length-unicode": "١٠ mtime=1\n".encode(),
        "length-huge": b"9" * 4000 + b" mtime=1\n",
        "no-newline": b"11 mtime=1 ",
        "no-equals": b"9 mtime1\n",
        "no-key": b"5 =1\n",
        "empty": b"",
        "one-hidden-in-another": pax_record("comment", "x")[:-1] + b"\0" + pax_record("path", "../up"),
        "too-long": pax_record("comment", "x" * 65536),
    }
    for label, data in malformed.items():
        yield Attack(f"pax-malformed-{label}", "tar", tar(pax(data), good))
    yield Attack("pax-twice", "tar", tar(pax({"mtime": "1"}), pax({"mtime": "1"}), good))
    yield Attack("pax-before-a-global-one", "tar", tar(pax({"mtime": "1"}), pax({"mtime": "1"}, b"g"), good))
    yield Attack("pax-with-bytes-in-its-last-block", "tar", tar(pax({"mtime": "1"})[:-1] + b"x", good))
    yield Attack("pax-of-nothing", "tar", tar(good, pax({"mtime": "1"})))
    sparse = member(b"a", b"1\n0\n1\n".ljust(512, b"\0") + b"x")
    yield Attack("pax-sparse-1.0", "tar", tar(pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), sparse))


def _tar_ends() -> Iterator[Attack]:
    good = member(b"a", b"x")
    yield Attack("end-missing", "tar", tar(good, end=b""))
    yield Attack("end-of-one-block", "tar", tar(good, end=bytes(512)))
    yield Attack("end-then-a-member", "tar", tar(good, END, member(b"b", b"x")))
    yield Attack("one-zero-block-then-a-member", "tar", tar(good, bytes(512), member(b"b", b"x")))
    yield Attack("one-zero-block-and-one-that-is-not", "tar", tar(good, bytes(512), b"x" * 512))
    yield Attack("end-then-a-byte", "tar", tar(good, END, b"x", end=b""))
    yield Attack("end-then-a-zip", "tar", tar(good, END, zip_of(Zipped(b"../up", b"x")), end=b""))
    yield Attack("end-then-too-many-zeros", "tar", tar(good, end=bytes((1 << 20) + 1536)))
    yield Attack("bytes-in-the-last-block", "tar", tar(header(b"a", 1), b"x".ljust(511, b"\0") + b"y"))
    yield Attack("nothing", "tar", b"")
    yield Attack("a-zip-said-to-be-a-tar", "tar", zip_of(Zipped(b"a", b"x")))
    for end in range(0, len(tar(good, good)), 512):
        yield Attack(f"cut-at-{end}", "tar", tar(member(b"b", b"x"), good)[:end])


def _compressed() -> Iterator[Attack]:
    plain = tar(member(b"a", b"x"))
    for kind in KINDS[1:4]:
        good = packed(plain, kind)
        yield Attack(f"second-stream-{kind}", kind, good * 2)
        yield Attack(f"second-stream-with-the-end-{kind}", kind, packed(plain[:512], kind) + packed(plain[512:], kind))
        yield Attack(f"trailing-byte-{kind}", kind, good + b"\0")
        yield Attack(f"trailing-zeros-{kind}", kind, good + bytes(512))
        yield Attack(f"trailing-zip-{kind}", kind, good + zip_of(Zipped(b"a", b"x")))
        yield Attack(f"leading-byte-{kind}", kind, b"\0" + good)
        yield Attack(f"plain-{kind}", kind, plain)
        yield Attack(f"nothing-{kind}", kind, b"")
        yield Attack(f"compressed-twice-{kind}", kind, packed(good, kind))
        yield Attack(f"only-the-magic-{kind}", kind, good[:6])
        for other in KINDS[1:4]:
            if other != kind:
                yield Attack(f"{other}-said-to-be-{kind}", kind, packed(plain, other))
    gz = packed(plain, "tar.gz")
    yield Attack("gzip-checksum", "tar.gz", gz[:-8] + bytes([gz[-8] ^ 1]) + gz[-7:])
    yield Attack("gzip-length", "tar.gz", gz[:-1] + bytes([gz[-1] ^ 1]))
    yield Attack("zlib-said-to-be-gzip", "tar.gz", zlib.compress(plain))
    yield Attack("lzma-said-to-be-xz", "tar.xz", lzma.compress(plain, format=lzma.FORMAT_ALONE, preset=0))
    yield Attack("xz-huge-dictionary", "tar.xz", xz_with_dictionary(packed(plain, "tar.xz"), 40))
    zst = packed(plain, "tar.zst")
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"evil"
    yield Attack("zstd-skippable-before", "tar.zst", skippable + zst)
    yield Attack("zstd-skippable-after", "tar.zst", zst + skippable)
    yield Attack("zstd-checksum", "tar.zst", zst[:-1] + bytes([zst[-1] ^ 1]))
    yield Attack("zstd-window-of-256-mebibytes", "tar.zst", zstd_frame(plain, window=18 << 3))
    yield Attack("zstd-window-of-exabytes", "tar.zst", zstd_frame(plain, window=0xFF))
    yield Attack("zstd-reserved-block", "tar.zst", zstd_frame(plain, window=0)[:6] + b"\x07\x00\x00")
    yield Attack("zstd-dictionary", "tar.zst", b"\x28\xb5\x2f\xfd\x01\x00\x07" + zstd_frame(plain, window=0)[6:])
    yield Attack("zstd-empty-frame", "tar.zst", zstd_frame(b"", window=0))


def xz_with_dictionary(stream: bytes, size: int) -> bytes:
    """Return the xz *stream* with its first block's dictionary set to the code *size* (xz-file-format 5.3.1), checksums mended."""
    block = stream[12 : 12 + (stream[12] + 1) * 4]
    at = block.index(b"\x21\x01") + 2
    changed = (block[:at] + bytes([size]) + block[at + 1 :])[:-4]
    return stream[:12] + changed + struct.pack("<I", zlib.crc32(changed)) + stream[12 + len(block) :]


def zstd_frame(data: bytes, *, window: int) -> bytes:
    """Return a frame of one stored block, with the window descriptor *window* (RFC 8878, section 3.1.1.1.2)."""
    assert len(data) < 1 << 17
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + (1 | len(data) << 3).to_bytes(3, "little") + data


def _zip_names() -> Iterator[Attack]:
    for label, name in UNSAFE_NAMES.items():
        yield Attack(f"name-{label}", "zip", zip_of(Zipped(b"good", b"1"), Zipped(name, b"x")))
    for label, names in COLLIDING.items():
        yield Attack(f"names-{label}", "zip", zip_of(*(Zipped(name, b"x") for name in names)))
    yield Attack("folder-twice", "zip", zip_of(Zipped(b"a/", attributes=0x10), Zipped(b"a/", attributes=0x10)))
    yield Attack("nul-in-the-name", "zip", zip_of(Zipped(b"a\0../../up", b"x")))
    yield Attack("component-of-256-bytes", "zip", zip_of(Zipped(b"c" * 256, b"x")))
    yield Attack("path-of-1025-bytes", "zip", zip_of(Zipped(b"/".join([b"c" * 204] * 5) + b"c", b"x")))
    yield Attack("path-of-64-kibibytes", "zip", zip_of(Zipped(b"c/" * 32767 + b"c", b"x")))
    yield Attack("name-of-no-encoding", "zip", zip_of(Zipped("é".encode(), b"x", flags=0)))


def _zip_members() -> Iterator[Attack]:
    modes = {
        "symbolic-link": stat.S_IFLNK, "character-device": stat.S_IFCHR, "block-device": stat.S_IFBLK, "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK, "folder-by-mode": stat.S_IFDIR,
    }  # fmt: skip
    for label, mode in modes.items():
        for system, made in {"": 0x0314, "-from-dos": 0x0014}.items():
            strange = Zipped(b"a", b"../up", attributes=(mode | 0o777) << 16, central={"made": made})
            yield Attack(f"{label}{system}", "zip", zip_of(strange))
    yield Attack("symbolic-link-of-a-folder", "zip", zip_of(Zipped(b"a/", attributes=(stat.S_IFLNK | 0o777) << 16)))
    yield Attack("folder-by-attribute", "zip", zip_of(Zipped(b"a", b"x", attributes=0x10)))
    yield Attack("volume-label", "zip", zip_of(Zipped(b"a", b"x", attributes=0x08)))
    yield Attack("reparse-point", "zip", zip_of(Zipped(b"a", b"x", attributes=0x400)))
    yield Attack("folder-with-bytes", "zip", zip_of(Zipped(b"a/", b"x", attributes=0x10)))
    yield Attack("folder-with-hidden-bytes", "zip", zip_of(Zipped(b"a/", b"", method=8, attributes=0x10, payload=deflated(b"x"))))
    flags = {"encrypted": 1, "patched": 0x20, "strongly-encrypted": 0x41, "masked-headers": 0x2000, "enhanced-deflate": 0x10}
    for label, flag in flags.items():
        yield Attack(label, "zip", zip_of(Zipped(b"a", b"x", flags=0x800 | flag)))
    for method in (1, 6, 9, 12, 14, 93, 95, 99):
        yield Attack(f"method-{method}", "zip", zip_of(Zipped(b"a", b"x", method=method, payload=deflated(b"x"))))
    extras = {
        "unicode-path": b"\x75\x70\x0b\0\x01" + bytes(4) + b"../up\0", "aes": b"\x01\x99\x07\0" + bytes(7),
        "unix-link": b"\x6e\x75\x0e\0" + bytes(14), "cut-short": b"\x55\x54\x09\0\x01",
        "of-one-byte": b"\x55", "twice": b"\x55\x54\0\0" * 2,
    }  # fmt: skip
    for label, extra in extras.items():
        yield Attack(f"extra-{label}", "zip", zip_of(Zipped(b"a", b"x", central={"extra": extra})))
        yield Attack(f"extra-{label}-local", "zip", zip_of(Zipped(b"a", b"x", local={"extra": extra})))
    said: dict[str, dict[str, Any]] = {
        "name": {"name": b"b"},
        "name-longer": {"name": b"a/b"},
        "name-parent": {"name": b"../up"},
        "size": {"size": 2},
        "packed": {"packed": 2},
        "crc": {"crc": 1},
        "method": {"method": 8},
        "flags": {"flags": 0},
        "signature": {"signature": b"PK\x07\x08"},
        "needed": {"needed": 99},
        "nothing": {"crc": 0, "packed": 0, "size": 0},
    }
    for label, lie in said.items():
        yield Attack(f"local-{label}", "zip", zip_of(Zipped(b"a", b"x", local=lie)))
        yield Attack(f"central-{label}", "zip", zip_of(Zipped(b"a", b"x", central=lie)))
        if label not in {"name", "name-longer", "method", "flags", "signature", "nothing"}:
            yield Attack(f"both-{label}", "zip", zip_of(Zipped(b"a", b"x", local=lie, central=lie)))
    yield Attack("unpacks-to-less", "zip", zip_of(Zipped(b"a", b"xy", method=8, payload=deflated(b"x"))))
    yield Attack("unpacks-to-more", "zip", zip_of(Zipped(b"a", b"x", method=8, payload=deflated(b"xy"))))
    yield Attack("deflate-ends-early", "zip", zip_of(Zipped(b"a", b"x", method=8, payload=deflated(b"x") + b"hidden")))
    yield Attack("deflate-cut-short", "zip", zip_of(Zipped(b"a", b"x" * 99, method=8, payload=deflated(b"x" * 99)[:-2])))
    yield Attack("deflate-damaged", "zip", zip_of(Zipped(b"a", b"x", method=8, payload=b"\xff\xff\xff")))
    right = struct.pack("<4s3I", b"PK\x07\x08", zlib.crc32(b"x"), 1, 1)
    zeros = {"crc": 0, "packed": 0, "size": 0}
    for label, descriptor in {"missing": b"", "other-size": right[:-1] + b"\1", "unsigned": right[4:], "cut-short": right[:-1]}.items():
        yield Attack(f"descriptor-{label}", "zip", zip_of(Zipped(b"a", b"x", flags=0x808, local=zeros, descriptor=descriptor)))


def _zip_shapes() -> Iterator[Attack]:
    one = Zipped(b"a", b"x")
    good = zip_of(one)
    yield Attack("nothing", "zip", b"")
    yield Attack("bytes-before", "zip", b"#!/bin/sh\n" + good)
    yield Attack("bytes-before-and-offsets-mended", "zip", zip_of(Zipped(b"a", b"x", before=b"#!/bin/sh\n")))
    yield Attack("bytes-between", "zip", zip_of(one, Zipped(b"b", b"x", before=b"hidden")))
    yield Attack("bytes-before-the-directory", "zip", zip_of(one, gap=b"hidden"))
    yield Attack("bytes-after", "zip", good + b"x")
    yield Attack("zip-after", "zip", good + zip_of(Zipped(b"b", b"y")))
    yield Attack("comment", "zip", zip_of(one, end={"comment": b"hello"}))
    yield Attack("comment-with-another-end", "zip", zip_of(one, end={"comment": good[-22:]}))
    yield Attack("comment-said-and-not-there", "zip", good[:-2] + b"\1\0")
    yield Attack("member-that-no-directory-lists", "zip", zip_of(one, Zipped(b"b", b"x"), end={"here": 1, "count": 1}))
    yield Attack("unlisted-local-member", "zip", zip_of(one, gap=local_header(Zipped(b"b").truth())))
    yield Attack("listed-twice", "zip", overlapping(2))
    yield Attack("overlap", "zip", overlapping())
    yield Attack("overlap-by-quoting", "zip", quoting())
    inner = Zipped(b"a", zip_of(Zipped(b"b", b"y")))
    yield Attack("offset-inside-another", "zip", zip_of(inner, Zipped(b"b", b"y", central={"offset": 31})))
    yield Attack("offset-in-the-directory", "zip", zip_of(Zipped(b"a", b"x", central={"offset": 32})))
    yield Attack("offset-past-the-end", "zip", zip_of(Zipped(b"a", b"x", central={"offset": 1 << 30})))
    long = {"packed": 60, "size": 60}
    yield Attack("data-into-the-directory", "zip", zip_of(Zipped(b"a", b"x", local=long, central=long)))
    ends = {
        "split": {"disk": 1}, "split-directory": {"first": 1}, "count-more": {"here": 2, "count": 2}, "count-differs": {"here": 2},
        "count-none": {"here": 0, "count": 0}, "directory-size": {"size": 1}, "directory-start": {"start": 0},
        "directory-past-the-end": {"start": 1 << 31}, "full-count": {"here": 65535, "count": 65535},
    }  # fmt: skip
    for label, said in ends.items():
        yield Attack(f"end-{label}", "zip", zip_of(one, end=said))
    unlisted = central_header(Zipped(b"b").truth(), 0)
    length = len(good) - 22 - 32 + len(unlisted)
    yield Attack("directory-of-more-than-it-counts", "zip", zip_of(one, end={"size": length}, end64=unlisted))
    yield Attack("member-on-another-disk", "zip", zip_of(Zipped(b"a", b"x", central={"disk": 1})))
    yield Attack("a-tar-said-to-be-a-zip", "zip", tar(member(b"a", b"x")))
    for length in range(0, len(good), 7):
        yield Attack(f"cut-at-{length}", "zip", good[:length])


def _zip64() -> Iterator[Attack]:
    wide = b"\x01\0\x10\0" + struct.pack("<2Q", 1, 1)
    full = {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
    yield Attack("zip64-field-unneeded", "zip", zip_of(Zipped(b"a", b"x", central={"extra": wide})))
    yield Attack("zip64-field-missing", "zip", zip_of(Zipped(b"a", b"x", central=full)))
    yield Attack("zip64-field-short", "zip", zip_of(Zipped(b"a", b"x", central=full | {"extra": b"\x01\0\x08\0" + bytes(8)})))
    yield Attack("zip64-field-long", "zip", zip_of(Zipped(b"a", b"x", central=full | {"extra": b"\x01\0\x18\0" + bytes(24)})))
    huge = b"\x01\0\x10\0" + struct.pack("<2Q", 1 << 62, 1 << 62)
    yield Attack("zip64-field-huge", "zip", zip_of(Zipped(b"a", b"x", central=full | {"extra": huge}, local=full | {"extra": huge})))
    other = b"\x01\0\x10\0" + struct.pack("<2Q", 2, 1)
    yield Attack("zip64-local-differs", "zip", zip_of(Zipped(b"a", b"x", local=full | {"extra": other})))
    one = Zipped(b"a", b"x")
    start = 32
    size = len(zip_of(one)) - start - 22
    honest_end = {"count": 1, "size": size, "start": start, "at": start + size}
    lies = {
        "count": {"count": 2}, "start": {"start": 0}, "size": {"size": 1}, "offset": {"offset": 0},
        "disk": {"disk": 1}, "disks": {"disks": 2}, "rest": {"rest": 45},
    }  # fmt: skip
    narrow = {"": {}, "-full": {"here": 65535, "count": 65535, "size": 0xFFFFFFFF, "start": 0xFFFFFFFF}}
    for label, lie in lies.items():
        for word, end in narrow.items():
            yield Attack(f"zip64-end-{label}{word}", "zip", zip_of(one, end=end, end64=zip64_end(**(honest_end | lie))))
    for label, said in {"count": {"here": 2, "count": 2}, "start": {"start": 0}, "size": {"size": 1}, "disk": {"disk": 1}}.items():
        yield Attack(f"zip64-narrow-{label}", "zip", zip_of(one, end=said, end64=zip64_end(**honest_end)))
    hiding = Zipped(b"a", bytes(56))
    inner = {"count": 1, "size": size, "start": 31 + 56, "at": 31}
    hiding.data = zip64_end(**inner)[:56]
    yield Attack("zip64-end-inside-a-member", "zip", zip_of(hiding, end64=b"j" * 56 + zip64_end(**inner)[-20:]))
    yield Attack("zip64-locator-alone", "zip", zip_of(one, end64=zip64_end(**honest_end)[-20:]))
