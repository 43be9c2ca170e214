"""
Hashing the store little by little: each blob within ``[agent] scrub_after``, the longest unchecked first, evenly spread.

With n blobs and a time T, one blob is hashed every T/n. Nothing is kept for it but the times at which blobs were hashed, so an agent
that is started anew every day scrubs as much as one that runs for a year.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reconciler.commands import apply, verify
from reconciler.commands.options import Clock, Options, wall_clock
from reconciler.core import units
from reconciler.ports import Notice, Reporter
from reconciler.settings import Settings


def due(ages: Sequence[float], within: float) -> int:
    """
    Return how many blobs to hash now, the oldest first, so that none is ever unchecked for more than *within* seconds.

    *ages* are the seconds since each was hashed; those never hashed are infinitely old. The one with j older ones before it waits for
    j turns of within/n seconds each: as many of the oldest are due now as its age leaves no turns for. So blobs that came together
    are hashed one after the other, and a single one when it comes of age.
    """
    if within <= 0:
        return len(ages)
    turn = within / len(ages) if ages else within
    late = 0
    for before, age in enumerate(sorted(ages, reverse=True)):
        late = max(late, before + 1 if age >= within else before - math.floor((within - age) / turn))
    return late


def scrub(settings: Settings, report: Reporter, options: Options, *, delay_seconds: float, clock: Clock = wall_clock) -> int:
    """
    Hash what is due and repair what is damaged; return how many things were found damaged.

    *delay_seconds* is the longest time until the next call: a blob must not come of age before it.

    Raises:
        StoreBusy, StoreError, TrustError: as their names say.
    """
    asked = units.seconds(settings.agent.scrub_after)
    ages = verify.ages(settings, clock())
    count = due(ages, min(0.9 * asked, asked - delay_seconds))
    if not count:
        return 0
    found = verify.verify(settings, report, sample=count / len(ages), workers=1, clock=clock)
    report(Notice(level="info", text=f"scrubbed {found.checked} of {units.count(len(ages), 'blob')}, {units.human_size(found.bytes)}"))
    if found.damage:
        apply.apply(settings, report, options, actor="agent", clock=clock)
    return len(found.damage)
