"""The command agent: sync again and again, as a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.command_context import CommandContext, common_options
from reconciler.cli.options import FILE, LOCKED, OFFLINE, Seconds

if TYPE_CHECKING:
    from reconciler.report.log_lines import LogFormat


@click.command()
@click.option("--once", is_flag=True, help="Run one cycle, then exit with the exit code of sync. For cron or a timer.")
@click.option("--interval", type=Seconds(), metavar="TIME", help="Time between cycles, e.g. 5m. Default: [agent] interval in the settings.")
@click.option("--metrics-file", type=FILE, metavar="FILE", help="Write Prometheus metrics to FILE, for node exporter's textfile collector.")
@click.option(
    "--metrics-address",
    metavar="HOST:PORT",
    help="Serve Prometheus metrics and /-/healthy there; port 0: any free one. Default: [agent] metrics_address in the settings.",
)
@click.option("--metrics-port", type=click.IntRange(0, 65535), metavar="PORT", help="The same as --metrics-address 127.0.0.1:PORT.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json", "journald"]),
    help="The log's form. Default off a terminal: journald under systemd, else text.",
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
    metrics_address: str | None,
    metrics_port: int | None,
    log_format: LogFormat | None,
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
      reconcile agent --interval 1m --metrics-address 0.0.0.0:9460
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
        metrics_address=_metrics_address(metrics_address, metrics_port),
        run=RunOptions(locked=locked, offline=offline),
    )
    with context.reporter(log=log_format or context.log_format) as report, Wakeup() as wakeup:
        made = Agent(context.node, report, wakeup, options)
        if not once:
            made.run()
            return 0
        result = made.once()
    if result.error is not None:
        raise result.error
    return 3 if result.outcome == "models-failed" else 0


def _metrics_address(address: str | None, port: int | None) -> tuple[str, int] | None:
    from reconciler.commands import context as contexts

    if address is None:
        return None if port is None else ("127.0.0.1", port)
    return contexts.address(address)
