"""
Which packages are installed, by the names of their folders.

``importlib.metadata`` knows it too, and takes longer to load than a plan takes to make: it brings a parser of e-mail. The names and the
files are those of the specification of installed packages (PEP 376, PEP 503 and 427 for the names).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def version(name: str) -> str | None:
    """Return the version of the installed package *name*, or None; the first on Python's path counts."""
    wanted = _normal(name)
    for folder in _folders():
        found, _, rest = folder.name.removesuffix(".dist-info").partition("-")
        if _normal(found) == wanted and rest:
            return rest
    return None


def declared(group: str) -> Iterator[str]:
    """Yield the names of the entry points of *group* that installed packages declare."""
    for folder in _folders():
        try:
            text = Path(folder.path, "entry_points.txt").read_text(encoding="utf-8")
        except OSError:  # most declare nothing
            continue
        if f"[{group}]" in text:
            section = text.partition(f"[{group}]")[2].partition("\n[")[0]
            yield from (line.partition("=")[0].strip() for line in section.splitlines() if "=" in line)


def _folders() -> Iterator[os.DirEntry[str]]:
    for place in sys.path:
        try:
            with os.scandir(place or ".") as entries:
                found = [entry for entry in entries if entry.name.endswith(".dist-info")]
        except OSError:  # an archive, or gone
            continue
        yield from found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
