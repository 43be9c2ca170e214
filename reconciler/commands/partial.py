"""How much of each model is on the node already: complete blobs, and what earlier runs left of downloads that were cut short."""

from __future__ import annotations

import os
from collections.abc import Mapping

from reconciler.core import digest
from reconciler.core.lock import LockedModel
from reconciler.core.state import NodeState
from reconciler.store.layout import Layout


def partial_bytes(layout: Layout, sizes: Mapping[str, int]) -> dict[str, int]:
    """
    Return how many bytes of each blob of *sizes* lie in unfinished downloads, where there are any.

    It is what the file system has of them. A run continues from what it can prove, which may be a little less.
    """
    try:
        names = os.listdir(layout.staging)  # noqa: PTH208  a plan of a thousand models makes no paths for what it does not need
    except OSError:
        return {}
    found = {}
    for name in names:
        blob = name.replace("-", ":", 1)
        if digest.is_digest(blob) and blob in sizes and (held := _held(layout, name)):
            found[blob] = min(held, sizes[blob])
    return found


def _held(layout: Layout, name: str) -> int:
    most = 0
    try:
        with os.scandir(layout.staging / name) as attempts:
            for attempt in attempts:
                most = max(most, os.lstat(os.path.join(attempt.path, "data")).st_blocks * 512)  # noqa: PTH118  as above
    except OSError:  # it is finished or deleted meanwhile
        return most
    return most


def here(model: LockedModel, state: NodeState, sizes: Mapping[str, int], partial: Mapping[str, int]) -> int:
    """Return how many bytes of what *model* is made from are on the node; damaged ones do not count."""
    total = 0
    for name in model.blobs:
        seen = state.blobs.get(name) or state.archived.get(name)
        total += sizes[name] if seen and not seen.damaged else partial.get(name, 0)
    return total
