"""The commands about many nodes: a report of the statuses that they sent, and whose statuses count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON
from reconciler.cli.options import FILE, Seconds, Share
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.fleet.assess import FleetReport

_FOLDER = click.Path(path_type=Path, file_okay=False)
_KEYS = click.option(
    "--keys", type=_FOLDER, default=Path("node-keys"), help="The folder with the nodes' public keys, <node id>.pub, and what was last seen."
)


@click.group()
def fleet() -> None:
    """Read the signed statuses of many nodes."""


@fleet.command("report")
@click.argument("place", metavar="DIR")
@_KEYS
@click.option(
    "--network",
    default="",
    show_default=False,
    metavar="NAME",
    help="Count the statuses of this network alone; needed where there are several.",
)
@click.option(
    "--stale", type=Seconds(), default="3h", metavar="TIME", help="A node whose newest status is older than this counts as silent."
)
@click.option(
    "--max-failed", type=Share(), metavar="SHARE", help="A model is safe to widen if it failed on at most this share of nodes, e.g. 1%."
)
@click.option(
    "--min-nodes", type=click.IntRange(min=1), metavar="N", help="A model is safe to widen if at least so many nodes serve it, ..."
)
@click.option("--after", type=Seconds(), metavar="TIME", help="... and each has served it for so long, e.g. 2h.")
@click.option(
    "--model", "models", multiple=True, metavar="ID", help="Judge this model (may be repeated). Default: each model that was tried."
)
@click.option("--html", type=FILE, metavar="FILE", help="Write the report as one HTML page.")
@JSON
def fleet_report(
    *,
    place: str,
    keys: Path,
    network: str,
    stale: float,
    max_failed: float | None,
    min_nodes: int | None,
    after: float | None,
    models: tuple[str, ...],
    html: Path | None,
    as_json: bool,
) -> int:
    """
    Show what a fleet serves: DIR holds the statuses that nodes sent.

    DIR is a folder, s3://BUCKET/PREFIX, or oci://REGISTRY/REPOSITORY, whose artifacts, or the one of a :TAG, hold statuses as files. A
    status counts if the key of its node, in the folder of --keys, signed it, and it is of this network, fresh and its node's newest.
    Any of --max-failed, --min-nodes, --after and --model asks whether a model is safe to widen: exit code 0 if it is, 2 if it is not, or
    not yet.

    \b
      reconcile fleet report statuses --html report.html
      reconcile fleet report statuses --model llm:v2 --max-failed 1% --min-nodes 50 --after 2h
      reconcile fleet report s3://my-bucket/statuses/ --json
    """
    from reconciler.commands import read_statuses
    from reconciler.fleet import assess, collect, page
    from reconciler.fleet.register import Register
    from reconciler.store import atomic

    now, register = document_io.now(), Register(keys)
    asked = max_failed is not None or min_nodes is not None or after is not None or bool(models)
    rule = assess.Rule(max_failed=0.01 if max_failed is None else max_failed, min_nodes=min_nodes or 1, after_seconds=after or 0.0)
    found = collect.collect(read_statuses.statuses(place), register, now=now, stale_seconds=stale, network=network)
    report = assess.assess(found, now=now, rule=rule if asked else None, judged=models)
    register.remember(found.seen)
    if html is not None:
        atomic.write(html, page.render(report))
    if as_json:
        document_io.print_json(report)
    else:
        for line in _lines(report):
            document_io.print_line(printable(line))
    return 0 if report.verdict is None or report.verdict.word == "safe" else 2


def _lines(report: FleetReport) -> Iterator[str]:
    from reconciler.core import units
    from reconciler.fleet import page

    sets = units.count(report.active_sets, "active set")
    yield f"{report.network or 'no network'}: {units.count(report.nodes, 'node')}, snapshot {report.snapshot}, {sets}"
    for model in report.models:
        figures = {"serving": model.serving, "failed": model.failed, "silent": model.silent, "waiting": model.waiting}
        figures |= {"incompatible": model.incompatible, "other": model.other}
        yield f"  {model.id}: {', '.join(f'{count} {name}' for name, count in figures.items() if count) or 'no node'}"
        for cause in model.causes[:5]:
            yield f"    {units.count(cause.count, 'node')}: {cause.text} ({', '.join(cause.nodes[:5])}{', …' if cause.count > 5 else ''})"
    for name, meaning in page.LISTS.items():
        listed = getattr(report, name)
        if listed.count:
            yield f"{units.count(listed.count, 'node')} {meaning}: {', '.join(listed.nodes[:5])}{', …' if listed.count > 5 else ''}"
    for reason, count in report.refused.items():
        yield f"{units.count(count, 'file')} count for nothing: {reason}"
    if report.verdict is not None:
        yield page.SENTENCES[report.verdict.word]
        yield from (f"  {reason}" for reason in report.verdict.reasons)


@fleet.command("enroll")
@click.argument("place", metavar="DIR")
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@_KEYS
@click.option("--all", "everybody", is_flag=True, help="Take the key of every node that is not known yet.")
def fleet_enroll(*, place: str, nodes: tuple[str, ...], keys: Path, everybody: bool) -> None:
    """
    Trust the keys that statuses in DIR carry: of these nodes, or of all that are not known yet.

    Each status is signed with the key that it carries, which proves that the sender holds it, and not who the sender is. Use it where
    nobody else can write to DIR, or compare the key ids that it prints. A key that is known is never replaced.

    \b
      reconcile fleet enroll statuses 7f1b0c9e-5a0e-4f43-9f0c-2d7f6f1f8a11
      reconcile fleet enroll statuses --all
    """
    from reconciler.commands import read_statuses
    from reconciler.core.errors import BadSignature, TrustError, UsageError
    from reconciler.fleet import statement
    from reconciler.fleet.register import Register

    if bool(nodes) == everybody:
        raise UsageError("name the nodes, or give --all", hint="see `reconcile fleet enroll --help`")
    from reconciler.core import units

    register, enrolled = Register(keys), 0
    for name, read in read_statuses.statuses(place):
        try:
            found = statement.read(read())
            if (everybody or found.report.node in nodes) and register.enroll(found):
                enrolled += 1
                document_io.print_line(f"{found.report.node}: key id {found.envelope.signatures[0].keyid}")
        except (TrustError, BadSignature, OSError) as error:
            document_io.print_line(printable(f"{name}: left out: {error}"))
    document_io.print_line(f"{units.count(enrolled, 'node')} enrolled in {keys}")
