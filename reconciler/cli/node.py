"""The commands that make a node what the network says: init, lock, plan, apply, sync, agent, status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common
from reconciler.cli.param_types import Seconds

if TYPE_CHECKING:
    from rich.console import Console

    from reconciler.apply.run import Outcome
    from reconciler.commands.context import RunOptions

FILE = click.Path(path_type=Path, dir_okay=False)
LOCK_TIMEOUT = click.option("--lock-timeout", type=Seconds(), default=0.0, metavar="TIME", help="Wait so long for another run, as in 30s.")
ONLY = click.option("--only", multiple=True, metavar="ID", help="This model alone (may be given again).")
EXCEPT = click.option("--except", "excluded", multiple=True, metavar="ID", help="All but this model; what is taken away stops as ever.")
LOCKED = click.option("--locked", is_flag=True, help="Refuse a lock that is not what the snapshot compiles to; never fetch a new one.")
OFFLINE = click.option("--offline", is_flag=True, help="Touch no network at all.")
YES = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def _options(**given: object) -> RunOptions:
    import msgspec

    from reconciler.commands.context import RunOptions

    return msgspec.convert(given, RunOptions, strict=True)


@click.command()
@click.option("--root", "root_file", type=FILE, help="The network's trust root, to be pinned.")
@click.option("--fingerprint", default="", help="The root's fingerprint, told by another way than the file.")
@click.option("--snapshot", default="", help="URL or path of the network's signed snapshot.")
@click.option("--store", default="store", help="The store's folder.")
@click.option("--force", is_flag=True, help="Replace a reconcile.toml that is there.")
@common()
def init(shell: CommandContext, *, root_file: Path | None, fingerprint: str, snapshot: str, store: str, force: bool) -> None:
    """
    Write reconcile.toml and pin the network's trust root.

    \b
      reconcile init --root root.json --snapshot https://config.example.org/snapshot.json
    """
    from reconciler.commands import init as init_command

    made = init_command.init(Path.cwd(), root_file=root_file, fingerprint=fingerprint, snapshot=snapshot, store=store, force=force)
    shell.document(made, lambda to: to.print(made.sentence, markup=False))


@click.command()
@click.argument("source", default="", metavar="[SNAPSHOT]")
@click.option("--check", is_flag=True, help="Only compare: exit 2 if the lock would change. Writes nothing.")
@LOCK_TIMEOUT
@common()
def lock(shell: CommandContext, *, source: str, check: bool, lock_timeout: float) -> int:
    """
    Verify a snapshot and compile it to models.lock.

    SNAPSHOT is a file or URL; without it, the one that the settings name. The signed envelope is kept beside the lock as snapshot.json:
    commit both.

    \b
      reconcile lock
      reconcile lock --check      in CI: is the committed lock what the snapshot compiles to?
    """
    from reconciler.commands import lock as lock_command
    from reconciler.core import units

    node = shell.node()
    if check:
        same = lock_command.is_lock_current(node, source)
        shell.document({"changes": not same}, lambda to: to.print("models.lock is up to date" if same else "models.lock would change"))
        return 0 if same else 2
    fetched = lock_command.update_lock(node, source, lock_timeout_seconds=lock_timeout)
    found, changes = fetched.verified_lock, fetched.changes
    header = found.lock.snapshot
    network_name, count = found.lock.network, len(found.lock.model)
    held = f"snapshot {header.version} of {network_name}, {units.count(count, 'model')}"
    said = f"models.lock {'written' if changes else 'is up to date'}: {held}"
    tree = {"schema": 1, "lock": found.lock_digest, "changes": changes, "network": network_name, "snapshot": header, "models": count}
    shell.document(tree, lambda to: to.print(said, markup=False))
    return 0


@click.command()
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 if there are changes, 0 if there are none.")
@click.option("--out", type=FILE, metavar="FILE", help="Save the plan, for `reconcile apply FILE`.")
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@common()
def plan(
    shell: CommandContext,
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
      reconcile plan --out plan.json && reconcile apply plan.json   exactly what was seen, or a refusal
    """
    from reconciler.commands import apply as apply_command
    from reconciler.core import plan as plans

    if out is not None:
        shell.output(out)
    made = apply_command.preview(shell.node(), _options(only=only, excluded=excluded, locked=locked, offline=offline)).plan
    if out is not None:
        shell.save(out, plans.encode(made))

    def show(to: Console) -> None:
        from reconciler.report import terminal

        terminal.plan(to, made, verbose=shell.verbose)

    shell.document(made, show)
    return 2 if detailed_exitcode and made.changes else 0


