"""
What an archive's members must be before anything of them is written.

Rules that hold here:

1. A member is a regular file, a folder, or a link to a regular file of the same archive, which becomes a copy of it: no link is ever made.
   Links that lead anywhere else, through a link as a folder, or to folders, devices and the rest are refused.
2. Its name is a path as the snapshot's own are: relative, in NFC, and meaning the same everywhere. One leading ``./``, which
   ``tar -C folder .`` writes, is dropped; nothing else is mended, since a mended name is one that two readers read differently.
3. No two members share a name, not even on a disk that folds case or normalises, and no file is also a folder.
4. Bytes are counted as they come out of the decompressor. A size in a header is a claim: it can refuse an archive, never admit one.
5. The first member that breaks a rule refuses the whole archive.
"""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

from reconciler.core import snapshot, units
from reconciler.core.errors import UnpackRefused
from reconciler.core.node import Limits

#: A small archive may unpack to so many bytes whatever its ratio is: text that repeats packs a thousandfold.
FLOOR_BYTES = 16 << 20

_Holder = Literal["file", "folder", "parent"]


class Link(NamedTuple):
    """A link: the path of the copy, and the path of the file that is copied, both in the archive."""

    path: str
    target: str


class Members:
    """What was taken from one archive of *archive_bytes* so far, and how much more may be."""

    def __init__(self, limits: Limits, archive_bytes: int) -> None:
        self.limits = limits
        self.allowance = min(limits.archive_bytes, max(FLOOR_BYTES, limits.archive_ratio * archive_bytes))
        self.unpacked = 0
        self.entries = 0
        self.files: list[str] = []
        self.claimed: dict[str, tuple[str, _Holder]] = {}
        #: The sizes of the files so far, and the links to them.
        self.sizes: dict[str, int] = {}
        self.links: list[Link] = []


def check(members: Members, name: bytes | str, kind: str, size: int) -> str:
    """
    Take the next member among *members* and return the path to write it at; empty for the archive's own top folder.

    *kind* is ``file``, ``folder``, or the words for what else it is; *size* is what its header claims.

    Raises:
        UnpackRefused: it breaks a rule.
    """
    count(members)
    if kind not in {"file", "folder"}:
        raise UnpackRefused(f"member {shown(name)} is a {kind}; only plain files and folders are unpacked")
    _check_size(members, name, kind, size)
    path = _path(members, name, kind)
    if path:
        _claim(members, path, "file" if kind == "file" else "folder")
    if kind == "file":
        members.sizes[path] = size
    return path


def check_link(members: Members, name: bytes | str, target: bytes | str, *, hard: bool) -> None:
    """
    Take the link *name* among *members*; ``links`` says what becomes of it. A *hard* one names its target from the archive's top.

    Raises:
        UnpackRefused: it breaks a rule, or leads out of the archive.
    """
    count(members)
    path = _path(members, name, "file")
    found = _path(members, target, "file") if hard else _path(members, _beside(path, target), "file")
    _claim(members, path, "file")
    members.links.append(Link(path, found))


def _beside(path: str, target: bytes | str) -> str:
    """Return what the symbolic link at *path* leads to; ``..`` stands at the beginning of *target* alone, where no link can be meant."""
    try:
        parts = (target if isinstance(target, str) else target.decode()).removeprefix("./").split("/")
    except UnicodeDecodeError:
        raise UnpackRefused(f"the target of link {shown(path)} is not UTF-8: {shown(target)}") from None
    above = path.split("/")[:-1]
    while parts[0] == ".." and len(parts) > 1:
        if not above:
            raise UnpackRefused(f"link {shown(path)} leads out of the archive: {shown(target)}")
        above.pop()
        del parts[0]
    return "/".join((*above, *parts))


