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
from reconciler.report.history_chart import ChartPoint, chart
from reconciler.report.page_style import STYLE

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
