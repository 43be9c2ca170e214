"""
The format number of the store: what the files and folders in it mean.

Rules that hold here:

1. ``<store>/format`` holds the number in decimal, and a line feed. A store without it has number 1: version 0.1 wrote none.
2. A newer number is refused, by readers too, before anything in the store is read or changed.
3. The number is written last, after all that it stands for, in one rename: a crash before it repeats the whole step, which must
   therefore be one that can be repeated. The ledger has a number of its own (``ledger_database``): its tables change more often.
"""

from __future__ import annotations

import contextlib
import re

from reconciler.core.errors import StoreError, StoreNewer
from reconciler.store import atomic
from reconciler.store.layout import Layout

FORMAT = 1
_MAX_BYTES = 32


def check(found: int, known: int, what: str) -> None:
    """
    Refuse a format number that is newer than *known*.

    Raises:
        StoreNewer: it is; the message names *what* has it.
    """
    if found > known:
        raise StoreNewer(f"a newer version of reconcile wrote {what}: its format is {found}, and this version knows {known}")


def check_store(layout: Layout) -> None:
    """
    Refuse a store that a newer version wrote.

    Raises:
        StoreNewer: it is one.
    """
    check(read(layout), FORMAT, f"the store {layout.root}")


def read(layout: Layout) -> int:
    """Return the format number of the store; 1 where none is written, or what is there is none."""
    try:
        text = atomic.read(layout.format_file)[:_MAX_BYTES]
    except OSError:
        return 1
    found = re.fullmatch(rb"([0-9]{1,9})\n?", text)
    return int(found[1]) if found else 1


def write(layout: Layout) -> None:
    """Write the number that this version knows, where another stands; a disk that refuses it costs nothing: the next run writes it."""
    if layout.format_file.exists() and read(layout) == FORMAT:
        return
    with contextlib.suppress(StoreError):
        atomic.write(layout.format_file, b"%d\n" % FORMAT)
