"""
The memory twin of ``ports.Unpacker``: archives of a format of its own, a JSON list of names, kinds and texts.

It keeps every promise of the port, by the same rules and with none of the readers, so that what is above the port can be tested without
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from reconciler.core import archive_rules as rules
from reconciler.core.errors import StoreError, UnpackRefused
from reconciler.core.node import Limits

#: A member: its name, ``file``, ``folder`` or what else it is, and its text.
Packed = tuple[str, str, str]


class MemoryUnpacker:
    """Unpacks what ``pack`` made, whatever kind it is said to be."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def unpack(self, archive: Path, kind: str, into: Path) -> tuple[str, ...]:
        """Check every member, then write them; a refused archive leaves nothing."""
        if archive.is_symlink() or not archive.is_file():
            raise StoreError(f"{archive} is not a plain file")
        if into.is_symlink() or not into.is_dir() or any(into.iterdir()):
            raise StoreError(f"{into} is not an empty folder")
        data = archive.read_bytes()
        members = rules.Members(self._limits, len(data))
        written = [(self._checked(members, one), one) for one in _decoded(data)]
        for path, (_, what, text) in written:
            if what == "folder":
                (into / path).mkdir(parents=True, exist_ok=True)
                continue
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            (into / path).write_text(text, encoding="utf-8", newline="")
            (into / path).chmod(0o444)
        return tuple(sorted(members.files))

    def _checked(self, members: rules.Members, one: Packed) -> str:
        name, what, text = one
        size = len(text.encode())
        rules.spend(members, size)
        return rules.check(members, name, what, size)


def pack(members: Iterable[Packed]) -> bytes:
    """Return the archive of *members*."""
    return msgspec.json.encode(tuple(members))


def _decoded(data: bytes) -> list[Packed]:
    try:
        return msgspec.json.decode(data, type=list[Packed])
    except msgspec.DecodeError as error:
        raise UnpackRefused(f"not an archive: {error}") from None
