"""
Stable names: which active version of a model its bare name leads to (SPEC 7).

The answer depends on the active set and the lock alone, so every node with the same ones gives the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import structs

from reconciler.core.state import ActiveModel

_RUNS = re.compile(r"(\d+)")


def with_current(
    entries: Mapping[str, ActiveModel], chosen: Mapping[str, str], replacements: Mapping[str, frozenset[str]]
) -> dict[str, ActiveModel]:
    """
    Return *entries* with ``current`` set on one version of each name, and on no other.

    It is the version that the snapshot *chosen* for the name, if that is active; else, of the active versions that no other active one
    replaces, the highest in natural order.
    """
    by_name: dict[str, list[str]] = {}
    for model in sorted(entries):
        by_name.setdefault(model.partition(":")[0], []).append(model)
    current = {_current(models, chosen.get(name), entries, replacements) for name, models in by_name.items()}
    return {
        model: entry if entry.current == (model in current) else structs.replace(entry, current=model in current)
        for model, entry in entries.items()
    }


def _current(models: list[str], version: str | None, entries: Mapping[str, ActiveModel], replacements: Mapping[str, frozenset[str]]) -> str:
    for model in models:
        if model.partition(":")[2] == version:
            return model
    standing = [model for model in models if not replacements.get(model, frozenset()) & entries.keys()]
    return max(standing or models, key=natural)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a key that orders numbers in a text by their value: ``v10`` after ``v9``."""
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in _RUNS.split(text)]
