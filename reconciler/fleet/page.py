"""A fleet's report as one HTML page that needs nothing else: no script, no picture, no address. Every text in it is escaped."""

from __future__ import annotations

from html import escape

from reconciler.core import units
from reconciler.fleet.assess import FleetReport, ModelReport, NodeList

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#c62828;--wait:#9a6700}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{border-bottom:1px solid var(--line);padding:.35rem .6rem;text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}
.safe{color:var(--good)}.unsafe,.bad{color:var(--bad)}.not-yet{color:var(--wait)}
.note{color:GrayText}ul{padding-left:1.2rem}code{overflow-wrap:anywhere}
"""
_COLUMNS = ("model", "serving", "failed", "silent", "waiting", "incompatible", "other")
#: The lists of nodes, each with what it means.
LISTS = {
    "lagging": "have an older snapshot",
    "unserved": "wait for a model that they can run",
    "refusing": "refuse the snapshot or the lock",
    "unreachable": "cannot fetch the snapshot",
    "held": "are held by a rollback",
    "silent": "have sent nothing in time",
    "missing": "have a known key and have sent nothing",
}


def render(found: FleetReport) -> bytes:
    """Return the page of *found*, in UTF-8."""
    title = f"{found.network or 'fleet'}: {units.count(found.nodes, 'node')}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(units.rfc3339(found.at))}: newest snapshot {found.snapshot}</p>',
        f'<p class="note">{units.count(found.active_sets, "active set")}, {units.count(found.files, "file")} read</p>',
        *_verdict(found),
        "<table><thead><tr>" + "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS) + "</tr></thead><tbody>",
        *(_row(model) for model in found.models),
        "</tbody></table>",
        *_causes(found),
        *_lists(found),
        *_refused(found),
        "</body></html>\n",
    ]
    return "\n".join(parts).encode()


def _verdict(found: FleetReport) -> list[str]:
    if found.verdict is None:
        return []
    word = found.verdict.word
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in found.verdict.reasons)
    return [f'<h2 class="{word}">{escape(SENTENCES[word])}</h2><ul>{reasons}</ul>']


#: What each verdict says.
SENTENCES = {"safe": "safe to widen", "not-yet": "not yet: too little is known", "unsafe": "not safe to widen"}


def _row(model: ModelReport) -> str:
    figures = (model.serving, model.failed, model.silent, model.waiting, model.incompatible, model.other)
    bad = {1, 2}
    cells = "".join(f"<td{' class=bad' if index in bad and value else ''}>{value}</td>" for index, value in enumerate(figures))
    return f"<tr><td><code>{escape(model.id)}</code></td>{cells}</tr>"


def _causes(found: FleetReport) -> list[str]:
    rows = [
        f"<li><code>{escape(model.id)}</code>, {units.count(cause.count, 'node')}: {escape(cause.text)} "
        f'<span class="note">{escape(", ".join(cause.nodes))}</span></li>'
        for model in found.models
        for cause in model.causes
    ]
    return ["<h2>Why models failed</h2><ul>", *rows, "</ul>"] if rows else []


def _lists(found: FleetReport) -> list[str]:
    parts = []
    for name, meaning in LISTS.items():
        listed: NodeList = getattr(found, name)
        if listed.count:
            more = ", …" if listed.count > len(listed.nodes) else ""
            nodes = escape(", ".join(listed.nodes) + more)
            parts.append(f'<li>{units.count(listed.count, "node")} {meaning}: <span class="note">{nodes}</span></li>')
    return ["<h2>Nodes</h2><ul>", *parts, "</ul>"] if parts else []


def _refused(found: FleetReport) -> list[str]:
    if not found.refused:
        return []
    return ["<h2>Files that count for nothing</h2><ul>", *(f"<li>{count} {name}</li>" for name, count in found.refused.items()), "</ul>"]
