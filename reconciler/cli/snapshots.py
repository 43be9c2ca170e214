"""``snapshot``: the commands with which the network's operator decides which models nodes hold."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io, snapshot_edit, snapshot_review, snapshot_test
from reconciler.cli.options import FILE, MODEL_STATE, Part
from reconciler.cli.snapshot_add import snapshot_add
from reconciler.cli.swarm import snapshot_swarm
from reconciler.core import units
from reconciler.core.errors import UsageError

if TYPE_CHECKING:
    from reconciler.core.snapshot import Snapshot
    from reconciler.core.vocabulary import KnownState

_LIFETIME = timedelta(days=30)


@click.group()
def snapshot() -> None:
    """Make, change and sign the snapshot: the list of models that nodes hold."""


@snapshot.command("new")
@click.argument("file", type=FILE)
@click.option("--network", default="", show_default=False, metavar="NAME", help="Its network, as in the root [default: that of OLD].")
@click.option("--from", "old", type=FILE, metavar="OLD", help="Begin with all that this snapshot has, signed or not; it stays as it is.")
@click.option(
    "--expires",
    type=document_io.FutureTime(),
    metavar="TIME",
    help="When it expires. Each later change renews it for the same time [default: 30d, or as long as OLD].",
)
@click.option(
    "--version", type=click.IntRange(1), help="Its version: higher than any that nodes have seen [default: 1, or the one after OLD's]."
)
@click.option("--fallback", multiple=True, metavar="URL", help="A mirror of all blobs: https://…/{algorithm}/{hex} (may be repeated).")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test models again after this time, e.g. 7d.")
def snapshot_new(
    *, file: Path, network: str, old: Path | None, expires: datetime | None, version: int | None, fallback: tuple[str, ...],
    retest_after: str,
) -> None:  # fmt: skip
    """
    Make a snapshot, unsigned: empty, or with all that another has.

    \b
      reconcile snapshot new snapshot.json --network testnet --expires 30d
      reconcile snapshot new snapshot.json --from published.json
      reconcile snapshot new staging.json --from published.json --network staging
    """
    from reconciler.publish import snapshots

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds())) if expires else None
    if old is not None:
        made = snapshots.new_from(document_io.read_snapshot(old), now=now, network=network, version=version or 0, lifetime=lifetime)
        if fallback or retest_after:
            made = snapshots.edit(made.data, lambda found: _with_common(found, fallback, retest_after), now=now)
        document_io.write(file, made.data, new=True)
        found = snapshots.open_(made.data)
        models = units.count(len(found.models), "model")
        document_io.print_line(f"wrote {file}, unsigned: snapshot {found.version} of {found.network}, {models} from {old}")
        return
    if not network:
        raise UsageError("the network is not named", hint="give --network NAME, or --from OLD")
    data = snapshots.new(
        network, now=now, lifetime=lifetime or _LIFETIME, version=version or 1, fallback=fallback, retest_after=retest_after
    )
    document_io.write(file, data, new=True)
    document_io.print_line(f"wrote {file}, unsigned and empty; next: reconcile snapshot add {file} NAME:VERSION SOURCE")


def _with_common(found: Snapshot, fallback: tuple[str, ...], retest_after: str) -> Snapshot:
    """Return *found* with what applies to all models, where it is given."""
    from msgspec.structs import replace

    found = replace(found, sources=replace(found.sources, fallback=fallback)) if fallback else found
    return replace(found, retest_after=retest_after) if retest_after else found


snapshot.add_command(snapshot_add)


@snapshot.command("remove")
@click.argument("file", type=FILE)
@click.argument("ids", nargs=-1, required=True, metavar="NAME:VERSION...")
def snapshot_remove(*, file: Path, ids: tuple[str, ...]) -> None:
    """
    Remove models. Nodes stop serving them at once, and delete their bytes after the grace period.

    To replace a version without an outage, add the next one: the old version then serves until the new one is active.

    \b
      reconcile snapshot remove snapshot.json tiny:v1
    """
    from reconciler.publish import snapshots

    def change(found: Snapshot) -> Snapshot:
        for model_id in ids:
            found = snapshots.without_model(found, model_id)
        return found

    _write_with_stops(file, document_io.read_snapshot(file), change)


def _write_with_stops(file: Path, data: bytes, change: Callable[[Snapshot], Snapshot]) -> None:
    """Write the changed snapshot, and say which models every node stops serving at once."""
    from reconciler.publish import differences, snapshots

    made = snapshots.edit(data, change, now=document_io.now())
    for model_id in differences.diff(data, made.data).stopped:
        document_io.note(f"{model_id} stops serving at once on every node")
    document_io.write_snapshot(file, made)


@snapshot.command("set-state")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("state", type=MODEL_STATE)
def snapshot_set_state(*, file: Path, model_id: str, state: KnownState) -> None:
    """
    Set a model's state: enabled, disabled (kept, not served), archived (moved to cold storage) or retired.

    A retired model serves where it is active until a model that replaces it is active there; it is not installed on new nodes.

    \b
      reconcile snapshot set-state snapshot.json tiny:v1 archived
    """
    from reconciler.publish import snapshots

    data = document_io.read_snapshot(file)
    _write_with_stops(file, data, lambda found: snapshots.with_state(found, model_id, state))


@snapshot.command("set")
@click.argument("file", type=FILE)
@click.option("--expires", type=document_io.FutureTime(), metavar="TIME", help="When it expires, from now on.")
@click.option("--fallback", multiple=True, metavar="URL", help="A mirror of all blobs (may be repeated); replaces those that are listed.")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test models again after this time.")
def snapshot_set(*, file: Path, expires: datetime | None, fallback: tuple[str, ...], retest_after: str) -> None:
    """
    Renew a snapshot before it expires, or change what applies to all models.

    \b
      reconcile snapshot set snapshot.json --expires 30d
    """
    from reconciler.publish import snapshots

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds())) if expires else None
    data = document_io.read_snapshot(file)
    made = snapshots.edit(data, lambda found: _with_common(found, fallback, retest_after), now=now, lifetime=lifetime)
    document_io.write_snapshot(file, made)


@snapshot.command("rollout")
@click.argument("file", type=FILE)
@click.argument("name")
@click.option("--model", "models", multiple=True, metavar="NAME:VERSION", help="A model of the rollout (may be repeated).")
@click.option("--share", type=Part(), metavar="PART", help="The share of all nodes that get its models, e.g. 1%. 0%: only the cohorts.")
@click.option(
    "--cohort", "cohorts", multiple=True, help="A group of nodes that gets them too (may be repeated). Replaces the cohorts named before."
)
@click.option("--no-cohorts", is_flag=True, help="Remove all cohorts.")
@click.option("--end", is_flag=True, help="End the rollout: every node gets its models.")
def snapshot_rollout(
    *, file: Path, name: str, models: tuple[str, ...], share: int | None, cohorts: tuple[str, ...], no_cohorts: bool, end: bool
) -> None:
    """
    Give models to some nodes first. The others keep what these models replace.

    \b
      reconcile snapshot rollout snapshot.json 2026-12 --model tiny:v2 --share 1% --cohort canary
      reconcile snapshot rollout snapshot.json 2026-12 --share 25%
      reconcile snapshot rollout snapshot.json 2026-12 --end

    A node that has the models keeps them in every wider step. To take them back, go to 0%: what they replace serves again.
    """
    from reconciler.publish import edits

    def change(found: Snapshot) -> Snapshot:
        if end:
            return edits.without_rollout(found, name)
        named = () if no_cohorts else cohorts or None
        return edits.with_rollout(found, name, models=models, per_10000=share, cohorts=named)

    _write_with_stops(file, document_io.read_snapshot(file), change)


for _command in (
    snapshot_test.snapshot_test, snapshot_test.snapshot_push, snapshot_edit.snapshot_edit, snapshot_edit.snapshot_lint,
    snapshot_review.snapshot_sign, snapshot_review.snapshot_attach, snapshot_review.snapshot_pae, snapshot_review.snapshot_inspect,
    snapshot_review.snapshot_diff, snapshot_review.snapshot_export, snapshot_swarm,
):  # fmt: skip
    snapshot.add_command(_command)
