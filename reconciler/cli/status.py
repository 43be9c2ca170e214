"""The command status: how a node is, once or again and again, as text, JSON, a page or a bill of materials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import FILE, Seconds, complete_models

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.commands.status import Status


@click.command()
@click.argument("model", required=False, shell_complete=complete_models)
@click.option("--watch", "watched", is_flag=True, help="Keep showing the status until Ctrl-C.")
@click.option("--every", type=Seconds(), default="2s", metavar="TIME", help="With --watch, how often the status is read.")
@click.option("--page", type=FILE, metavar="FILE", help="Write the status page to FILE: one HTML file that loads nothing else.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "cyclonedx"]),
    default="text",
    help="The form of the output; cyclonedx: a bill of materials of the models whose files are here.",
)
@common_options()
def status(context: CommandContext, *, model: str | None, watched: bool, every: float, page: Path | None, format_: str) -> None:
    """
    Show every model's state and why. For one MODEL, also show its last test.

    \b
      reconcile status
      reconcile status mistral-7b-instruct:v1
      reconcile status --watch
      reconcile status --page status.html
      reconcile status --json | jq -r '.models[] | select(.state == "active").id'
    """
    from reconciler.commands import status as status_command
    from reconciler.core import units

    context.json = context.json or format_ != "text"
    node = context.node()
    if page is not None:
        _write_page(context, page)
        return
    if format_ == "cyclonedx":
        from reconciler.commands import bill_of_materials

        context.show(bill_of_materials.bill_of_materials(node), lambda _: None)
        return

    def show(to: Console, found: Status) -> None:
        from reconciler.core.text import printable
        from reconciler.report import terminal
        from reconciler.report.events import short

        again = f"at the next sync{', at ' + units.rfc3339(found.next_sync_at) if found.next_sync_at else ''}"
        is_ill = found.refused or found.heard.unreachable
        to.print(printable(found.summary), style="bold yellow" if is_ill else None, markup=False)
        until = units.rfc3339(found.snapshot.expires_at)
        to.print(f"{found.network}, snapshot {found.snapshot.version} (expires {until}), generation {found.generation}", markup=False)
        terminal.models(to, found.models)
        if model:
            for one in found.models:
                terminal.model_details(to, one, node.layout.root, again)
        elif any(terminal.is_retried(one) for one in found.models):
            to.print(f"models that failed, are pending or could not be fetched are retried {again}", markup=False)
        for drifted in found.drift:
            to.print(f"drift: {printable(drifted)}", style="yellow", markup=False)
        if not model:
            _show_servers(to, found)
            to.print(f"active set {short(found.active_digest)}", style="dim", markup=False)

    if watched:
        from reconciler.cli.watch import watch

        watch(context, lambda: status_command.status(node, model or ""), show, every, _essence)
        return
    found = status_command.status(node, model or "")
    context.show(found, lambda to: show(to, found))


def _show_servers(to: Console, found: Status) -> None:
    """Print which servers lag behind the active set, and why."""
    from reconciler.core.text import printable

    for server in found.serve:
        if server.error or server.generation != found.generation:
            why = printable(server.error) or "not reloaded yet"
            to.print(f"server {server.name} has generation {server.generation or 'none'}: {why}", style="yellow", markup=False)


def _essence(found: Status) -> object:
    """Return what of *found* is worth a new line: not how much disk is free, nor for how long something lasts."""
    return (found.lock, found.generation, found.models, found.refused, found.heard, found.drift, found.held, found.serve)


def _write_page(context: CommandContext, page: Path) -> None:
    from reconciler.commands import status_page

    context.check_output(page)
    status_page.write(context.node(), page.absolute())
    context.show({"schema": 1, "page": str(page)}, lambda to: to.print(f"wrote {page}", markup=False))
