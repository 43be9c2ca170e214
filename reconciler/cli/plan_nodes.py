"""What ``plan --node`` and ``plan --against`` print, for people, programs and pull requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.core.fleet_plan import Comparison, FleetPlan


def show(context: CommandContext, nodes: tuple[Path, ...], against: str, fail_on: tuple[str, ...], *, as_markdown: bool) -> FleetPlan:
    """Plan for *nodes*, from the base *against*, print it, and return it."""
    from reconciler.commands import plan_nodes
    from reconciler.core import fleet_plan

    try:
        rules = fleet_plan.rules(fail_on) if fail_on else fleet_plan.Rules()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--fail-on") from None
    made = plan_nodes.preview(context.node(), files=nodes, against=against, rules=rules)

    def markdown(to: Console) -> None:
        from reconciler.report import markdown

        to.print(markdown.fleet(made).rstrip("\n"), markup=False)

    context.show(made, markdown if as_markdown else lambda to: _text(to, made))
    return made


def _text(to: Console, made: FleetPlan) -> None:
    from reconciler.core import units
    from reconciler.core.text import printable
    from reconciler.report import terminal

    until = units.rfc3339(made.snapshot.expires_at)
    to.print(f"{made.network}, snapshot {made.snapshot.version} (expires {until}), root {made.snapshot.root}", markup=False)
    if made.against:
        _comparison(to, made.against)
    for one in made.nodes:
        to.print(f"\n{printable(one.node)}:", style="bold", markup=False)
        terminal.plan(to, one.plan)
    to.print("", markup=False)
    for failure in made.failures:
        to.print(f"broken rule {failure.rule}: {printable(failure.text)}", style="bold red", markup=False)
    to.print(f"{units.count(len(made.failures), 'rule')} broken" if made.failures else "no rule is broken", markup=False)


def _comparison(to: Console, against: Comparison) -> None:
    from reconciler.core import units
    from reconciler.core.text import printable

    if against.base is None:
        to.print(f"{printable(against.name)} has no snapshot: everything is new", markup=False)
        return
    until = units.rfc3339(against.base.expires_at)
    to.print(
        f"compared with {printable(against.name)}: snapshot {against.base.version} (expires {until}), root {against.base.root}",
        markup=False,
    )
    for what, models in (("new", against.added), ("dropped", against.removed), ("changed", against.changed)):
        if models:
            to.print(f"  {what}: {', '.join(models)}", markup=False)
    for text in (*against.keys, *against.warnings):
        to.print(f"  {printable(text)}", style="yellow", markup=False)
