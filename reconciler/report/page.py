"""
The status page: one HTML file that says how a node is, for a person with a browser and nothing else.

Rules that hold here:

1. The file is complete: no script, no font, no image and no style is loaded, and a policy in it forbids to (CSP ``default-src 'none'``).
2. All text is escaped where it enters: names, reasons and messages are chosen by documents, servers and models.
3. No colour is the only sign of anything. Light and dark follow the reader's system; contrast is at least that of WCAG 2.2, level AA.
4. It is readable as text from top to bottom: the sentence first, then models, incidents, history and the node. Roles stand in the markup:
   the style of a phone makes blocks of the cells, and browsers then no longer tell that it is a table.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from reconciler import __version__
from reconciler.core import units
from reconciler.core.node import NodeFacts
from reconciler.core.text import printable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MOST_MODELS = 1_000
_MOST_TEXT = 1_000
_CODE = re.compile(r"`([^`]+)`")
#: A mark for each state, beside its word.
_MARKS = {"active": "●", "inactive": "○", "pending": "◌", "failed": "✗", "archived": "▪", "absent": "·"}


class PageModel(Struct, frozen=True, kw_only=True):
    """One model as the page shows it."""

    id: str
    state: str
    reason: str
    tasks: tuple[str, ...] = ()
    #: Bytes on this node, of all that it has.
    here_bytes: int = 0
    total_bytes: int = 0
    attempts: int = 0
    last_error: str = ""
    since: datetime | None = None


class PageEvent(Struct, frozen=True, kw_only=True):
    """One line of the incidents or of the history."""

    at: datetime
    kind: str
    text: str
    times: int = 1
    last_at: datetime | None = None


class Page(Struct, frozen=True, kw_only=True):
    """All that the page shows."""

    made_at: datetime
    #: How the node is, in one sentence; *level* is ``ok``, ``warning`` or ``error``.
    summary: str
    level: str
    network: str = ""
    snapshot_version: int = 0
    expires_at: datetime | None = None
    heard_at: datetime | None = None
    generation: int = 0
    lock: str = ""
    active_digest: str = ""
    node: NodeFacts | None = None
    reserve_bytes: int = 0
    next_at: datetime | None = None
    models: tuple[PageModel, ...] = ()
    incidents: tuple[PageEvent, ...] = ()
    history: tuple[PageEvent, ...] = ()
    #: How many models were active after each swap, the oldest first.
    points: tuple[ChartPoint, ...] = ()


def render(page: Page) -> bytes:
    """Return the HTML document."""
    return "\n".join(_document(page)).encode() + b"\n"


def _text(text: str) -> str:
    """Return *text* from outside as HTML."""
    return html.escape(printable(text, _MOST_TEXT), quote=True)


def _with_code(text: str) -> str:
    """Return *text* as HTML, with what stands between backquotes as code."""
    return _CODE.sub(r"<code>\1</code>", _text(text))


def _time(instant: datetime | None) -> str:
    if instant is None:
        return "never"
    text = units.rfc3339(instant)
    return f'<time datetime="{text}">{text[:10]} {text[11:16]} UTC</time>'


def _document(page: Page) -> Iterator[str]:
    title = f"{page.network or 'reconcile'}: {_active(page)} active"
    yield "<!doctype html>"
    yield '<html lang="en">'
    yield "<head>"
    yield '<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield '<meta name="referrer" content="no-referrer">'
    yield '<meta name="robots" content="noindex">'
    yield f"<title>{_text(title)}</title>"
    yield f"<style>{STYLE}</style>"
    yield "</head>"
    yield "<body>"
    yield "<header>"
    yield f"<h1>{_text(page.network or 'This node')}</h1>"
    yield f'<p class="summary {_level(page)}"><strong>{_LEVELS[_level(page)]}:</strong> {_with_code(page.summary)}</p>'
    yield "</header>"
    yield "<main>"
    yield from _models(page.models)
    yield from _events("Incidents", "incidents", page.incidents, "Nothing was refused, failed or repaired.")
    yield from _history(page)
    yield from _facts(page)
    yield "</main>"
    yield f"<footer><p>Made at {_time(page.made_at)} by reconcile {_text(__version__)}{_next(page)}.</p></footer>"
    yield "</body>"
    yield "</html>"


_LEVELS = {"ok": "OK", "warning": "Warning", "error": "Error"}


def _level(page: Page) -> str:
    return page.level if page.level in _LEVELS else "error"


def _active(page: Page) -> str:
    return units.count(sum(model.state == "active" for model in page.models), "model")


def _next(page: Page) -> str:
    return f"; the next run begins at {_time(page.next_at)}" if page.next_at else ""


def _facts(page: Page) -> Iterator[str]:
    rows = [
        ("Snapshot", f"{page.snapshot_version}, expires {_time(page.expires_at)}" if page.expires_at else "none"),
        ("Last fetched", _time(page.heard_at)),
        ("Generation", str(page.generation)),
        ("Active set", f"<code>{_text(page.active_digest[:19])}</code>" if page.active_digest else "empty"),
        ("Lock", f"<code>{_text(page.lock[:19])}</code>" if page.lock else "none"),
    ]
    if page.node:
        gpus = ", ".join(f"{_text(gpu.name)} ({units.human_size(gpu.total_bytes)})" for gpu in page.node.gpus) or "none"
        engines = ", ".join(f"{_text(name)} {_text(version)}" for name, version in sorted(page.node.engines.items())) or "none"
        rows += [("GPU", gpus), ("Engines", engines), ("Memory", units.human_size(page.node.memory_bytes)), ("Disk", _disk(page))]
    yield '<section aria-labelledby="node"><h2 id="node">Node</h2><dl>'
    yield from (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    yield "</dl></section>"


def _disk(page: Page) -> str:
    assert page.node
    total, free = page.node.disk_total_bytes, page.node.disk_free_bytes
    text = f"{units.human_size(free)} of {units.human_size(total)} free, {units.human_size(page.reserve_bytes)} kept in reserve"
    return f"{_bar(total - free, total, 'disk in use')} {text}"


def _bar(value: int, most: int, label: str) -> str:
    share = 100 * value // most if most else 0
    return f'<progress max="{max(most, 1)}" value="{min(value, max(most, 1))}" aria-label="{_text(label)}">{share} %</progress>'


def _models(models: Sequence[PageModel]) -> Iterator[str]:
    yield '<section aria-labelledby="models"><h2 id="models">Models</h2>'
    if not models:
        yield "<p>None is listed.</p></section>"
        return
    heads = "".join(f'<th scope="col" role="columnheader">{head}</th>' for head in ("Model", "State", "On this node", "Why"))
    yield f'<table role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead><tbody role="rowgroup">'
    yield from map(_model, models[:_MOST_MODELS])
    yield "</tbody></table>"
    if len(models) > _MOST_MODELS:
        yield f"<p>and {len(models) - _MOST_MODELS:,} more: <code>reconcile status</code> lists them.</p>"
    yield "</section>"


def _model(model: PageModel) -> str:
    tasks = f' <span class="tasks">{_text(", ".join(model.tasks))}</span>' if model.tasks else ""
    state = model.state if model.state in _MARKS else "absent"
    since = f' <span class="since">since {_time(model.since)}</span>' if model.since else ""
    size = f"{units.human_size(model.here_bytes)} of {units.human_size(model.total_bytes)}"
    size = units.human_size(model.total_bytes) if model.here_bytes >= model.total_bytes else size
    bar = f"{_bar(model.here_bytes, model.total_bytes, f'{model.id} on this node')} {size}" if model.total_bytes else "nothing"
    attempts = f"<br>{units.count(model.attempts, 'failed attempt')}" if model.attempts else ""
    error = f'<br><span class="error">{_text(model.last_error)}</span>' if model.last_error else ""
    why = f"{_text(model.reason)}{attempts}{error}"
    return (
        f'<tr class="{state}" role="row"><th scope="row" role="rowheader">{_text(model.id)}{tasks}</th>'
        f'<td role="cell" data-label="State"><span class="state"><span aria-hidden="true">{_MARKS[state]}</span> {state}</span>{since}</td>'
        f'<td role="cell" data-label="On this node">{bar}</td><td role="cell" data-label="Why">{why}</td></tr>'
    )


def _events(title: str, name: str, events: Sequence[PageEvent], nothing: str) -> Iterator[str]:
    yield f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>'
    if not events:
        yield f"<p>{nothing}</p></section>"
        return
    yield "<ol>"
    for one in events:
        again = f" ({one.times} times, last at {_time(one.last_at)})" if one.times > 1 else ""
        yield f"<li>{_time(one.at)} <strong>{_text(one.kind)}</strong> {_text(one.text)}{again}</li>"
    yield "</ol></section>"


def _history(page: Page) -> Iterator[str]:
    yield '<section aria-labelledby="history"><h2 id="history">History</h2>'
    if page.points:
        yield f"<figure>{chart(page.points, page.made_at)}<figcaption>Active models after each swap.</figcaption></figure>"
    if not page.history:
        yield "<p>No generation was activated yet.</p></section>"
        return
    yield "<ol>"
    for one in page.history:
        yield f"<li>{_time(one.at)} <strong>{_text(one.kind)}</strong> {_text(one.text)}</li>"
    yield "</ol></section>"


STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --panel: #f6f8fa; --blue: #0550ae;
  --ok: #116329; --ok-paper: #dafbe1; --warning: #6f4400; --warning-paper: #fff3c4; --error: #a40e26; --error-paper: #ffe5e8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0d1117; --ink: #e6edf3; --soft: #9aa5b1; --line: #30363d; --panel: #161b22; --blue: #79c0ff;
  --ok: #7ee787; --ok-paper: #0f2d18; --warning: #f2cc60; --warning-paper: #33270a; --error: #ff9aa2; --error-paper: #3c1419; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
.summary { margin: 0; padding: .75rem 1rem; border-inline-start: .35rem solid; border-radius: .25rem; font-size: 1.05rem; }
.summary.ok { background: var(--ok-paper); border-color: var(--ok); }
.summary.warning { background: var(--warning-paper); border-color: var(--warning); }
.summary.error { background: var(--error-paper); border-color: var(--error); }
.ok strong { color: var(--ok); } .warning strong { color: var(--warning); } .summary.error strong { color: var(--error); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem; margin: 0; }
dl div { padding: .5rem .75rem; background: var(--panel); border-radius: .25rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line); text-align: start; vertical-align: top; }
tbody th { min-width: 11rem; } td[data-label="On this node"] { min-width: 10rem; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
.tasks, .since { display: block; color: var(--soft); font-size: .85rem; font-weight: 400; }
.state { white-space: nowrap; font-weight: 600; }
.active .state { color: var(--ok); } .pending .state { color: var(--warning); } .failed .state { color: var(--error); }
span.error { color: var(--error); }
progress { display: block; width: 100%; max-width: 16rem; height: .7rem; accent-color: var(--blue); }
ol { margin: 0; padding: 0; list-style: none; }
li { padding: .35rem 0; border-bottom: 1px solid var(--line); }
time { font-variant-numeric: tabular-nums; color: var(--soft); }
code { font-family: ui-monospace, monospace; font-size: .9em; }
figure { margin: 0 0 1rem; }
figcaption, footer { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg .axis { fill: none; stroke: var(--line); }
svg .line { fill: none; stroke: var(--blue); stroke-width: 2; } svg .area { fill: var(--blue); opacity: .15; }
@media (max-width: 40rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, th, td { display: block; }
  tr { padding: .75rem 0; border-bottom: 1px solid var(--line); }
  th, td, tbody th, td[data-label="On this node"] { min-width: 0; border: 0; padding: .15rem 0; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); font-size: .85rem; }
  progress { max-width: none; }
  svg { font-size: 22px; }
}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
@media print { body { max-width: none; } }
"""


# -- the history as a picture -----------------------------------------------------------------------

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
