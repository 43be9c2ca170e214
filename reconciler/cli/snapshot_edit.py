"""``snapshot edit`` corrects a listed model; ``snapshot lint`` says what is probably wrong with a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON
from reconciler.cli.options import FILE, MODEL_STATE, Size, token_ids
from reconciler.core.errors import UsageError
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.core.snapshot import Model, Snapshot

_TASK = click.Choice(["chat", "completion", "embedding"])
#: Options by the place that they set.
_PLACES = {
    "tasks": "tasks", "state": "state", "replaces": "replaces", "requires": "requires", "engine": "runtime.engine",
    "engine_version": "runtime.version", "gpu_memory": "gpu_memory", "memory": "memory", "entrypoint": "entrypoint",
    "prompt": "smoke.prompt",
    "smoke_task": "smoke.task", "max_tokens": "smoke.max_tokens", "seed": "smoke.seed", "timeout": "smoke.timeout",
    "expect_text": "smoke.expect.text", "expect_regex": "smoke.expect.regex", "min_tokens": "smoke.expect.min_tokens",
    "min_rate": "smoke.expect.min_rate", "dimension": "smoke.expect.dimension", "tokens": "smoke.expect.tokens",
}  # fmt: skip


@click.command("edit")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.option("--task", "tasks", type=_TASK, multiple=True, help="Its tasks (may be repeated).")
@click.option("--state", type=MODEL_STATE, help="What nodes do with it.")
@click.option("--replaces", multiple=True, metavar="ID", help="The models that it replaces (may be repeated).")
@click.option("--requires", multiple=True, metavar="WORD", help="A feature that a reader must know (may be repeated).")
@click.option("--engine", help="The engine that loads it.")
@click.option("--engine-version", metavar="SPEC", help="Versions of the engine that can run it.")
@click.option("--gpu-memory", type=Size(), metavar="SIZE", help="GPU memory that it needs.")
@click.option("--memory", type=Size(), metavar="SIZE", help="Main memory that it needs.")
@click.option("--entrypoint", help="The file that the engine loads.")
@click.option(
    "--url", "urls", multiple=True, help="Where nodes download its files from, in place of what is listed; {path}: the file's path."
)
@click.option("--prompt", help="The test job's prompt.")
@click.option("--smoke-task", type=_TASK, help="The test job's task.")
@click.option("--max-tokens", type=click.IntRange(1, 4096), help="The most tokens that the test job generates.")
@click.option("--seed", type=click.IntRange(0), help="The seed of the test job's random numbers.")
@click.option("--timeout", metavar="TIME", help="The longest time that the test job may take.")
@click.option("--expect-text", help="The answer must contain this text.")
@click.option("--expect-regex", help="The answer must match this regular expression.")
@click.option("--expect-tokens", "min_tokens", type=click.IntRange(0), help="The fewest tokens that the answer must have.")
@click.option("--expect-token-ids", "tokens", metavar="N,N,…", help="The answer must be exactly these tokens.")
@click.option("--min-rate", type=click.IntRange(0), help="The fewest tokens a second.")
@click.option("--dimension", type=click.IntRange(1), help="How many components an embedding has.")
@click.option(
    "--set", "values", multiple=True, metavar="PLACE=JSON", help="Any other field, as `inspect --full` shows it (may be repeated)."
)
@click.option("--unset", "removed", multiple=True, metavar="PLACE", help="Set a field back to its default (may be repeated).")
def snapshot_edit(
    *, file: Path, model_id: str, values: tuple[str, ...], removed: tuple[str, ...], urls: tuple[str, ...], **given: Any
) -> None:
    """
    Correct a listed model. Its content stays: other files are another version.

    \b
      reconcile snapshot edit snapshot.json tiny:v1 --gpu-memory 2GiB --expect-regex Paris
      reconcile snapshot edit snapshot.json tiny:v1 --url 'https://models.example.org/tiny/{path}'
      reconcile snapshot edit snapshot.json tiny:v1 --set 'artifacts[tiny.gguf].role="model"' --unset smoke.expect.text
    """
    from reconciler.publish import differences, edits, snapshots

    if given["tokens"]:
        given["tokens"] = token_ids(given["tokens"])
    chosen = {_PLACES[name]: value for name, value in given.items() if value not in (None, ())} | dict(map(_assignment, values))
    if not (chosen or removed or urls):
        raise UsageError("nothing to change is given", hint="`reconcile snapshot edit --help` lists the options")

    def change(model: Model) -> Model:
        places = (
            {f"artifacts[{one.path}].urls": [url.replace("{path}", one.path) for url in urls] for one in model.artifacts} if urls else {}
        )
        return edits.with_values(model, places | chosen, removed)

    data = document_io.read_snapshot(file)
    made = snapshots.edit(data, lambda found: snapshots.with_edit(found, model_id, change), now=document_io.now())
    found = differences.diff(data, made.data)
    for sentence in found.summary:
        document_io.note(printable(sentence))
    document_io.write_snapshot(file, made)
    if not found.changed:
        document_io.note(f"{model_id} was so already")


def _assignment(text: str) -> tuple[str, Any]:
    place, equals, value = text.partition("=")
    try:
        return place.strip(), msgspec.json.decode(value if equals else "")
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{text[:200]!r} is not PLACE=JSON: {error}", hint="""a text has quotes, as in --set 'smoke.prompt="Hello"'"""
        ) from None


@click.command("lint")
@click.argument("file", type=FILE)
@click.option(
    "--node",
    "nodes",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Warn of models that fit on no node of these profiles; of a folder, of each *.toml in it (may be repeated).",
)
@click.option("--online", is_flag=True, help="Ask each URL for its first bytes, and read the header of the model.")
@click.option("--digests", is_flag=True, help="Read each URL to its end and compare the digest.")
@click.option("--strict", is_flag=True, help="Exit 1 for warnings too.")
@click.option("--ca-file", type=FILE, help="Certificate authorities for https, instead of the system's.")
@JSON
def snapshot_lint(
    *, file: Path, nodes: tuple[Path, ...], online: bool, digests: bool, strict: bool, ca_file: Path | None, as_json: bool
) -> None:
    """
    Warn of probable mistakes in a snapshot that nodes would accept. Changes nothing; exit code 1 if there is an error.

    \b
      reconcile snapshot lint snapshot.json --online
    """
    from reconciler.commands import profiles
    from reconciler.publish import lint, snapshots

    found = snapshots.open_(document_io.read_snapshot(file))
    findings = list(lint.lint(found, nodes=[profiles.read(path).facts for place in nodes for path in profiles.files(place)]))
    if online or digests:
        findings += _online(found, digests=digests, ca_file=str(ca_file or ""))
    if as_json:
        document_io.print_json(findings)
    else:
        for one in findings:
            document_io.print_line(f"{one.level}: {printable(f'{one.id}: ' if one.id else '')}{printable(one.text)}")
            if one.hint:
                document_io.print_line(f"  hint: {printable(one.hint)}")
        if not findings:
            document_io.print_line("nothing found")
    if any(one.level == "error" or strict for one in findings):
        raise click.exceptions.Exit(1)


def _online(found: Snapshot, *, digests: bool, ca_file: str) -> list[Any]:
    from reconciler.commands import read_source
    from reconciler.publish import lint

    reader = read_source.SourceReader(ca_file=ca_file)
    return list(lint.online(found, reader.refusal, reader.digest if digests else None, reader.gguf_header))
