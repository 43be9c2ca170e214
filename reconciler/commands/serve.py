"""
The servers that follow the active set: what each has, and telling them by hand. A run tells them by itself.

Reading changes nothing and needs no lock; ``write`` and ``reload`` hold the store.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct

from reconciler.commands.context import NodeContext, hold_store
from reconciler.core.errors import UsageError
from reconciler.core.state import ServerState
from reconciler.store import generations, serving

if TYPE_CHECKING:
    from reconciler.commands.load_lock import VerifiedLock
    from reconciler.ports import Reporter, Servers
    from reconciler.serve.content import Server
    from reconciler.store.index import Describer
    from reconciler.store.ledger import Ledger


class ServerStatus(Struct, frozen=True, kw_only=True):
    """One configured server."""

    name: str  #: As in the settings.
    kind: str  #: As in the settings.
    generation: int  #: The generation that it serves, as far as is known; 0: none yet.
    at: datetime | None = None  #: When it took that generation.
    error: str = ""  #: Why it does not have the active generation; empty if it has.
    path: str | None = None  #: What is written for it; null where nothing is.
    models: tuple[str, ...] = ()  #: Ids of the active models that it gets.


class ServeStatus(Struct, frozen=True, kw_only=True):
    """All configured servers."""

    schema: int = 1  #: Version of this form.
    generation: int  #: The active generation.
    servers: tuple[ServerStatus, ...]  #: In the order of the settings.


def states(context: NodeContext) -> tuple[ServerState, ...]:
    """Return what each configured server has, as it was recorded last."""
    known = {state.name: state for state in serving.read(context.layout).servers} if context.servers else {}
    none = [ServerState(name=server.name, kind=server.kind, generation=0) for server in context.servers]
    return tuple(known[state.name] if state.name in known and known[state.name].kind == state.kind else state for state in none)


def lagging(context: NodeContext, generation: int) -> tuple[ServerState, ...]:
    """Return the servers that do not have *generation*, the active one; before the first swap, none lags."""
    return tuple(state for state in states(context) if state.error or state.generation != generation)


def show(context: NodeContext) -> ServeStatus:
    """
    Return every configured server, with the models that it gets.

    Raises:
        StoreError: the store cannot be read.
    """
    from reconciler.serve import served_model
    from reconciler.store import index

    active = generations.current_or_empty(context.layout)
    found = (index.read(context.layout, active.number) if active.number else None) or index.bare(active)
    servers = tuple(
        ServerStatus(
            name=server.name,
            kind=server.kind,
            generation=state.generation,
            at=state.at,
            error=state.error,
            path=str(server.path) if server.path else None,
            models=tuple(model.id for model in found.models if served_model.is_wanted(model, server.models)),
        )
        for server, state in zip(context.servers, states(context), strict=True)
    )
    return ServeStatus(generation=active.number, servers=servers)


def write(context: NodeContext, names: Collection[str], *, lock_timeout_seconds: float = 0.0) -> ServeStatus:
    """
    Write what the named servers read, empty: all, and tell none of them; for the first start of a server.

    Raises:
        ServeFailed: a file of somebody else is in the way.
        StoreBusy, StoreError, UsageError: as their names say.
    """
    from reconciler.serve.follow import ServerFollower

    _refuse_unknown(context.servers, names)
    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:
        follower = ServerFollower(context.layout, context.servers, ledger, report=_silent, now=context.clock)
        follower.write(generations.current_or_empty(context.layout), only=names)
    return show(context)


def reload(context: NodeContext, report: Reporter, names: Collection[str], *, lock_timeout_seconds: float = 0.0) -> ServeStatus:
    """
    Write for the named servers, empty: all, and tell each of them, also one that has the active set already.

    Raises:
        StoreBusy, StoreError, UsageError: as their names say. What a server refuses is in its status.
    """
    _refuse_unknown(context.servers, names)
    _follow(context, report, names, force=True, lock_timeout_seconds=lock_timeout_seconds)
    return show(context)


def retry(context: NodeContext, report: Reporter) -> bool:
    """
    Tell again the servers that lag, if any does; return whether one still does.

    Raises:
        StoreBusy, StoreError: as their names say.
    """
    if not context.servers or not lagging(context, generations.current_or_empty(context.layout).number):
        return False
    _follow(context, report, ())
    return bool(lagging(context, generations.current_or_empty(context.layout).number))


def _follow(
    context: NodeContext, report: Reporter, names: Collection[str], *, force: bool = False, lock_timeout_seconds: float = 0.0
) -> None:
    from reconciler.core.events import Event, Incident
    from reconciler.serve.follow import ServerFollower

    with hold_store(context, timeout_seconds=lock_timeout_seconds) as ledger:

        def logged(event: Event) -> None:
            if isinstance(event, Incident):
                ledger.log_incident(event, context.clock())
            report(event)

        follower = ServerFollower(context.layout, context.servers, ledger, report=logged, now=context.clock)
        follower.follow(generations.current_or_empty(context.layout), only=names, force=force)


def describer(context: NodeContext, found: VerifiedLock, ledger: Ledger) -> Describer:
    """Return what makes the index of a generation."""
    from reconciler.store.index import Describer

    return Describer(context.layout, ledger, found.lock, found.lock_digest, now=context.clock, node=context.node_id)


def follower(context: NodeContext, found: VerifiedLock, ledger: Ledger, report: Reporter) -> Servers:
    """Return what lets the configured servers follow the active set in a run; where there is none, it keeps the index up to date."""
    from reconciler.serve.follow import ServerFollower

    refresh = describer(context, found, ledger).refresh
    return ServerFollower(context.layout, context.servers, ledger, report=report, now=context.clock, refresh=refresh)


def _silent(event: object) -> None:
    del event


def _refuse_unknown(servers: tuple[Server, ...], names: Collection[str]) -> None:
    known = [server.name for server in servers]
    for name in names:
        if name not in known:
            there = f"there are: {', '.join(known)}" if known else "the settings have no [[serve]] table"
            raise UsageError(f"there is no server {name!r}", hint=there)
