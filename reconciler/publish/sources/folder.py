"""
A folder on this machine, whose layout the model's tree keeps.

Links to files are followed, as the cache of a hub has them; links to folders, and what is no plain file, are refused. What version control
and caches keep beside the files is left out.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from reconciler.core.errors import PublishError
from reconciler.core.snapshot import check_path
from reconciler.publish.sources.listing import Listing, SourceFile, chosen

#: Folders and files that are never part of a model.
_LEFT_OUT = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__"})


def list_files(folder: Path, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Listing:
    """
    Return the files below *folder*.

    Raises:
        PublishError: there are none, a path is one that nodes refuse, or something is neither a file nor a folder.
    """
    found: list[str] = []
    left_out: set[str] = set()
    for where, names, files in os.walk(folder, onerror=_refuse):
        left_out |= _LEFT_OUT & {*names, *files}
        names[:] = sorted(set(names) - _LEFT_OUT)
        for name in names:
            if os.path.islink(os.path.join(where, name)):  # noqa: PTH114, PTH118  of thousands of names
                raise PublishError(f"{where}/{name} is a link to a folder", hint="copy it with `cp -rL`, or name its files")
        found += [os.path.relpath(os.path.join(where, name), folder) for name in files if name not in _LEFT_OUT]  # noqa: PTH118
    paths = chosen(found, include, exclude)
    for path in paths:
        _check(folder, path)
    notes = (f"left out: {', '.join(sorted(left_out))}",) if left_out else ()
    return Listing(files=tuple(SourceFile(path=path, place=str(folder / path)) for path in paths), notes=notes)


def _refuse(error: OSError) -> None:
    raise PublishError(f"{error.filename} cannot be read: {error.strerror}")


def _check(folder: Path, path: str) -> None:
    try:
        check_path(path)
    except ValueError as error:
        raise PublishError(f"nodes would refuse this file: {error}", hint="rename it, or leave it out with --exclude") from None
    try:
        mode = (folder / path).stat().st_mode
    except OSError as error:
        raise PublishError(f"{folder / path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise PublishError(f"{folder / path} is not a plain file", hint="leave it out with --exclude")
