"""
Everything that is signed, value by value, for the people who sign it.

Rules that hold here:

1. Each value of the payload is shown, whether this version knows its field or not, and nothing else: no default, nothing computed.
2. A value's place names models by id and artifacts by path, so that it stays the same when their order changes.
3. A value that nodes of this version ignore is marked as such: the view of what it does is incomplete.
4. No character that a terminal acts on or hides is shown as itself: what is read is what is signed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from reconciler.core.snapshot import Snapshot
from reconciler.core.text import printable

_PLAIN = re.compile(r"[\w.:/+@-]+", re.ASCII)
_FIELD = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


class Value(Struct, frozen=True, kw_only=True):
    """One signed value: a text, a number, ``true``, ``false``, ``null``, a list of those, or an empty object or list."""

    #: Where it stands, as in ``models[tiny:v1].artifacts[tiny.gguf].size``.
    place: str
    value: Any
    #: The model that it belongs to; empty: the snapshot itself.
    model: str = ""
    #: Whether this version knows the field.
    known: bool = True

    @property
    def field(self) -> str:
        """Its place within its model, or within the snapshot."""
        return self.place.removeprefix(f"models[{self.model}]").removeprefix(".") if self.model else self.place


def values(payload: bytes, found: Snapshot) -> tuple[Value, ...]:
    """Return every value of *payload*, which was decoded as *found*, in the order in which they stand there."""
    document = msgspec.json.decode(payload)
    return tuple(_walk(document, msgspec.to_builtins(found), "", model="", known=True))


def shown(value: Any) -> str:
    """Return *value* as JSON on one line, every character escaped that is not plainly visible."""
    return "".join(
        character if character.isprintable() else json.dumps(character)[1:-1] for character in json.dumps(value, ensure_ascii=False)
    )


def lines(found: tuple[Value, ...]) -> Iterator[str]:
    """Yield *found* as lines for people, a blank one before each model."""
    model = ""
    for one in found:
        if one.model != model:
            yield ""
            model = one.model
        yield f"{printable(one.place)}: {shown(one.value)}{'' if one.known else '    (nodes of this version ignore it)'}"


def _walk(value: Any, read: Any, place: str, *, model: str, known: bool) -> Iterator[Value]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            is_known = known and isinstance(read, dict) and name in read
            below = read[name] if is_known else None
            yield from _walk(child, below, _joined(place, name), model=model, known=is_known)
    elif isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        labels = _labels(value, place)
        for index, (child, label) in enumerate(zip(value, labels, strict=True)):
            below = read[index] if known and isinstance(read, list | tuple) else None
            yield from _walk(child, below, f"{place}[{label}]", model=label if place == "models" else model, known=known)
    else:
        yield Value(place=place, value=value, model=model, known=known)


def _joined(place: str, name: str) -> str:
    if not _FIELD.fullmatch(name):
        return f"{place}[{shown(name)}]"
    return f"{place}.{name}" if place else name


def _labels(entries: list[Any], place: str) -> list[str]:
    """Return what each of *entries* is called in places: a model's id, an artifact's path, else its number."""
    if place == "models":
        return [f"{entry['name']}:{entry['version']}" for entry in entries]
    if re.fullmatch(r"models\[[^\[\]]*\]\.artifacts", place):
        return [path if _PLAIN.fullmatch(path := entry["path"]) else shown(path) for entry in entries]
    return [str(index) for index in range(len(entries))]
