"""The commands for a machine that looks after itself: agent, and doctor, which says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common
from reconciler.cli.node import FILE, LOCKED, OFFLINE
from reconciler.cli.param_types import Seconds

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"ok": ("ok     ", "green"), "warning": ("warning", "yellow"), "error": ("error  ", "bold red")}


@click.command()
@click.option("--once", is_flag=True, help="One cycle, then exit as sync does: for cron or a timer.")
@click.option("--interval", type=Seconds(), metavar="TIME", help="Time between cycles, as in 5m, instead of the settings'.")
@click.option("--metrics-file", type=FILE, metavar="FILE", help="Write Prometheus metrics there, for node exporter's textfile collector.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), metavar="PORT", help="Serve Prometheus metrics on loopback; 0: any port.")
@LOCKED
@OFFLINE
@common()
def agent(
    shell: CommandContext,
    *,
    once: bool,
    interval: float | None,
    metrics_file: Path | None,
    metrics_port: int | None,
    locked: bool,
    offline: bool,
) -> int:
    """
    Sync for ever, and look after the store.

    Cycles follow each other with an interval and a jitter; after failures the wait grows, up to an hour. Each cycle also hashes a share
    of the store, so that every blob is looked at within [agent] scrub_after, and repairs what is damaged. How it is stands in
    <store>/health.json. SIGTERM and SIGINT end it within seconds, SIGHUP reads the settings anew and begins the next cycle; under
    systemd it notifies and feeds the watchdog.

    \b
      reconcile agent
      reconcile agent --interval 1m --metrics-port 9464
      reconcile agent --once --metrics-file /var/lib/node_exporter/reconcile.prom
    """
    from reconciler.agent.loop import Agent, AgentOptions
    from reconciler.agent.service import Wakeup
    from reconciler.commands.context import RunOptions

    if metrics_file is not None:
        shell.output(metrics_file)
    options = AgentOptions(
        interval_seconds=interval,
        metrics_file=metrics_file.absolute() if metrics_file else None,
        metrics_port=metrics_port,
        run=RunOptions(locked=locked, offline=offline),
    )
    with shell.reporter() as report, Wakeup() as wakeup:
        made = Agent(shell.node, report, wakeup, options)
        if not once:
            made.run()
            return 0
        result = made.once()
    if result.error is not None:
        raise result.error
    return 3 if result.outcome == "models-failed" else 0


@click.command()
@OFFLINE
@common()
def doctor(shell: CommandContext, *, offline: bool) -> int:
    """
    Say what this machine lacks, and what to do.

    Looks at Python, aria2c, the sandbox, GPUs, engines, disk, clock, trust root, lock, store and agent, and whether sources answer.
    Changes nothing. Exit 1 if there is an error.

    \b
      reconcile doctor
      reconcile doctor --offline --json
    """
    from reconciler.commands import doctor as examining

    found = examining.examine(shell.node, offline=offline)

    def show(to: Console) -> None:
        from rich.text import Text

        for one in found:
            mark, style = _MARKS[one.level]
            to.print(Text.assemble((mark, style), f"  {one.name}: {one.text}"))
            if one.hint and one.level != "ok":
                to.print(f"         hint: {one.hint}", markup=False, style="dim")

    failed = any(one.level == "error" for one in found)
    shell.document({"schema": 1, "ok": not failed, "findings": found}, show)
    return 1 if failed else 0
