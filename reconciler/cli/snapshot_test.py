"""``snapshot test`` runs the test job of a listed model before a network signs; ``snapshot push`` puts what was signed into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON
from reconciler.cli.options import FILE
from reconciler.core import units
from reconciler.core.errors import PublishError
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.core.snapshot import Answer, Model, Snapshot
    from reconciler.ports import TestReport
    from reconciler.settings import Settings


@click.command("test")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[FOLDER|FILE]...")
@click.option("--record", is_flag=True, help="Write the answer of this machine into the snapshot; every node compares its own with it.")
@click.option("--settings", "settings_file", type=FILE, help="A reconcile.toml whose [runtime] and [download] are used.")
@JSON
def snapshot_test(*, file: Path, model_id: str, sources: tuple[Path, ...], record: bool, settings_file: Path | None, as_json: bool) -> None:
    """
    Run the test job of a listed model on this machine, in the sandbox that nodes use. Exit code 1 if it does not pass.

    \b
      reconcile snapshot test snapshot.json tiny:v1 ./models
      reconcile snapshot test snapshot.json tiny:v1 --record

    Its files are taken from a folder, or named, or fetched from where nodes would fetch them; each is hashed first. With --record, an
    answer is recorded that nodes compare: greedy tokens, or an embedding.
    """
    from reconciler.commands import run_test_job
    from reconciler.commands.context import from_settings
    from reconciler.publish import snapshots

    data = document_io.read_snapshot(file)
    found = snapshots.open_(data)
    model = snapshots.listed(found, model_id)
    node = from_settings(_settings(settings_file))
    with run_test_job.files_of(found, model, sources, node.download) as files:
        report = run_test_job.run(model, files, runtimes=node.runtimes, record=record)
    if as_json:
        document_io.print_json(report)
    else:
        _print(model_id, report)
    if report.verdict != "passed":
        raise click.exceptions.Exit(1)
    if record:
        _record(file, data, model, report)


def _settings(path: Path | None) -> Settings:
    from reconciler import settings_file
    from reconciler.settings import Settings

    if path is None:
        return Settings(base=str(Path.cwd()))
    return settings_file.decode(document_io.read(path), path.absolute().parent, str(path))


def _print(model_id: str, report: TestReport) -> None:
    verdict = {"passed": "passes", "bad": "is bad", "unable": "could not be tested here"}[report.verdict]
    document_io.print_line(f"{model_id} {verdict}{': ' if report.reason else ''}{printable(report.reason)}")
    on = f"{report.engine} {report.engine_version} on {report.device or 'cpu'}, in {report.sandbox or 'no sandbox'}".strip()
    document_io.print_line(f"{printable(on)}: loaded in {report.load_seconds:.1f} s, {report.tokens} tokens in {report.run_seconds:.1f} s")
    if report.compared:
        document_io.print_line(f"it computes what is recorded, compared at {units.count(report.compared, 'position')}")
    if report.text:
        document_io.print_line(f"answer: {printable(report.text, 500)}")


def answer_in_words(found: Answer) -> str:
    """Return what was recorded, in words."""
    if found.embedding:
        return f"an embedding of {len(found.embedding):,} components, cosine at least {found.cosine}"
    by = f"by {found.margin} logits or more" if found.margin else "by far"
    return f"{units.count(len(found.tokens), 'token')}, of which {len(found.sure)} are compared: there the first choice leads {by}"


def _record(file: Path, data: bytes, model: Model, report: TestReport) -> None:
    from msgspec import UNSET

    from reconciler.publish import edits, snapshots

    if report.answer is UNSET:
        raise PublishError("nothing was recorded: this engine gives no answer that nodes can compare")
    answer = report.answer
    document_io.print_line(f"recorded: {answer_in_words(answer)}")
    made = snapshots.edit(
        data,
        lambda found: snapshots.with_edit(found, model.id, lambda one: edits.with_values(one, {"smoke.expect.answer": answer})),
        now=document_io.now(),
    )
    document_io.write_snapshot(file, made)


@click.command("push")
@click.argument("file", type=FILE)
@click.argument("target", metavar="oci://REGISTRY/REPOSITORY:TAG")
@click.option(
    "--files",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A folder with the models' files, to be pushed too (may be repeated).",
)
@click.option("--root", "root_file", type=FILE, help="The network's root: refuse a snapshot that nodes would refuse.")
def snapshot_push(*, file: Path, target: str, folders: tuple[Path, ...], root_file: Path | None) -> None:
    """
    Put a signed snapshot into an OCI registry, and with --files its models' files. Logins are those of `docker login` and `oras login`.

    \b
      reconcile snapshot push snapshot.json oci://registry.example.org/models:stable --root root.json --files ./models

    Nodes read it with snapshot = "oci://…" in [network]. Files of all models are found in the folders by their digests; name the template
    that is printed as the snapshot's --fallback, so that nodes fetch them from there.
    """
    from reconciler.commands import read_source
    from reconciler.publish import push, snapshots
    from reconciler.publish.sources import registry

    data = document_io.read_snapshot(file)
    report = snapshots.inspect(data, root=document_io.load_root(root_file))
    if not report.signatures or report.missing > 0:
        raise PublishError(
            f"snapshot {report.version} is not signed by enough keys",
            hint="nodes would refuse it: `reconcile snapshot sign FILE --key KEY` adds a signature",
        )
    reference = registry.parse(target)
    if reference.digest or not reference.tag:
        raise PublishError(f"{target} names no tag", hint="nodes look for the newest snapshot under a tag, as in :stable")
    files = _by_digest(snapshots.open_(data), folders)
    push.push(reference, file, files, read_source.registry_login(reference.registry))
    document_io.print_line(f"pushed snapshot {report.version} and {units.count(len(files), 'file')} to {target}")
    if files:
        document_io.print_line(f"nodes find the files with: reconcile snapshot set {file} --fallback '{push.template(reference)}'")


def _by_digest(found: Snapshot, folders: tuple[Path, ...]) -> dict[str, Path]:
    """Return the files below *folders* that *found* lists, by model and path; each blob once."""
    from reconciler.publish import artifacts

    wanted = {artifact.digest: f"{model.id}/{artifact.path}" for model in found.models for artifact in model.artifacts}
    sizes = {artifact.size for model in found.models for artifact in model.artifacts}
    here: dict[str, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        if path.stat().st_size in sizes:
            measured = artifacts.measure(artifacts.read_chunks(path, max_bytes=2 << 40), may_be_empty=True)
            if measured.digest in wanted:
                here.setdefault(wanted[measured.digest], path)
    return here
