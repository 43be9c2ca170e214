"""
What one cycle of the agent does: sync, hash a share of the store again, tell the network's operator, measure.

With n files in the store and a time T (``[agent] scrub_after``), one file is hashed every T/n, the longest unchecked first, so that each
is hashed within T. The only state is the times at which files were hashed, so an agent that is restarted every day hashes as much as one
that runs for a year.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from reconciler.commands.context import NodeContext, RunOptions
from reconciler.core import units
from reconciler.core.events import Notice
from reconciler.ports import Reporter
from reconciler.report.metrics import NodeMetrics


class CycleSteps(Protocol):
    """The steps of a cycle; tests give their own."""

    def sync(self, context: NodeContext, report: Reporter, options: RunOptions) -> int:
        """Fetch the latest snapshot and apply it; return how many models failed or were not fetched."""
        ...

    def scrub(self, context: NodeContext, report: Reporter, options: RunOptions, delay_seconds: float) -> int:
        """Hash the files that are due and repair what is damaged; return how many things were damaged."""
        ...

    def follow(self, context: NodeContext, report: Reporter) -> bool:
        """Tell again the servers that lag behind the active set; return whether one still does."""
        ...

    def tell(self, context: NodeContext, report: Reporter, options: RunOptions, *, wait: bool) -> None:
        """Report this node's status to the network's operator; *wait* for a few seconds until it is sent, or go on at once."""
        ...

    def measure(self, context: NodeContext) -> NodeMetrics:
        """Return the current figures for metrics, without the agent's own."""
        ...

    def write_page(self, context: NodeContext, path: Path) -> None:
        """Write the status page to *path*."""
        ...


class NodeSteps:
    """The steps on the real node; each imports what it needs when it runs."""

    def sync(self, context: NodeContext, report: Reporter, options: RunOptions) -> int:
        """Fetch the latest snapshot and apply it; return how many models failed or were not fetched."""
        from reconciler.commands import apply

        outcome = apply.sync(context, report, options, actor="agent")
        return len(outcome.failed) + len(outcome.unfetched)

    def scrub(self, context: NodeContext, report: Reporter, options: RunOptions, delay_seconds: float) -> int:
        """
        Hash the files that are due and repair what is damaged; return how many things were damaged.

        *delay_seconds* is the longest time until the next cycle: a file must not become overdue before it.

        Raises:
            StoreBusy, StoreError, TrustError: as their names say.
        """
        from reconciler.commands import apply, verify

        asked, ages = context.policy.scrub_seconds, verify.ages(context)
        count = due(ages, min(0.9 * asked, asked - delay_seconds))
        if not count:
            return 0
        found = verify.verify(context, report, sample=count / len(ages), workers=1)
        report(Notice(level="info", text=f"scrubbed {found.checked} of {units.count(len(ages), 'blob')}, {units.human_size(found.bytes)}"))
        if found.damage:
            apply.apply(context, report, options, actor="agent")
        return len(found.damage)

    def follow(self, context: NodeContext, report: Reporter) -> bool:
        """
        Tell again the servers that lag behind the active set; return whether one still does.

        Raises:
            StoreBusy, StoreError: as their names say.
        """
        from reconciler.commands import serve

        return serve.retry(context, report)

    def tell(self, context: NodeContext, report: Reporter, options: RunOptions, *, wait: bool) -> None:
        """Report this node's status to the network's operator; *wait* for a few seconds until it is sent, or go on at once."""
        from reconciler.commands import reporting

        seconds = reporting.SEND_SECONDS if wait else 0.0
        reporting.report_status(context, report, offline=options.offline, wait_seconds=seconds)

    def measure(self, context: NodeContext) -> NodeMetrics:
        """Return the current figures for metrics, without the agent's own."""
        from reconciler.commands import status

        return status.node_metrics(context)

    def write_page(self, context: NodeContext, path: Path) -> None:
        """Write the status page to *path*."""
        from reconciler.commands import status_page

        status_page.write(context, path)


def due(ages: Sequence[float], within: float) -> int:
    """
    Return how many files to hash now, the oldest first, so that none is ever unchecked for more than *within* seconds.

    *ages* are the seconds since each was hashed, infinity for never. A file with j older ones before it waits for j turns of within/n
    seconds each, so as many of the oldest are due as its age leaves no turns for. Files that came together are therefore hashed one
    after the other, and a single one when its time is over.
    """
    if within <= 0:
        return len(ages)
    turn = within / len(ages) if ages else within
    late = 0
    for before, age in enumerate(sorted(ages, reverse=True)):
        late = max(late, before + 1 if age >= within else before - math.floor((within - age) / turn))
    return late
