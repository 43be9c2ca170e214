"""
What this version knows of a snapshot's words, and what a document holds beyond that.

Rules that hold here:

1. The words of states, tasks, roles, archives and digest algorithms are open in documents: newer versions add to them. A model with a
   word that is not known here is ``incompatible`` here (SPEC 4), and no other model is harmed.
2. A field that this version does not know is ignored, wherever it stands. ``unknown_fields`` names them for those who sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from reconciler.core import digest

KnownState = Literal["enabled", "disabled", "archived", "retired"]
KnownTask = Literal["chat", "completion", "embedding"]
KnownUnpack = Literal["tar", "tar.gz", "tar.xz", "tar.zst", "zip"]
STATES: tuple[str, ...] = get_args(KnownState)
TASKS: tuple[str, ...] = get_args(KnownTask)
UNPACK: tuple[str, ...] = get_args(KnownUnpack)
#: What an artifact is for; ``model`` where none is given.
ROLES = ("model", "split", "mmproj", "lora", "draft", "tokenizer", "config", "template", "licence", "other")
#: Features that a model may ask of whoever reads it.
REQUIRES = ("replaces", "rollouts")
#: Everything above by the field that holds it, as ``reconcile --version --json`` shows it.
KNOWN: dict[str, tuple[str, ...]] = {
    "state": STATES, "task": TASKS, "unpack": UNPACK, "role": ROLES, "digest": tuple(digest.HEX_LENGTHS), "requires": REQUIRES,
}  # fmt: skip

_WORD = r"^[a-z0-9][a-z0-9._-]{0,63}(?!\n)$"
State = Annotated[str, Meta(pattern=_WORD, examples=[*STATES])]
Task = Annotated[str, Meta(pattern=_WORD, examples=[*TASKS])]
Unpack = Annotated[str, Meta(pattern=_WORD, examples=[*UNPACK])]
Role = Annotated[str, Meta(pattern=_WORD, examples=[*ROLES])]
Feature = Annotated[str, Meta(pattern=_WORD, examples=[*REQUIRES])]


_PAIRS = frozenset((field, word) for field, words in KNOWN.items() for word in words)


def unknown_words(words: list[tuple[str, str]]) -> tuple[str, ...]:
    """Return those of *words*, pairs of a field of ``KNOWN`` and its word, that this version does not know, for people; each once."""
    if _PAIRS.issuperset(words):  # of nearly every model, and a plan asks for thousands
        return ()
    return tuple(dict.fromkeys(f"{field} {word!r}" for field, word in words if word not in KNOWN[field]))


def unknown_fields(document: Any, known: Any, where: str = "") -> Iterator[str]:
    """Yield the places of fields of *document* that *known*, what was read of it, lacks, as in ``models[3].artifacts[0].colour``."""
    if isinstance(document, dict) and isinstance(known, dict):
        for name, value in document.items():
            place = f"{where}.{name}" if where else name
            if name in known:
                yield from unknown_fields(value, known[name], place)
            else:
                yield place
    elif isinstance(document, list) and isinstance(known, list | tuple):
        for index, (value, read) in enumerate(zip(document, known, strict=False)):
            yield from unknown_fields(value, read, f"{where}[{index}]")
