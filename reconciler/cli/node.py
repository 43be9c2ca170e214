"""The commands that bring a node to the state that the signed snapshot asks for: init, lock, plan, apply, sync, agent, status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import EXCEPT, FILE, LOCK_TIMEOUT, LOCKED, OFFLINE, ONLY, YES, Seconds

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.apply.run import Outcome
    from reconciler.commands.context import RunOptions


def _options(**given: object) -> RunOptions:
    import msgspec

    from reconciler.commands.context import RunOptions

    return msgspec.convert(given, RunOptions, strict=True)


@click.command()
@click.option("--root", "root_file", type=FILE, help="The network's trust root, which init pins.")
@click.option("--fingerprint", default="", help="The fingerprint that the root must have, received by another way than the file.")
@click.option("--snapshot", default="", help="URL or path of the network's signed snapshot.")
@click.option("--store", default="store", help="The store's folder.")
@click.option("--force", is_flag=True, help="Replace an existing reconcile.toml.")
@common_options()
def init(context: CommandContext, *, root_file: Path | None, fingerprint: str, snapshot: str, store: str, force: bool) -> None:
    """
    Write reconcile.toml and pin the network's trust root.

    \b
      reconcile init --root root.json --snapshot https://config.example.org/snapshot.json
    """
    from reconciler.commands import init as init_command

    made = init_command.init(Path.cwd(), root_file=root_file, fingerprint=fingerprint, snapshot=snapshot, store=store, force=force)
    context.show(made, lambda to: to.print(made.sentence, markup=False))


@click.command()
@click.argument("source", default="", metavar="[SNAPSHOT]")
@click.option("--check", is_flag=True, help="Only compare: exit 2 if the lock would change, 1 if there is none. Write nothing.")
@LOCK_TIMEOUT
@common_options()
def lock(context: CommandContext, *, source: str, check: bool, lock_timeout: float) -> int:
    """
    Verify a snapshot and compile it to models.lock.

    SNAPSHOT is a file or URL. Default: [network] snapshot in the settings. The signed envelope is kept beside the lock as snapshot.json;
    commit both.

    \b
      reconcile lock
      reconcile lock --check      in CI: exit 0 if the committed lock matches the snapshot
    """
    from reconciler.commands import lock as lock_command
    from reconciler.core import units
    from reconciler.core.text import printable

    node = context.node()
    if check:
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
    """
    from reconciler.commands import apply as apply_command
    from reconciler.core import plan as plans

    if out is not None:
        context.check_output(out)
    node = context.node()
    seen = apply_command.preview(node, _options(only=only, excluded=excluded, locked=locked, offline=offline))
    made = seen.plan
    if out is not None:
        context.write_output(out, plans.encode(made))

    def show(to: Console) -> None:
        from reconciler.report import terminal

        terminal.plan(to, made, verbose=context.verbose)
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
    with context.reporter() as report:
        return _code(apply_command.apply(node, report, options, saved=saved))


def _code(outcome: Outcome) -> int:
    return 1 if outcome.internal_errors else 3 if outcome.failed or outcome.unfetched else 0


@click.command()
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@LOCK_TIMEOUT
@common_options()
def sync(
    context: CommandContext, *, only: tuple[str, ...], excluded: tuple[str, ...], locked: bool, offline: bool, lock_timeout: float
) -> int:
    """
    Fetch the latest snapshot, then apply it. Use this in cron.

    If the snapshot cannot be fetched, sync warns and applies the last accepted lock. It exits 0 then; 6 if this has lasted for longer
    than [network] quiet_after; 1 if none was ever fetched from this address.

    \b
      */5 * * * *  reconcile sync --quiet
    """
    from reconciler.commands import apply as apply_command

    options = _options(only=only, excluded=excluded, locked=locked, offline=offline, lock_timeout_seconds=lock_timeout)
    with context.reporter() as report:
        return _code(apply_command.sync(context.node(), report, options))


@click.command()
@click.option("--once", is_flag=True, help="Run one cycle, then exit with the exit code of sync. For cron or a timer.")
@click.option("--interval", type=Seconds(), metavar="TIME", help="Time between cycles, e.g. 5m. Default: [agent] interval in the settings.")
@click.option("--metrics-file", type=FILE, metavar="FILE", help="Write Prometheus metrics to FILE, for node exporter's textfile collector.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), metavar="PORT", help="Serve Prometheus metrics on loopback at PORT; 0: any free port."
)
@LOCKED
@OFFLINE
@common_options()
def agent(
    context: CommandContext,
    *,
    once: bool,
    interval: float | None,
    metrics_file: Path | None,
    metrics_port: int | None,
    locked: bool,
    offline: bool,
) -> int:
    """
    Run sync repeatedly, and re-hash and repair the store.

    The time between cycles is [agent] interval plus a random jitter; after failures it grows, up to an hour. Each cycle also hashes a
    share of the store, so that every blob is hashed once within [agent] scrub_after, and repairs what is damaged. Its health is written
    to <store>/health.json. SIGTERM and SIGINT end it within seconds. SIGHUP reloads the settings and starts a cycle; invalid settings
    are rejected and the old ones stay in use. Under systemd it notifies readiness and feeds the watchdog.

    \b
      reconcile agent
      reconcile agent --interval 1m --metrics-port 9464
      reconcile agent --once --metrics-file /var/lib/node_exporter/reconcile.prom
    """
    from reconciler.agent.loop import Agent, AgentOptions
    from reconciler.agent.service import Wakeup
    from reconciler.commands.context import RunOptions

    if metrics_file is not None:
        context.check_output(metrics_file)
    options = AgentOptions(
        interval_seconds=interval,
        metrics_file=metrics_file.absolute() if metrics_file else None,
        metrics_port=metrics_port,
        run=RunOptions(locked=locked, offline=offline),
    )
    with context.reporter() as report, Wakeup() as wakeup:
        made = Agent(context.node, report, wakeup, options)
        if not once:
            made.run()
            return 0
        result = made.once()
    if result.error is not None:
        raise result.error
    return 3 if result.outcome == "models-failed" else 0


@click.command()
@click.argument("model", required=False)
@common_options()
def status(context: CommandContext, *, model: str | None) -> None:
    """
    Show every model's state and why. For one MODEL, also show its last test.

    \b
      reconcile status
      reconcile status mistral-7b-instruct:v1
      reconcile status --json | jq -r '.models[] | select(.state == "active").id'
    """
    from reconciler.commands import status as status_command
    from reconciler.core import units

    node = context.node()
    found = status_command.status(node, model or "")
    again = f"at the next sync{', at ' + units.rfc3339(found.next_sync_at) if found.next_sync_at else ''}"

    def show(to: Console) -> None:
        from reconciler.core.text import printable
        from reconciler.report import terminal
        from reconciler.report.events import short

        is_ill = found.refused or found.heard.unreachable
        to.print(printable(found.summary), style="bold yellow" if is_ill else None, markup=False)
        until = units.rfc3339(found.snapshot.expires_at)
        to.print(f"{found.network}, snapshot {found.snapshot.version} (expires {until}), generation {found.generation}", markup=False)
        terminal.models(to, found.models)
        if model:
            terminal.model_details(to, found.models[0], node.layout.root, again)
        elif any(terminal.is_retried(one) for one in found.models):
            to.print(f"models that failed, are pending or could not be fetched are retried {again}", markup=False)
        for drifted in found.drift:
            to.print(f"drift: {printable(drifted)}", style="yellow", markup=False)
        if not model:
            to.print(f"active set {short(found.active_digest)}", style="dim", markup=False)

    context.show(found, show)
