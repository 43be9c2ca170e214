"""One configured server, as a value: a ``[[serve]]`` table of the settings whose paths and times are resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct


class Server(Struct, frozen=True, kw_only=True):
    """A server that follows the active set."""

    #: Unique on this node.
    name: str
    kind: str
    #: The file or the folder that is written for it; None: nothing is.
    path: Path | None = None
    #: How it is told: a URL, or a command; empty: by the change of its file alone.
    reload: str | tuple[str, ...] = ""
    #: Ids, names or tasks (``task:chat``) of the models that it gets; empty: all.
    models: tuple[str, ...] = ()
    #: Passed on to what is written for it.
    options: dict[str, Any] = {}
    #: How long a reload that would unload a busy model waits for it at most.
    drain_seconds: float = 300.0
    #: Where its command runs.
    folder: Path = Path()