def links(members: Members) -> Iterator[Link]:
    """
    Yield the links, each once its target is there, after all other members; each copy is accounted for as bytes that came out.

    The work grows with the number of links, and not with its square: a hostile archive has one long chain of them.

    Raises:
        UnpackRefused: one leads to no file of the archive, or they are more bytes than it may hold.
    """
    waiting: dict[str, list[Link]] = {}
    for link in members.links:
        waiting.setdefault(link.target, []).append(link)
    there = deque(target for target in waiting if target in members.sizes)
    while there:
        target = there.popleft()
        for link in waiting.pop(target):
            spend(members, members.sizes[target])
            members.sizes[link.path] = members.sizes[target]
            yield link
            if link.path in waiting:
                there.append(link.path)
    for target, (first, *_) in waiting.items():
        raise UnpackRefused(f"link {shown(first.path)} leads to {shown(target)}, which is no file of the archive")


def count(members: Members) -> None:
    """
    Account for one more of members, the folders above them, and whatever else an archive has a header for.

    Raises:
        UnpackRefused: they are more than an archive may have.
    """
    members.entries += 1
    if members.entries > members.limits.archive_members:
        raise UnpackRefused(f"the archive has more than {members.limits.archive_members} members")


def spend(members: Members, unpacked: int) -> None:
    """
    Account for *unpacked* bytes that came out of the archive, before they are used.

    Raises:
        UnpackRefused: they are more than an archive of its size may hold.
    """
    members.unpacked += unpacked
    if members.unpacked > members.allowance:
        raise UnpackRefused(_over_allowance(members))


def shown(name: bytes | str) -> str:
    """Return a member's name as messages quote it: ASCII alone, and not at any length."""
    if isinstance(name, bytes):
        try:
            name = name.decode()
        except UnicodeDecodeError:
            return ascii(name[:120])[1:]
    return ascii(name if len(name) <= 120 else f"{name[:120]}...")


def _check_size(members: Members, name: bytes | str, kind: str, size: int) -> None:
    if size < 0 or (kind == "folder" and size):
        raise UnpackRefused(f"member {shown(name)} claims {size} bytes")
    if size > members.allowance:
        raise UnpackRefused(f"member {shown(name)} claims {size} bytes: {_over_allowance(members)}")


def _over_allowance(members: Members) -> str:
    return f"the archive unpacks to more than {units.human_size(members.allowance)}, which is the most for one of its size"


def _path(members: Members, name: bytes | str, kind: str) -> str:
    """Return the relative path that *name* stands for."""
    try:
        path = (name if isinstance(name, str) else name.decode()).removeprefix("./")
    except UnicodeDecodeError:
        raise UnpackRefused(f"the name of member {shown(name)} is not UTF-8") from None
    if kind == "folder":
        if not path and name:
            return ""
        path = path.removesuffix("/")
    try:
        snapshot.check_path(path)
    except ValueError as error:
        reason = str(error).encode("ascii", "backslashreplace").decode()
        raise UnpackRefused(f"member {shown(name)}: {reason}") from None
    if path.count("/") >= members.limits.archive_depth:
        raise UnpackRefused(f"member {shown(name)} lies deeper than {members.limits.archive_depth} folders")
    return path


def _claim(members: Members, path: str, kind: _Holder) -> None:
    """Take *path* and every folder above it, unless one of them is already something else."""
    end = path.find("/")
    while end != -1:
        _claim_one(members, path[:end], "parent")
        end = path.find("/", end + 1)
    _claim_one(members, path, kind)
    if kind == "file":
        members.files.append(path)


def _claim_one(members: Members, path: str, kind: _Holder) -> None:
    key = _folded(path)
    if key not in members.claimed:
        if kind == "parent":
            count(members)  # it takes an inode, as one with a header does
        members.claimed[key] = (path, kind)
        return
    spelling, holder = members.claimed[key]
    if spelling != path:
        raise UnpackRefused(f"members {shown(spelling)} and {shown(path)} are one name on some disks")
    if "file" in {holder, kind} and holder != kind:
        raise UnpackRefused(f"{shown(path)} is both a file and a folder")
    if holder == kind != "parent":
        raise UnpackRefused(f"member {shown(path)} is listed twice")
    if kind == "folder":
        members.claimed[key] = (path, kind)


def _folded(path: str) -> str:
    """Return what all spellings of *path* have in common: caseless matching as Unicode defines it (section 3.13, D145)."""
    once = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFD", once)
