"""
JSON, read so that no two readers can disagree about what it says.

msgspec already refuses NaN, byte-order marks, trailing data, lone surrogates, floats and booleans for integers. What it accepts
silently is refused here, over the same bytes, also in parts that the reader ignores: duplicate keys (the last one wins), any depth,
and numbers that readers hold differently. All of it takes time linear in the bytes, since some of them come from anybody.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

from reconciler.core.text import printable

MAX_DEPTH = 32
_T = TypeVar("_T")


class NotStrict(ValueError):
    """The bytes are not strict JSON of the expected shape; the message says where."""


def decode(data: bytes, kind: type[_T]) -> _T:
    """
    Decode *data* as *kind*.

    Raises:
        NotStrict: malformed, of another shape, with a duplicate key, or nested deeper than ``MAX_DEPTH``.
    """
    try:
        value = msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise NotStrict("nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise NotStrict(printable(str(error))) from None
    _refuse_ambiguity(data)
    return value


def _refuse_ambiguity(data: bytes) -> None:
    """Refuse duplicate keys anywhere, also in parts that the reader ignores, and a depth that other readers may not take."""
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite)
    except RecursionError:
        raise NotStrict("nested too deeply") from None
    except ValueError as error:
        raise NotStrict(str(error)) from None
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise NotStrict(f"nested deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotStrict(f"duplicate key {twice[:80]!r}")
    return found


def _integer(text: str) -> int:
    if len(text) > 18 and (len(text) > 20 or not -(2**63) <= int(text) < 2**64):
        raise NotStrict(f"an integer of more than 64 bits: {text[:24]}")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise NotStrict(f"a number that no reader holds: {text[:24]}")
    return float(text)


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list)]
    return [child for child in value if isinstance(child, dict | list)] if isinstance(value, list) else ()
