"""
Quarantine: the records and files of models that failed, kept in a bounded amount for people to examine.

Files are kept as hard links, so what a kept generation or another model still uses takes no room twice.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core import digest as digests
from reconciler.ports import TestReport
from reconciler.store import atomic
from reconciler.store.garbage import bytes_of
from reconciler.store.layout import Layout

#: The most models that are kept.
_RECORDS = 100
#: Characters of the time in the name of a quarantined model's folder.
_STAMP = len("20261120T120000000000")


class QuarantineRecord(Struct, frozen=True, kw_only=True):
    """Why a model failed: what was found, in its tree of this digest, by this test."""

    model: str
    at: datetime
    detail: str
    tree: str
    report: TestReport | None = None


def newest(layout: Layout, model: str) -> Path | None:
    """Return the folder of the newest record of *model*'s failures, or None."""
    return max(layout.quarantine.glob(f"*-{_suffix(model)}"), default=None)


def keep(layout: Layout, record: QuarantineRecord, max_bytes: int) -> None:
    """
    Keep *record* and the files of its tree; the oldest are deleted past *max_bytes*, but never the newest.

    Raises:
        StoreError: the disk refuses.
    """
    with files.translate_errors("keep what failed"):
        folder = layout.quarantine / f"{_stamp(layout, record.at)}-{_suffix(record.model)}"
        atomic.make_folder(folder, 0o700)
        atomic.write(folder / "record.json", msgspec.json.format(msgspec.json.encode(record)))
        if record.tree:
            _keep_files(layout.tree(record.tree), folder)
        _delete_oldest(layout, max_bytes)


def _suffix(model: str) -> str:
    """Return the end of the names of *model*'s folders."""
    return digests.of(model.encode())[7:19]


def _stamp(layout: Layout, now: datetime) -> str:
    """Return what orders records: the time, or, where a clock that was ahead wrote a later one, right after that."""
    newest_stamp = max((path.name.partition("-")[0] for path in layout.quarantine.glob("2*-*")), default="")
    stamp = f"{now:%Y%m%dT%H%M%S%f}"
    return stamp if stamp > newest_stamp else f"{newest_stamp[:_STAMP]}.{int(newest_stamp[_STAMP + 1 :] or 0) + 1:06}"


def _keep_files(tree: Path, folder: Path) -> None:
    for index, path in enumerate(sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())):
        atomic.link(path, folder / f"{index:04d}-{path.name}"[:200])
    atomic.sync_folder(folder)


def _delete_oldest(layout: Layout, max_bytes: int) -> None:
    total = 0
    for index, folder in enumerate(sorted(layout.quarantine.iterdir(), reverse=True)):
        total += bytes_of(folder)
        if index and (total > max_bytes or index >= _RECORDS):
            atomic.delete(folder)
