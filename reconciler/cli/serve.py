"""The commands for the servers that follow the active set: ``serve list``, ``serve write``, ``serve reload``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import LOCK_TIMEOUT

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.commands.serve import ServerStatus, ServeStatus

NAMES = click.argument("names", nargs=-1, metavar="[SERVER]…")


@click.group()
def serve() -> None:
    """Show the servers that follow the active set, and reload them by hand."""


@serve.command("list")
@common_options()
def serve_list(context: CommandContext) -> None:
    """
    Show each server of the settings, which generation it has, and why it lags.

    \b
      reconcile serve list
      reconcile serve list --json | jq -r '.servers[] | select(.error != "").name'
    """
    from reconciler.commands import serve as serving

    _show(context, serving.show(context.node()))


@serve.command("write")
@NAMES
@LOCK_TIMEOUT
@common_options()
def serve_write(context: CommandContext, *, names: tuple[str, ...], lock_timeout: float) -> None:
    """
    Write the files that servers read, all of them or those of each SERVER, and reload no server.

    Use it before the first start of a server that needs its file. The next run reloads the server.

    \b
      reconcile serve write
      reconcile serve write main
    """
    from reconciler.commands import serve as serving

    _show(context, serving.write(context.node(), names, lock_timeout_seconds=lock_timeout))


@serve.command("reload")
@NAMES
@LOCK_TIMEOUT
@common_options()
def serve_reload(context: CommandContext, *, names: tuple[str, ...], lock_timeout: float) -> int:
    """
    Write the files of all servers, or of each SERVER, and reload them now, even if they have the active set already.

    Exit code 1: a server was not reloaded; the list says why.

    \b
      reconcile serve reload
      reconcile serve reload main --json
    """
    from reconciler.commands import serve as serving

    with context.reporter(stream=False) as report:
        found = serving.reload(context.node(), report, names, lock_timeout_seconds=lock_timeout)
    _show(context, found)
    return int(any(server.error for server in found.servers if not names or server.name in names))


def _show(context: CommandContext, found: ServeStatus) -> None:
    def show(to: Console) -> None:
        for server in found.servers:
            to.print(_line(server, found.generation), style="yellow" if server.error else None, markup=False)
        if not found.servers:
            to.print("the settings have no [[serve]] table: no server follows the active set")

    context.show(found, show)


def _line(server: ServerStatus, active: int) -> str:
    from reconciler.core import units
    from reconciler.core.text import printable

    has = "has nothing yet" if not server.generation else f"has generation {server.generation}"
    behind = f" (active: {active})" if server.generation != active else ""
    since = f" since {units.rfc3339(server.at)}" if server.at else ""
    models = units.count(len(server.models), "model")
    return f"{server.name}  {server.kind}  {has}{since}{behind}, {models}{': ' + printable(server.error) if server.error else ''}"
