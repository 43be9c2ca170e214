"""
Lets each configured server follow the active set.

Rules that hold here:

1. For each server in turn: write, wait until nobody's request would be cut, reload, record. What a server has is recorded after it said
   yes; a run that is cut short in between does it again, which changes nothing for a server that has it.
2. A server that has what it should is not asked, and nothing of it is written.
3. A failure is the server's alone: its state says why, the others follow, and the next call tries again. It is an incident when it begins.
4. ``serving.json`` is written before the first server is told, so that a router knows from the swap on which of them lag.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

import msgspec
from msgspec import Struct, structs

from reconciler.core import digest
from reconciler.core.errors import ReconcileError
from reconciler.core.events import Incident, Notice
from reconciler.core.state import Generation, ServerState
from reconciler.ports import Reporter
from reconciler.serve import content as contents
from reconciler.serve.content import Content, Server
from reconciler.store import index as indexes
from reconciler.store import serving
from reconciler.store.index import Index
from reconciler.store.layout import Layout
from reconciler.store.ledger import Ledger

#: The fact under which the ledger keeps what each server was told.
FACT = "serve"


class Told(Struct, frozen=True, kw_only=True):
    """What is remembered of one server between runs."""

    #: Digest of what it took last.
    digest: str = ""
    #: Tries in a row that failed since.
    failures: int = 0
    #: Its file holds what it was not told of yet: which models a reload unloads is not known.
    is_written: bool = False


class ServerFollower:
    """
    The port ``Servers`` for the *servers* of a node, for the store's one writer.

    *refresh* brings the description in the active index up to date, before anybody is told of it (``store.index.Describer.refresh``).
    """

    def __init__(
        self,
        layout: Layout,
        servers: tuple[Server, ...],
        ledger: Ledger,
        *,
        report: Reporter,
        now: Callable[[], datetime],
        refresh: Callable[[Generation], Index | None] | None = None,
    ) -> None:
        self._layout = layout
        self._servers = servers
        self._ledger = ledger
        self._report = report
        self._now = now
        self._refresh = refresh

    def follow(self, generation: Generation, *, only: Collection[str] = (), force: bool = False) -> tuple[ServerState, ...]:
        """
        Write what each server reads of *generation*, let it reload, and return what each has then.

        *only* names the servers to tell, empty: all; with *force* also one that has it already is told.

        Raises:
            StoreError: ``serving.json`` or the index cannot be written.
        """
        renewed = self._refresh(generation) if self._refresh is not None and generation.number else None
        index = renewed if renewed is not None else self._index(generation)
        known = {state.name: state for state in serving.read(self._layout).servers}
        states = {server.name: _known_state(server, known) for server in self._servers}
        if self._servers or known:
            serving.write(self._layout, generation.number, states.values())
        for server in self._servers:
            if not only or server.name in only:
                states[server.name] = self._follow(server, index, states[server.name], force=force)
                serving.write(self._layout, generation.number, states.values())
        return tuple(states.values())

    def write(self, generation: Generation, *, only: Collection[str] = ()) -> None:
        """
        Write what each server reads of *generation*, and tell none of them; *only* names the servers, empty: all.

        Raises:
            ServeFailed: a file of somebody else is in the way.
            StoreError: the disk refused.
        """
        index = self._index(generation)
        for server in self._servers:
            content = content_of(server, index, self._layout)
            if server.path is None or (only and server.name not in only) or contents.is_written(content, server.path):
                continue
            told = (self._ledger.fact(FACT, dict[str, Told]) or {}).get(server.name, Told())
            self._remember(server, structs.replace(told, is_written=True))
            contents.write(content, server.path)

    def _index(self, generation: Generation) -> Index:
        found = indexes.read(self._layout, generation.number) if generation.number else None
        return found if found is not None else indexes.bare(generation)

    def _follow(self, server: Server, index: Index, state: ServerState, *, force: bool) -> ServerState:
        told = (self._ledger.fact(FACT, dict[str, Told]) or {}).get(server.name, Told())
        content = content_of(server, index, self._layout)
        mark = _mark(server, content)
        has_it = told == Told(digest=mark) and (server.path is None or contents.is_written(content, server.path))
        try:
            if force or not has_it:
                self._tell(server, content, told)
        except ReconcileError as error:
            return self._fail(server, state, told, error)
        if told.failures:
            self._report(Notice(level="info", text=f"server {server.name} follows again, after {told.failures} tries that failed"))
        if not has_it:
            self._remember(server, Told(digest=mark))
        changed = state.generation != index.generation or state.at is None
        at = self._now() if changed or not has_it else state.at
        return ServerState(name=server.name, kind=server.kind, generation=index.generation, at=at, error="; ".join(content.left_out))

    def _tell(self, server: Server, content: Content, told: Told) -> None:
        """Write, wait and reload, in this order: nothing but the reload stands between the last look at a server and its unload."""
        from reconciler.serve import drain, reload  # a server that has what it should is not asked

        ask = drain.question(server, content, is_known=bool(told.digest) and not told.is_written)
        if server.path is not None and not contents.is_written(content, server.path):
            self._remember(server, structs.replace(told, is_written=True))
            contents.write(content, server.path)
        if ask is not None and not drain.wait(server, ask):
            self._report(Notice(level="warning", text=f"server {server.name} is reloaded while it works: it was busy for all of its drain"))
        reload.reload(server, content)

    def _fail(self, server: Server, state: ServerState, told: Told, error: ReconcileError) -> ServerState:
        now = (self._ledger.fact(FACT, dict[str, Told]) or {}).get(server.name, told)
        self._remember(server, structs.replace(now, failures=told.failures + 1))
        if not told.failures:
            self._report(Incident(kind="serve-failed", detail=f"server {server.name} does not follow: {error.message}"))
        return structs.replace(state, error=error.with_own_hint)

    def _remember(self, server: Server, told: Told) -> None:
        names = {one.name for one in self._servers}
        known = {name: one for name, one in (self._ledger.fact(FACT, dict[str, Told]) or {}).items() if name in names}
        self._ledger.set_fact(FACT, known | {server.name: told})


def content_of(server: Server, index: Index, layout: Layout) -> Content:
    """Return what *server* is to read of *index*."""
    from reconciler.serve import served_model  # most nodes have no server
    from reconciler.serve.kinds import KINDS

    kind = KINDS[server.kind]
    models = served_model.models_of(index, layout, server.models)
    made = kind.content(server, models)
    if not (kind.gets_index or isinstance(server.reload, tuple)):
        return made
    own = structs.replace(index, models=tuple(model for model in index.models if served_model.is_wanted(model, server.models)))
    return structs.replace(made, given=indexes.encode(own))


def _mark(server: Server, content: Content) -> str:
    """Return the digest of what *server* is told, and of how: a server at another address was not told yet."""
    from reconciler.serve.kinds import KINDS

    told = content if KINDS[server.kind].gets_index else structs.replace(content, given=b"")
    return digest.of(msgspec.json.encode((server.kind, server.reload, told)))


def _known_state(server: Server, known: dict[str, ServerState]) -> ServerState:
    found = known.get(server.name)
    if found is None or found.kind != server.kind:
        return ServerState(name=server.name, kind=server.kind, generation=0)
    return found
