"""Commands about the sets that served: history, rollback, resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import COUNT, LOCK_TIMEOUT

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.commands.rollback import Step


@click.command()
@click.argument("number", type=click.IntRange(min=1), required=False, metavar="[N]")
@click.option("--list", "show", is_flag=True, help="List the sets of models to which a rollback can return, and change nothing.")
@LOCK_TIMEOUT
@common_options()
def rollback(context: CommandContext, *, number: int | None, show: bool, lock_timeout: float) -> None:
    """
    Return to the models that served before the last run, or in generation N.

    Only models that the snapshot still approves come back; archived ones are restored from cold storage. Servers and hooks are notified,
    as after an apply. What is rolled back is held: agent and sync do not activate it again until `reconcile resume`, or until the snapshot
    lists other content for it.

    \b
      reconcile rollback --list
      reconcile rollback
      reconcile rollback 12
    """
    from reconciler.commands import rollback as commands
    from reconciler.commands.reporting import reported

    if show:
        found = commands.steps(context.node())
        context.show({"schema": 1, "runs": found}, lambda to: _print_steps(to, found))
        return
    node = context.node()
    with context.reporter(stream=False) as report, reported(node, report):
        made = commands.rollback(node, report, number, lock_timeout_seconds=lock_timeout)
    context.show(
        {"schema": 1, "generation": made.number, "models": sorted(made.entries)},
        lambda to: to.print(f"generation {made.number} is active: {', '.join(sorted(made.entries)) or 'no model'}", markup=False),
    )


def _print_steps(to: Console, found: Sequence[Step]) -> None:
    from reconciler.core import units

    for one in found:
        at = units.rfc3339(one.at) if one.at else "unknown time"
        state = "active" if one.active else f"cannot serve again: {one.refusal}" if one.refusal else "can serve again"
        to.print(
            f"generation {one.generation}  {at}  {', '.join(one.models) or 'no model'}  ({one.what or 'unknown'}): {state}", markup=False
        )
    if not found:
        to.print("no generation was activated yet")


@click.command()
@LOCK_TIMEOUT
@common_options()
def resume(context: CommandContext, *, lock_timeout: float) -> None:
    """
    End the hold of a rollback. The next apply activates the snapshot's models again.

    \b
      reconcile resume
      reconcile plan
    """
    from reconciler.commands import rollback as commands

    held = commands.resume(context.node(), lock_timeout_seconds=lock_timeout)
    context.show(
        {"schema": 1, "models": held},
        lambda to: to.print(f"the next apply activates again: {', '.join(held)}" if held else "nothing was held", markup=False),
    )


@click.command()
@COUNT
@common_options()
def history(context: CommandContext, *, count: int) -> None:
    """Show which generations were activated, when, by which command and why."""
    from reconciler.commands import status
    from reconciler.core import units

    changes = status.history(context.node(), count)

    def show(to: Console) -> None:
        for one in changes:
            signed = " ".join([*(f"+{model}" for model in one.added), *(f"-{model}" for model in one.removed)])
            to.print(f"{units.rfc3339(one.at)}  generation {one.generation}  {one.actor}  {signed}  ({one.what})", markup=False)
        if not changes:
            to.print("no generation was activated yet")

    context.show(changes, show)
