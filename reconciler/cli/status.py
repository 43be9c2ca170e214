"""The command status: how a node is, once or again and again, as text, JSON, a page or a bill of materials."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from reconciler.cli.command_context import CommandContext, common_options, print_error
from reconciler.cli.options import FILE, Seconds, complete_models
from reconciler.core.errors import ReconcileError

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


_T = TypeVar("_T")
#: Moves to the upper left corner and clears what is below it.
_HOME = "\x1b[H\x1b[J"


def watch(
    context: CommandContext,
    find: Callable[[], _T],
    show: Callable[[Console, _T], None],
    every_seconds: float,
    essence: Callable[[_T], object],
) -> None:
    """
    Print what *find* returns every so often, until SIGINT.

    A terminal is redrawn. Elsewhere, and with ``--json``, it is printed when its *essence* changed; the JSON is one document a line.
    An error ends it at the start alone: later it may last for a moment, as while another run writes a new lock.
    """
    before: object = None
    to = context.console
    try:
        while True:
            try:
                found = find()
            except ReconcileError as error:
                if before is None:
                    raise
                before = _show_error(context, error, before)
            else:
                now = essence(found)
                if to.is_terminal and not context.json:
                    sys.stdout.write(_HOME)
                    show(to, found)
                elif now != before:
                    _print(context, to, found, show)
                before = now
            sys.stdout.flush()
            time.sleep(every_seconds)  # what is shown comes from files, a database and the clock, and no event tells of all of them
    except KeyboardInterrupt:
        return


def _show_error(context: CommandContext, error: ReconcileError, before: object) -> object:
    """Show *error* unless it was shown last, and return what stands for it."""
    now = (error.name, error.message)
    if now != before:
        print_error(error, json=context.json)
        sys.stdout.flush()
    return now


def _print(context: CommandContext, to: Console, found: _T, show: Callable[[Console, _T], None]) -> None:
    if context.json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(found, order="deterministic").decode() + "\n")
    else:
        show(to, found)
        to.print("", markup=False)