@click.command()
@click.argument("planfile", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False)
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@LOCK_TIMEOUT
@YES
@common()
def apply(
    shell: CommandContext,
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
    Make this node what the lock says: download, verify, test, activate.

    Asks on a terminal, never elsewhere. With PLANFILE, does exactly what that plan says, or refuses if it is stale.

    \b
      reconcile apply --yes
      reconcile apply --only mistral-7b-instruct:v1
    """
    from reconciler.commands import apply as apply_command
    from reconciler.core import plan as plans
    from reconciler.report import terminal

    node = shell.node()
    options = _options(only=only, excluded=excluded, locked=locked, offline=offline, lock_timeout_seconds=lock_timeout)
    saved = plans.decode(planfile.read_bytes()) if planfile else None
    if saved is None and not yes:
        made = apply_command.preview(node, options).plan
        if made.changes and not shell.quiet:
            terminal.plan(shell.people, made)
        if made.changes and shell.has_person:
            shell.ask("Carry this out?")
    with shell.reporter() as report:
        return _code(apply_command.apply(node, report, options, saved=saved))


def _code(outcome: Outcome) -> int:
    return 1 if outcome.internal_errors else 3 if outcome.failed else 0


@click.command()
@ONLY
@EXCEPT
@LOCKED
@OFFLINE
@LOCK_TIMEOUT
@common()
def sync(
    shell: CommandContext, *, only: tuple[str, ...], excluded: tuple[str, ...], locked: bool, offline: bool, lock_timeout: float
) -> int:
    """
    Hear the network, then apply: the line for cron.

    A network that does not answer is a warning: the last known lock is applied.

    \b
      */5 * * * *  reconcile sync --quiet
    """
    from reconciler.commands import apply as apply_command

    options = _options(only=only, excluded=excluded, locked=locked, offline=offline, lock_timeout_seconds=lock_timeout)
    with shell.reporter() as report:
        return _code(apply_command.sync(shell.node(), report, options))


@click.command()
@click.argument("model", required=False)
@common()
def status(shell: CommandContext, *, model: str | None) -> None:
    """
    Show every model's state and why; of one MODEL, its last test too.

    \b
      reconcile status
      reconcile status mistral-7b-instruct:v1
      reconcile status --json | jq -r '.models[] | select(.state == "active").id'
    """
    from reconciler.commands import status as status_command
    from reconciler.core import units

    node = shell.node()
    found = status_command.status(node, model or "")
    again = f"with the next sync{', at ' + units.rfc3339(found.next_sync_at) if found.next_sync_at else ''}"

    def show(to: Console) -> None:
        from reconciler.report import terminal
        from reconciler.report.text import plain, short

        until = units.rfc3339(found.snapshot.expires_at)
        to.print(f"{found.network}, snapshot {found.snapshot.version} (good until {until}), generation {found.generation}", markup=False)
        if found.refused:
            to.print(f"warning: nothing new is installed: {plain(found.refused)}", style="bold yellow", markup=False)
        terminal.models(to, found.models)
        if model:
            terminal.explained(to, found.models[0], node.layout.root, again)
        elif any(one.state in {"failed", "pending"} for one in found.models):
            to.print(f"failed and pending models are tried again {again}", markup=False)
        for drifted in found.drift:
            to.print(f"drift: {plain(drifted)}", style="yellow", markup=False)
        if not model:
            to.print(f"active set {short(found.active_digest)}", style="dim", markup=False)

    shell.document(found, show)
