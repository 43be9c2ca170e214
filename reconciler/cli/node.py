"""The commands that bring a node to the state that the signed snapshot asks for: lock, plan, apply, sync."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import EXCEPT, FILE, LOCK_TIMEOUT, LOCKED, OFFLINE, ONLY, YES, Seconds
from reconciler.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.apply.run import Outcome
    from reconciler.commands.context import RunOptions


def _options(**given: object) -> RunOptions:
    import msgspec

    from reconciler.commands.context import RunOptions

    return msgspec.convert(given, RunOptions, strict=True)


@click.command()
@click.argument("source", default="", metavar="[SNAPSHOT]")
@click.option("--check", is_flag=True, help="Only compare: exit 2 if the lock would change, 1 if there is none. Write nothing.")
@click.option(
    "--against",
    default="",
    show_default=False,
    metavar="REF",
    help="With --check, also exit 4 if a node that runs this commit or folder would refuse the snapshot.",
)
@LOCK_TIMEOUT
@common_options()
def lock(context: CommandContext, *, source: str, check: bool, against: str, lock_timeout: float) -> int:
    """
    Verify a snapshot and compile it to models.lock.

    SNAPSHOT is a file or URL. Default: [network] snapshot in the settings. The signed envelope is kept beside the lock as snapshot.json;
    commit both.

    \b
      reconcile lock
      reconcile lock --check      in CI: exit 0 if the committed lock matches the snapshot
      reconcile lock --check --against origin/main      the same, and exit 4 if main has a newer snapshot
    """
    from reconciler.commands import lock as lock_command
    from reconciler.core import units
    from reconciler.core.text import printable

    node = context.node()
    if against and not check:
        raise UsageError("--against is for --check", hint=f"`reconcile lock --check --against {against}` compares with it")
    if check:
        if against:
            from reconciler.commands import plan_nodes

            plan_nodes.check_against(node, against)
        difference = lock_command.lock_difference(node, source)
        found_text = f"models.lock would change: {difference}" if difference else "models.lock is up to date"
        context.show({"changes": bool(difference), "difference": difference}, lambda to: to.print(printable(found_text), markup=False))
        return 2 if difference else 0
    fetched = lock_command.update_lock(node, source, lock_timeout_seconds=lock_timeout)
    found, changes = fetched.verified_lock, fetched.changes
    header = found.lock.snapshot
    network_name, count = found.lock.network, len(found.lock.model)
    about = f"snapshot {header.version} of {network_name}, {units.count(count, 'model')}"
    message = f"models.lock {'written' if changes else 'is up to date'}: {about}"
    tree = {"schema": 1, "lock": found.lock_digest, "changes": changes, "network": network_name, "snapshot": header, "models": count}
    context.show(tree, lambda to: to.print(message, markup=False))
    return 0


@click.command()
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 if there are changes, 0 if there are none.")
@click.option("--out", type=FILE, metavar="FILE", help="Save the plan, for `reconcile apply FILE`.")
@click.argument("profiles", type=click.Path(path_type=Path), nargs=-1, metavar="")
@click.option(
    "--node",
    "nodes",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE…",
    help="Plan for the nodes of these profiles, without a store or an engine; of a folder, for each *.toml in it.",
)
@click.option(
    "--against",
    default="",
    show_default=False,
    metavar="REF",
    help="Plan what changes on a node that has applied this commit, folder or snapshot.",
)
@click.option(
    "--fail-on",
    multiple=True,
    metavar="RULES",
    help="Exit 2 if one of these is broken: reject, reject-any, outage, disk, larger-than=SIZE. Default with --node, --against: "
    "reject,outage,disk.",
)
@click.option("--format", "format_", type=click.Choice(["text", "json", "markdown"]), default="text", help="The form of the output.")
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@common_options()
def plan(
    context: CommandContext,
    *,
    detailed_exitcode: bool,
    out: Path | None,
    profiles: tuple[Path, ...],
    nodes: tuple[Path, ...],
    against: str,
    fail_on: tuple[str, ...],
    format_: str,
    only: tuple[str, ...],
    excluded: tuple[str, ...],
    locked: bool,
    offline: bool,
) -> int:
    """
    Show what apply would do, and why. Changes nothing.

    \b
      reconcile plan
      reconcile plan --detailed-exitcode --json-into plan.json      in CI: 0 no changes, 2 changes, 1 error
      reconcile plan --out plan.json && reconcile apply plan.json   apply exactly this plan, or fail if it is stale
      reconcile plan --node gpu.toml --against origin/main --format markdown > comment.md
    """
    from reconciler.commands import apply as apply_command
    from reconciler.core import plan as plans

    context.json = context.json or format_ == "json"
    if profiles and not nodes:
        raise UsageError(
            f"plan takes no file: {profiles[0]}", hint=f"`reconcile plan --node {profiles[0]}` plans for the node profile in that file"
        )
    if nodes or against or fail_on:
        from reconciler.cli import plan_nodes

        if out is not None or only or excluded:
            raise UsageError("--out, --only and --except are for the plan of this node", hint="leave them out, or --node and --against")
        shown = plan_nodes.show(context, (*nodes, *profiles), against, fail_on, as_markdown=format_ == "markdown")
        return 2 if shown.failures or (detailed_exitcode and shown.changes) else 0

    if out is not None:
        context.check_output(out)
    node = context.node()
    seen = apply_command.preview(node, _options(only=only, excluded=excluded, locked=locked, offline=offline))
    made = seen.plan
    if out is not None:
        context.write_output(out, plans.encode(made))

    def show(to: Console) -> None:
        from reconciler.core import units
        from reconciler.report import terminal

        if format_ == "markdown":
            from reconciler.report import markdown

            to.print(markdown.plan(made).rstrip("\n"), markup=False)
            return
        terminal.plan(to, made, verbose=context.verbose)
        if seen.partly_here:
            to.print(f"{units.human_size(seen.partly_here)} of it is here already, of downloads that were cut short", markup=False)
        if seen.fetches.refused:
            from reconciler.commands import fetch_record
            from reconciler.core.text import printable

            to.print(f"warning: {printable(fetch_record.describe_refusal(seen.fetches, node.clock()))}", style="bold yellow", markup=False)

    context.show(made, show)
    return 2 if detailed_exitcode and made.changes else 0


@click.command()
@click.argument("planfile", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False)
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@LOCK_TIMEOUT
@YES
@common_options()
def apply(
    context: CommandContext,
    *,
    planfile: Path | None,
    only: tuple[str, ...],
    excluded: tuple[str, ...],
    locked: bool,
    offline: bool,
    lock_timeout: float,
    yes: bool,
) -> int:
    """
    Apply the lock to this node: download, verify, test, activate.

    Asks for confirmation on a terminal, never elsewhere. With PLANFILE, carries out exactly that plan, or fails if it is stale.

    \b
      reconcile apply --yes
      reconcile apply --only mistral-7b-instruct:v1
    """
    from reconciler.commands import apply as apply_command
    from reconciler.commands.reporting import reported
    from reconciler.core import plan as plans
    from reconciler.report import terminal

    node = context.node()
    options = _options(only=only, excluded=excluded, locked=locked, offline=offline, lock_timeout_seconds=lock_timeout)
    saved = plans.decode(planfile.read_bytes()) if planfile else None
    if saved is None and not yes:
        made = apply_command.preview(node, options).plan
        if made.changes and not context.quiet:
            terminal.plan(context.console, made)
        if made.changes and context.is_interactive:
            context.confirm("Apply this plan?")
    with context.reporter() as report, reported(node, report, offline=offline):
        return _code(apply_command.apply(node, report, options, saved=saved))


def _code(outcome: Outcome) -> int:
    return 1 if outcome.internal_errors else 3 if outcome.failed or outcome.unfetched else 0


@click.command()
@click.option(
    "--splay",
    type=Seconds(),
    default=0.0,
    metavar="TIME",
    help="Wait first, at most this long: how long follows from the node's id, so that nodes take turns.",
)
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@LOCK_TIMEOUT
@common_options()
def sync(
    context: CommandContext,
    *,
    splay: float,
    only: tuple[str, ...],
    excluded: tuple[str, ...],
    locked: bool,
    offline: bool,
    lock_timeout: float,
) -> int:
    """
    Fetch the latest snapshot, then apply it. Use this in cron.

    If the snapshot cannot be fetched, sync warns and applies the last accepted lock. It exits 0 then; 6 if this has lasted for longer
    than [network] quiet_after; 1 if none was ever fetched from this address.

    \b
      */5 * * * *  reconcile sync --quiet --splay 4m
    """
    import time

    from reconciler.commands import apply as apply_command
    from reconciler.commands.reporting import reported
    from reconciler.core import rollout

    node = context.node()
    options = _options(only=only, excluded=excluded, locked=locked, offline=offline, lock_timeout_seconds=lock_timeout)
    with context.reporter() as report, reported(node, report, offline=offline):
        time.sleep(rollout.start_delay(node.node_id, splay))  # the wait is what --splay asks for; a signal ends it, and the store is free
        return _code(apply_command.sync(node, report, options))
