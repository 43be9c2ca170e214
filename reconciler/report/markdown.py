"""
A plan as Markdown, for a comment on a pull request: one table of models and nodes, and what fails.

Rules that hold here:

1. The first line is a comment by which a program finds its own text again and replaces it.
2. Text that a document chose is escaped: it makes no link, no mention, no image, no table cell and no element of HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from reconciler.core import units
from reconciler.core.fleet_plan import FleetPlan, NodePlan, SnapshotSide
from reconciler.core.plan import ModelChange, Plan
from reconciler.core.text import printable
from reconciler.report.terminal import gpu_need

MARKER = "<!-- reconcile plan -->"
#: What begins an element, a link, a mention or a reference; and what GitHub makes a link of by itself.
_SPECIAL = re.compile(r"[\\`*_\[\]~$<>@&|#]|:(?=//)|(?<=www)\.", re.IGNORECASE)
_MOST_ROWS = 200


def escape(text: str) -> str:
    """Return *text* so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};" if found[0] in "<>@&|:.#" else f"\\{found[0]}", printable(text, 500))


def _id(model: str) -> str:
    return f"`{printable(model)}`"


def fleet(made: FleetPlan) -> str:
    """Return what a change does to the nodes of profiles."""
    return "\n".join([MARKER, *_fleet_lines(made)]) + "\n"


def _fleet_lines(made: FleetPlan) -> Iterator[str]:
    before = made.against.base if made.against else None
    versions = f"snapshot {before.version} → {made.snapshot.version}" if before else f"snapshot {made.snapshot.version}"
    yield f"### {escape(made.network)}: {versions}"
    yield ""
    count = units.count(len(made.failures), "rule")
    yield f"**{count} broken.**" if made.failures else "**No rule is broken.**"
    yield ""
    yield from (f"- ❌ {escape(one.text)}" for one in made.failures)
    yield from (f"- ⚠️ {escape(text)}" for text in made.against.warnings) if made.against else ()
    yield ""
    yield from _sides(before, made.snapshot)
    yield from _keys(made)
    yield from _models(made)


def _sides(before: SnapshotSide | None, after: SnapshotSide) -> Iterator[str]:
    rows = [
        ("snapshot", str(before.version) if before else "", str(after.version)),
        ("expires", units.rfc3339(before.expires_at) if before else "", units.rfc3339(after.expires_at)),
        ("models", str(before.models) if before else "", str(after.models)),
        ("trust root", str(before.root) if before else "", str(after.root)),
    ]
    yield "| | base | this change |" if before else "| | this change |"
    yield "|---|---|---|" if before else "|---|---|"
    for name, old, new in rows:
        changed = f"**{new}**" if before and old != new else new
        yield f"| {name} | {old} | {changed} |" if before else f"| {name} | {new} |"
    yield ""


def _keys(made: FleetPlan) -> Iterator[str]:
    if made.against and made.against.keys:
        yield "Who may sign changes:"
        yield ""
        yield from (f"- {escape(text)}" for text in made.against.keys)
        yield ""


def _models(made: FleetPlan) -> Iterator[str]:
    by_node = [{change.id: change for change in one.plan.models} for one in made.nodes]
    ids = sorted({model for changes in by_node for model in changes})
    shown = [model for model in ids if any(_is_shown(changes.get(model)) for changes in by_node)]
    if not shown:
        yield "Nothing changes on any node."
        return
    yield f"| model | {' | '.join(escape(one.node) for one in made.nodes)} |"
    yield f"|---|{'---|' * len(made.nodes)}"
    for model in shown[:_MOST_ROWS]:
        cells = [_operation(one, changes.get(model)) for one, changes in zip(made.nodes, by_node, strict=True)]
        yield f"| {_id(model)}{_mark(made, model)} | {' | '.join(cells)} |"
    yield f"| to download | {' | '.join(units.human_size(one.download_bytes) for one in made.nodes)} |"
    yield ""
    if len(shown) > _MOST_ROWS:
        yield f"… and {len(shown) - _MOST_ROWS} more models."


def _is_shown(change: ModelChange | None) -> bool:
    return change is not None and (change.op != "keep" or not change.reason.startswith("up-to-date"))


def _mark(made: FleetPlan, model: str) -> str:
    if made.against is None:
        return ""
    if model in made.against.added:
        return " (new)"
    return " (dropped)" if model in made.against.removed else " (changed)" if model in made.against.changed else ""


def _operation(one: NodePlan, change: ModelChange | None) -> str:
    if change is None:
        return ""
    outage = "❌ **stops serving**, " if any(lost.id == change.id for lost in one.outages) else ""
    size = f", {units.human_size(change.download_bytes)}" if change.download_bytes else ""
    why = "" if change.op == "install" and change.reason.startswith("not-installed") else f": {escape(change.reason)}"
    op = "cannot run" if change.op == "reject" else change.op
    return f"{outage}{op}{size}{why}"


def plan(made: Plan) -> str:
    """Return the plan of this node."""
    return "\n".join([MARKER, *_plan_lines(made)]) + "\n"


def _plan_lines(made: Plan) -> Iterator[str]:
    shown = [change for change in made.models if _is_shown(change)]
    counts = ", ".join(f"{count} to {op}" for op, count in made.summary.items() if count and not op.endswith("_bytes") and op != "keep")
    yield f"### Plan: {counts}" if made.changes else "### Plan: no changes"
    yield ""
    yield from (f"- ⚠️ {escape(text)}" for text in (*made.warnings, *made.drift))
    yield ""
    if shown:
        yield "| model | operation | reason | to download |"
        yield "|---|---|---|---|"
        for change in shown[:_MOST_ROWS]:
            size = units.human_size(change.download_bytes) if change.download_bytes else ""
            size += f", {need}" if (need := gpu_need(change, made.gpu_bytes)) else ""
            yield f"| {_id(change.id)} | {change.op} | {escape(change.reason)} | {size} |"
    yield ""
    needed = f"{units.human_size(made.disk.needed)} of disk needed, {units.human_size(made.disk.free)} free"
    yield f"{units.human_size(made.summary['download_bytes'])} to download, {needed}."
