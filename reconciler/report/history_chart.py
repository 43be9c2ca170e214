"""
The history as a picture: how many models were active over time, as a step line in SVG that is part of the status page.

The picture has a title and a description, so that what it shows is read out too; numbers alone enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from reconciler.core import units

_WIDTH, _HEIGHT = 720, 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 8, 8, 20


class ChartPoint(Struct, frozen=True, kw_only=True):
    """After a swap at this time, so many models were active."""

    at: datetime
    active: int


def chart(points: Sequence[ChartPoint], until: datetime) -> str:
    """Return an SVG element of *points*, the oldest first, up to the time *until*."""
    begin = points[0].at.timestamp()
    span = max(until.timestamp() - begin, 1.0)
    most = max(1, *(point.active for point in points))

    def x(instant: datetime) -> float:
        share = min(max((instant.timestamp() - begin) / span, 0.0), 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(active: int) -> float:
        return _HEIGHT - _BOTTOM - active / most * (_HEIGHT - _TOP - _BOTTOM)

    line = f"M{x(points[0].at):.1f} {y(points[0].active):.1f}"
    line += "".join(f"H{x(point.at):.1f}V{y(point.active):.1f}" for point in points[1:]) + f"H{x(until):.1f}"
    low, high = min(point.active for point in points), max(point.active for point in points)
    first, last = units.rfc3339(points[0].at)[:10], units.rfc3339(until)[:10]
    said = f"From {first} to {last}, {units.count(len(points), 'swap')}: between {low} and {high} active, now {points[-1].active}."
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="chart-title chart-text">'
        f'<title id="chart-title">Active models over time</title><desc id="chart-text">{said}</desc>'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y(most) + 4:.0f}" text-anchor="end">{most}</text>'
        f'<text x="{_LEFT - 6}" y="{y(0) + 4:.0f}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{first}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{last}</text>'
        f'<path class="area" d="{line}V{y(0):.1f}H{x(points[0].at):.1f}Z"/><path class="line" d="{line}"/></svg>'
    )
