"""Text from outside, made safe to show: in a message, a log line, a file that people read."""

from __future__ import annotations


def printable(text: str, limit: int = 0) -> str:
    """
    Return *text* on one line with every character escaped that a terminal or a log might act on.

    Newlines, colours, directions of writing and lone surrogates become ``\\x1b`` and the like, so text that a server, an archive or a
    document chose cannot forge a line. With a *limit*, at most so many characters of *text* are kept, and ``…`` says where it was cut.
    """
    kept = text[:limit] if limit else text
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in kept)
    return shown if len(kept) == len(text) else f"{shown}…"
