"""What a source has: files with their places, and what it says of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from msgspec import Struct

from reconciler.core.errors import PublishError
from reconciler.core.vocabulary import KnownUnpack


class SourceFile(Struct, frozen=True, kw_only=True):
    """One file of a source."""

    #: Its path in the model's tree.
    path: str
    #: Where its bytes are read now: a path on this machine, or a URL.
    place: str
    #: Where nodes fetch it; empty: the caller names that.
    urls: tuple[str, ...] = ()
    #: Its size in bytes and its digest, where the source vouches for them; -1 and empty: it must be read.
    size: int = -1
    digest: str = ""
    unpack: KnownUnpack | None = None


class Listing(Struct, frozen=True, kw_only=True):
    """The files of a source, in the order of their paths."""

    files: tuple[SourceFile, ...]
    #: What people should know: what was pinned, what was left out, what the source says of the model.
    notes: tuple[str, ...] = ()
    #: Patterns of hosts to which the source redirects, by its host, where that is known beforehand.
    redirects: dict[str, tuple[str, ...]] = {}


def chosen(paths: Iterable[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    """
    Return those of *paths*, sorted, that a pattern of *include* matches (all, where there is none) and none of *exclude*.

    Raises:
        PublishError: a pattern of *include* matches nothing, or nothing is left.
    """
    every = sorted(paths)
    for pattern in include:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in every):
            raise PublishError(
                f"no file matches {pattern!r}", hint=f"there are: {', '.join(every[:12]) or 'none'}{' …' if len(every) > 12 else ''}"
            )
    found = [path for path in every if not include or any(fnmatch.fnmatchcase(path, pattern) for pattern in include)]
    found = [path for path in found if not any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude)]
    if not found:
        raise PublishError("no file is left to add", hint=f"there are: {', '.join(every[:12]) or 'none'}")
    return found
