"""
``serving.json``: which generation each server of this node was last told of (SPEC 7).

A router reads it between a swap and the servers' reloads; garbage collection keeps the generations that a server may still read from.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Struct

from reconciler import files
from reconciler.core.state import ServerState
from reconciler.store import atomic
from reconciler.store.layout import Layout


class Serving(Struct, frozen=True, kw_only=True):
    """The content of ``serving.json``."""

    schema: int = 1  #: Version of this form.
    generation: int = 0  #: The active generation when this was written.
    servers: tuple[ServerState, ...] = ()  #: In the order of the settings.


def read(layout: Layout) -> Serving:
    """Return what was written last; nothing where it is missing or damaged: the next run writes it again."""
    try:
        return msgspec.json.decode(atomic.read(layout.serving), type=Serving)
    except (OSError, msgspec.DecodeError):
        return Serving()


def write(layout: Layout, generation: int, servers: Iterable[ServerState]) -> None:
    """
    Write what each of *servers* has while *generation* is active, if that is not written yet.

    Raises:
        StoreError: the disk refused.
    """
    data = msgspec.json.encode(Serving(generation=generation, servers=tuple(servers)))
    with files.translate_errors(f"read {layout.serving}"):
        try:
            same = atomic.read(layout.serving) == data
        except FileNotFoundError:
            same = False
    if not same:
        atomic.write(layout.serving, data)
