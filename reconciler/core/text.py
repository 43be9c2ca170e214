"""Text from outside: made safe to show in a message, a log line or a file; and what tools do to text files."""

from __future__ import annotations

import codecs
import re

_CONFLICT = re.compile(rb"^<{7} ", re.MULTILINE)


def printable(text: str, limit: int = 0) -> str:
    """
    Return *text* on one line with every character escaped that a terminal or a log might act on.

    Newlines, colours, directions of writing and lone surrogates become ``\\x1b`` and the like, so text that a server, an archive or a
    document chose cannot forge a line. With a *limit*, at most so many characters of *text* are kept, and ``…`` says where it was cut.
    """
    kept = text[:limit] if limit else text
    shown = kept if kept.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in kept)
    return shown if len(kept) == len(text) else f"{shown}…"


def tool_damage(data: bytes) -> str:
    """Return what an editor, a shell or git did to the file with the bytes *data*, as a clause; empty where nothing is recognised."""
    if not data:
        return "it is empty"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is in UTF-16, as some editors and shells write text, and not in UTF-8"
    if data.startswith(codecs.BOM_UTF8):
        return "it begins with a byte order mark, as some editors write"
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a Git LFS pointer, and not the file itself"
    if conflict := _CONFLICT.search(data):
        line = data[: conflict.start()].count(b"\n") + 1
        return f"it has merge conflict markers, the first in line {line}"
    return ""
