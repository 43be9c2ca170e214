"""``snapshot``: the commands with which the network's operator says which models there are."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

import click

from reconciler.cli import document_io
from reconciler.cli.document_io import JSON, PASSPHRASE
from reconciler.cli.options import FILE, Size
from reconciler.core import units
from reconciler.core.errors import FetchError, PublishError, UnpackRefused
from reconciler.report.events import escape

if TYPE_CHECKING:
    from reconciler.core.gguf import GgufFacts
    from reconciler.core.snapshot import Artifact, Model, Snapshot, Task, Unpack, Wanted
    from reconciler.publish.artifacts import Measured
    from reconciler.publish.snapshots import Changed, EditResult, SnapshotReport

_ROOT = click.option("--root", "root_file", type=FILE, help="The network's root, to check who may sign and how many must.")
_STATE = click.Choice(["enabled", "disabled", "archived"])
_TASK = click.Choice(["chat", "completion", "embedding"])


@click.group()
def snapshot() -> None:
    """Make, change and sign the snapshot: what a node may hold."""


@snapshot.command("new")
@click.argument("file", type=FILE)
@click.option("--network", required=True, metavar="NAME", help="The network's name, as in its root.")
@click.option(
    "--expires", type=document_io.FutureTime(), default="30d", metavar="TIME", help="How long it lives; each change begins this time anew."
)
@click.option("--version", type=click.IntRange(1), default=1, help="Its first version; higher than any that nodes have seen.")
@click.option("--fallback", multiple=True, metavar="URL", help="Where any blob may be had: https://…/{algorithm}/{hex}.")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test jobs are run again after this time, as in 7d.")
def snapshot_new(*, file: Path, network: str, expires: datetime, version: int, fallback: tuple[str, ...], retest_after: str) -> None:
    """
    Make an empty snapshot, unsigned.

    \b
      reconcile snapshot new snapshot.json --network testnet --expires 30d
    """
    from reconciler.publish import snapshots

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds()))
    data = snapshots.new(network, now=now, lifetime=lifetime, version=version, fallback=fallback, retest_after=retest_after)
    document_io.write(file, data, new=True)
    document_io.print_line(f"wrote {file}, unsigned and empty; next: reconcile snapshot add {file} NAME:VERSION SOURCE")


@snapshot.command("add")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--url", "urls", multiple=True, help="Where nodes fetch it, beside a SOURCE that is a URL; {path}: the file's name.")
@click.option("--path", "paths", multiple=True, help="The file's name in the model's folder, for each SOURCE in turn [default: its own].")
@click.option("--unpack", type=click.Choice(["tar", "tar.gz", "tar.xz", "tar.zst", "zip"]), help="SOURCE is an archive.")
@click.option("--entrypoint", help="The file that the engine is given [default: the only file, or the first GGUF].")
@click.option("--task", "tasks", type=_TASK, multiple=True, help="What it is for [default: what its GGUF header tells].")
@click.option("--engine", default="llama-cpp", help="The engine that loads it.")
@click.option("--engine-version", default="", show_default=False, metavar="SPEC", help="Versions that will do, as in '>=0.3,<0.5'.")
@click.option("--gpu-memory", type=Size(), metavar="SIZE", help="Memory on the GPU [default: an estimate, to be confirmed].")
@click.option("--memory", type=Size(), metavar="SIZE", default=0, help="Main memory; 0: nodes do not ask.")
@click.option("--state", type=_STATE, default="enabled")
@click.option("--prompt", default="Hello", help="The test job's prompt.")
@click.option("--smoke-task", type=_TASK, help="The test job's task [default: the first of the model's].")
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=8, help="The test job generates at most so many.")
@click.option("--expect-text", help="The answer must contain this.")
@click.option("--expect-regex", help="The answer must match this.")
@click.option("--expect-tokens", "min_tokens", type=click.IntRange(0), default=1, help="At least so many tokens must come.")
@click.option("--timeout", default="120s", metavar="TIME", help="The test job's time.")
@click.option("--max-size", type=Size(), default="1TiB", metavar="SIZE", help="Refuse a file that is larger.")
@click.option("--ca-file", type=FILE, help="Authorities for https, instead of the system's.")
def snapshot_add(*, file: Path, model_id: str, sources: tuple[str, ...], max_size: int, ca_file: Path | None, **given: Any) -> None:
    """
    Add a model: each SOURCE, a file or URL, is read whole for its digest and size.

    \b
      reconcile snapshot add snapshot.json tiny:v1 tiny.gguf --url https://models.example.org/tiny.gguf
      reconcile snapshot add snapshot.json tiny:v2 https://models.example.org/tiny-v2.gguf \\
          --prompt "The capital of France is" --expect-regex Paris

    A SOURCE that is a URL is also where nodes fetch it, https only, or http to this very machine. An archive that is a file is read as
    nodes read it, and refused if they would.
    """
    from reconciler.fetch.sources import host_of, is_loopback_name
    from reconciler.publish import snapshots

    data = _read(file)
    _check_not_listed(data, model_id)
    if len(given["paths"]) not in {0, len(sources)}:
        raise PublishError(f"{len(sources)} SOURCEs and {len(given['paths'])} --path", hint="give --path once for each SOURCE, or never")
    measured = [_measured(source, max_size, ca_file) for source in sources]
    told, refusals = _told(sources, measured)
    members = _unpacked(sources, given["unpack"])
    model = _model(model_id, sources, measured, given, told, members)
    _written(file, snapshots.edit(data, lambda found: snapshots.with_model(found, model), now=document_io.now()))
    if not all(artifact.urls for artifact in model.artifacts):
        document_io.warn("it names no --url: nodes have it from the snapshot's --fallback, or from mirrors of their own")
    if given["unpack"] and members is None:
        document_io.warn(f"whether nodes unpack an archive at an address was not looked at; from a file it is. Pack it so: {_PACK}")
    if any(url.startswith("http://") and not is_loopback_name(host_of(url)) for url in given["urls"]):
        document_io.warn("nodes refuse plain http to another machine, unless they set [download] allow_http")
    if any("?" in url for artifact in model.artifacts for url in artifact.urls):
        document_io.warn("a URL carries a query, and everybody reads snapshots: make sure that it is no secret and does not run out")
    for refusal in refusals:
        document_io.warn(f"an engine may refuse this: {escape(refusal)}")
    size = units.human_size(sum(one.size for one in measured))
    document_io.print_line(f"added {model.id}: {size}, {', '.join(model.tasks)}, {_memory(model)}")
    if told:
        parts = f"{told.architecture}, {told.quantisation}, {told.parameters:,} parameters, context {told.context_length:,}"
        document_io.print_line(f"its header tells: {escape(parts)}")
        if given["gpu_memory"] is None:
            document_io.warn(
                "the GPU memory is an estimate: load it on a node, look, and give --gpu-memory (0: a node without a GPU will do)"
            )


def _check_not_listed(data: bytes, model_id: str) -> None:
    """Refuse a duplicate before its bytes are read, which may take an hour."""
    from reconciler.publish import snapshots

    name, colon, version = model_id.partition(":")
    if not (name and colon and version):
        raise PublishError(f"{model_id!r} is no model id", hint="write it as NAME:VERSION, as in mistral-7b-instruct:v1")
    if any(entry.id.casefold() == model_id.casefold() for entry in snapshots.inspect(data).models):
        raise PublishError(f"the snapshot lists {model_id} already", hint="another content is another version, as in NAME:v2")


def _measured(source: str, max_size: int, ca_file: Path | None) -> Measured:
    from reconciler.fetch import http
    from reconciler.publish import artifacts

    if not http.is_url(source):
        path = Path(source)
        size = path.stat().st_size if path.is_file() else 0
        return artifacts.measure(_shown(artifacts.read_chunks(path, max_bytes=max_size), size, source), head_bytes=_HEAD_BYTES)
    with http.opened(source, timeout_seconds=60, ca_file=str(ca_file or "")) as answer:
        if answer.length is None and not answer.chunked:
            raise FetchError(f"{escape(source)} does not say how long it is, so a part could pass for the whole")
        chunks = http.chunks(answer, source, max_bytes=max_size)
        return artifacts.measure(_shown(chunks, answer.length or 0, source), head_bytes=_HEAD_BYTES)


_HEAD_BYTES = 64 << 20  # of a GGUF, what comes before the tensors: vocabularies have tens of megabytes


#: GNU tar's own format, its default, has long names that nodes refuse.
_PACK = "tar --format=ustar --dereference --hard-dereference"


def _unpacked(sources: tuple[str, ...], kind: Unpack | None) -> tuple[str, ...] | None:
    """
    Return the files that nodes will make of the archives *sources*; None where these are no archives, or lie elsewhere.

    Raises:
        UnpackRefused: they would refuse one.
    """
    from reconciler.fetch import http
    from reconciler.unpack import extract

    if kind is None or any(http.is_url(source) for source in sources):
        return None
    found: list[str] = []
    for source in sources:
        try:
            found += extract.list_files(Path(source).resolve(), kind)
        except UnpackRefused as error:
            hint = error.hint or f"pack it again: {_PACK}"
            raise UnpackRefused(f"every node would refuse {source}: {error.message}", hint=hint) from None
    if twice := next((path for path, count in Counter(found).items() if count > 1), None):
        raise UnpackRefused(f"every node would refuse these archives: {twice!r} is in two of them")
    return tuple(found)


def _shown(chunks: Iterator[bytes], size: int, source: str) -> Iterator[bytes]:
    """Pass *chunks* on, with a bar on a terminal."""
    if not sys.stderr.isatty():
        yield from chunks
        return
    bar: Any = click.progressbar(length=size or None, label=escape(source)[-40:], file=sys.stderr)
    with bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _told(sources: tuple[str, ...], measured: list[Measured]) -> tuple[GgufFacts | None, list[str]]:
    """
    Return what the first header that tells anything tells, or what is wrong with all of them. A model in parts has its header in the
    first, and the others count as weights.
    """
    from msgspec.structs import replace

    from reconciler.core import file_type, gguf
    from reconciler.publish import artifacts

    refusals = []
    for source, one in sorted(zip(sources, measured, strict=True), key=lambda pair: pair[0]):
        artifacts.refuse_substitute(source, one)
        try:
            found = artifacts.gguf_facts(one)
        except gguf.Malformed as error:
            refusals.append(f"{source}: {error}")
            continue
        if found:
            others = sum(other.size for other in measured if other is not one and other.head.startswith(gguf.MAGIC))
            return replace(found, gpu_bytes_estimate=found.gpu_bytes_estimate + others * 6 // 5), []
        if _name(source).endswith(".gguf"):
            kind = file_type.identify(one.head, one.size)
            refusals.append(f"{source} is {kind.text}{'; ' if kind.hint else ''}{kind.hint}")
    return None, refusals


def _tasks(told: GgufFacts | None) -> tuple[Task, ...]:
    if told and told.embedding:
        return ("embedding",)
    return ("chat", "completion") if told and told.chat_template else ("completion",)


def _model(
    model_id: str,
    sources: tuple[str, ...],
    measured: list[Measured],
    given: dict[str, Any],
    told: GgufFacts | None,
    members: tuple[str, ...] | None,
) -> Model:
    from reconciler.core.snapshot import Expect, Model, Runtime, Smoke

    artifacts = _artifacts(sources, measured, given)
    files = tuple(one.path for one in artifacts if not one.unpack) if members is None else members
    entrypoint = given["entrypoint"] or _entrypoint(files)
    if members is not None and entrypoint not in members:
        raise PublishError(f"the entrypoint {entrypoint!r} is in no archive", hint=f"they hold: {', '.join(members[:10]) or 'nothing'}")
    tasks: tuple[Task, ...] = tuple(dict.fromkeys(given["tasks"])) or _tasks(told)
    name, _, version = model_id.partition(":")
    task: Task = given["smoke_task"] or tasks[0]
    return Model(
        name=name,
        version=version,
        state=given["state"],
        tasks=tasks,
        runtime=Runtime(engine=given["engine"], version=given["engine_version"]),
        gpu_memory=(told.gpu_bytes_estimate if told else 0) if given["gpu_memory"] is None else given["gpu_memory"],
        memory=given["memory"],
        artifacts=artifacts,
        entrypoint=entrypoint,
        smoke=Smoke(
            task=task,
            prompt=given["prompt"],
            max_tokens=given["max_tokens"],
            expect=Expect(
                text=given["expect_text"],
                regex=given["expect_regex"],
                min_tokens=0 if task == "embedding" else given["min_tokens"],
                dimension=(told.embedding_length or None) if told and task == "embedding" else None,
            ),
            timeout=given["timeout"],
        ),
    )


def _artifacts(sources: tuple[str, ...], measured: list[Measured], given: dict[str, Any]) -> tuple[Artifact, ...]:
    from reconciler.core.snapshot import Artifact
    from reconciler.fetch import http

    if len(sources) > 1 and any("{path}" not in url for url in given["urls"]):
        raise PublishError("one --url for several SOURCEs", hint="write {path} in it where the file's name goes")
    unpack: Unpack | None = given["unpack"]
    made = []
    for index, (source, one) in enumerate(zip(sources, measured, strict=True)):
        path = given["paths"][index] if given["paths"] else _name(source)
        own = (source,) if http.is_url(source) else ()
        urls = (*own, *(url.replace("{path}", path) for url in given["urls"]))
        made.append(Artifact(path=path, digest=one.digest, size=one.size, urls=tuple(dict.fromkeys(urls)), unpack=unpack))
    return tuple(made)


def _name(source: str) -> str:
    return unquote(urlsplit(source).path if "://" in source else source).rstrip("/").rpartition("/")[2]


def _entrypoint(files: tuple[str, ...]) -> str:
    models = [path for path in files if path.endswith(".gguf")]
    if len(files) == 1:
        return files[0]
    if models:
        return min(models)
    raise PublishError("it is not plain which file the engine is given", hint="name it with --entrypoint")


def _memory(model: Model) -> str:
    if not model.gpu_memory:
        return "no GPU memory"
    return f"{units.human_size(model.gpu_memory)} of GPU memory"


@snapshot.command("remove")
@click.argument("file", type=FILE)
@click.argument("ids", nargs=-1, required=True, metavar="NAME:VERSION...")
def snapshot_remove(*, file: Path, ids: tuple[str, ...]) -> None:
    """
    Take models out: nodes stop serving them at once, and delete their bytes after the grace time.

    \b
      reconcile snapshot remove snapshot.json tiny:v1
    """
    from reconciler.publish import snapshots

    def change(found: Snapshot) -> Snapshot:
        for model_id in ids:
            found = snapshots.without_model(found, model_id)
        return found

    _written(file, snapshots.edit(_read(file), change, now=document_io.now()))


@snapshot.command("set-state")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("state", type=_STATE)
def snapshot_set_state(*, file: Path, model_id: str, state: Wanted) -> None:
    """
    Say whether a model is enabled, disabled (kept, not served) or archived (moved to cold storage).

    \b
      reconcile snapshot set-state snapshot.json tiny:v1 archived
    """
    from reconciler.publish import snapshots

    _written(file, snapshots.edit(_read(file), lambda found: snapshots.with_state(found, model_id, state), now=document_io.now()))


@snapshot.command("set")
@click.argument("file", type=FILE)
@click.option("--expires", type=document_io.FutureTime(), metavar="TIME", help="How long it lives from now on.")
@click.option("--fallback", multiple=True, metavar="URL", help="Where any blob may be had; replaces all that are listed.")
@click.option("--retest-after", default="", show_default=False, metavar="TIME", help="Test jobs are run again after this time.")
def snapshot_set(*, file: Path, expires: datetime | None, fallback: tuple[str, ...], retest_after: str) -> None:
    """
    Issue a snapshot anew before it expires, or change what holds for all models.

    \b
      reconcile snapshot set snapshot.json --expires 30d
    """
    from msgspec.structs import replace

    from reconciler.publish import snapshots

    def change(found: Snapshot) -> Snapshot:
        found = replace(found, sources=replace(found.sources, fallback=fallback)) if fallback else found
        return replace(found, retest_after=retest_after) if retest_after else found

    now = document_io.now()
    lifetime = timedelta(seconds=round((expires - now).total_seconds())) if expires else None
    _written(file, snapshots.edit(_read(file), change, now=now, lifetime=lifetime))


def _read(file: Path) -> bytes:
    return document_io.read(file, maker=f"reconcile snapshot new {file} --network NAME")


def _written(file: Path, made: EditResult) -> None:
    document_io.write(file, made.data)
    if made.dropped:
        document_io.warn(f"{len(made.dropped)} signature(s) no longer hold and were dropped: {', '.join(key[:16] for key in made.dropped)}")
    document_io.print_line(f"wrote {file}: snapshot {made.version}, unsigned")


@snapshot.command("sign")
@click.argument("file", type=FILE)
@document_io.KEY
@_ROOT
@PASSPHRASE
def snapshot_sign(*, file: Path, key_file: Path, root_file: Path | None, passphrase_file: Path | None) -> None:
    """
    Add your signature; the others' stay. Look at the snapshot first: `inspect`, and `diff` against the last one.

    \b
      reconcile snapshot sign snapshot.json --key ci.key --root root.json
    """
    from reconciler.publish import snapshots

    trusted = document_io.load_root(root_file)
    data, key = _read(file), document_io.private_key(key_file, passphrase_file)
    _signed(file, snapshots.sign(data, key, now=document_io.now(), root=trusted), root_file)


@snapshot.command("attach")
@click.argument("file", type=FILE)
@document_io.SIGNER
@document_io.SIGNATURE
@_ROOT
def snapshot_attach(*, file: Path, key_file: Path, signature: Path, root_file: Path | None) -> None:
    """
    Add a signature that was made elsewhere over the bytes of `reconcile snapshot pae`.

    \b
      reconcile snapshot pae snapshot.json > to-sign
      openssl pkeyutl -sign -rawin -inkey ci.key -in to-sign -out sig
      reconcile snapshot attach snapshot.json --key ci.pub --signature sig
    """
    from reconciler.publish import snapshots

    data, key, trusted = _read(file), document_io.public_key(key_file), document_io.load_root(root_file)
    _signed(file, snapshots.attach(data, key, document_io.read_signature(signature), now=document_io.now(), root=trusted), root_file)


def _signed(file: Path, data: bytes, root_file: Path | None) -> None:
    from reconciler.publish import snapshots

    document_io.write(file, data)
    found = snapshots.inspect(data, root=document_io.load_root(root_file))
    document_io.print_line(f"signed {file}: snapshot {found.version} of {found.network}, {len(found.models)} model(s), {found.digest}")
    document_io.print_line(_standing(found))


def _standing(found: SnapshotReport) -> str:
    if found.missing < 0:
        return f"{len(found.signatures)} signature(s); --root FILE tells whether that is enough"
    return "complete: nodes take it" if found.missing == 0 else f"incomplete: it lacks {found.missing} signature(s)"


def _pae(file: Path) -> bytes:
    from reconciler.publish import snapshots

    return snapshots.pae(_read(file))


snapshot.add_command(document_io.pae_command(_pae))


@snapshot.command("inspect")
@click.argument("file", type=FILE)
@_ROOT
@JSON
def snapshot_inspect(*, file: Path, root_file: Path | None, as_json: bool) -> None:
    """
    Show a snapshot, signed or not; with --root, whose signatures hold.

    \b
      reconcile snapshot inspect snapshot.json --root root.json
    """
    from reconciler.publish import snapshots

    found = snapshots.inspect(_read(file), root=document_io.load_root(root_file))
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(f"snapshot {found.version} of {found.network}, {found.digest}")
    document_io.print_line(f"issued {units.rfc3339(found.issued_at)}, until {units.rfc3339(found.expires_at)}")
    for model in found.models:
        document_io.print_line(
            f"  {model.id:<40} {model.state:<9} {units.human_size(model.bytes):>10}  {', '.join(model.tasks)}  {model.engine}"
        )
    document_io.print_line(f"{len(found.models)} model(s), {units.human_size(found.bytes)} in all")
    if found.other_fields:
        document_io.print_line(f"further fields: {escape(', '.join(found.other_fields))}")
    for one in found.signatures:
        held = {True: "valid", False: "NOT VALID, or not a key of the root", None: "not checked"}[one.valid]
        document_io.print_line(f"signed by {escape(one.keyid)} ({held})")
    document_io.print_line(_standing(found))


@snapshot.command("diff")
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@JSON
def snapshot_diff(*, before: Path, after: Path, as_json: bool) -> None:
    """
    Show what changed between two snapshots, signed or not.

    \b
      reconcile snapshot diff published.json snapshot.json
    """
    from reconciler.publish import snapshots

    found = snapshots.diff(_read(before), _read(after))
    if as_json:
        document_io.print_json(found)
        return
    document_io.print_line(f"snapshot {found.before} -> {found.after}")
    for sign, ids in (("+", found.added), ("-", found.removed)):
        for model_id in ids:
            document_io.print_line(f"{sign} {model_id}")
    for change in found.changed:
        document_io.print_line(f"~ {_place(change)}: {_value(change.before)} -> {_value(change.after)}")
    if not (found.added or found.removed or found.changed):
        document_io.print_line("the same models and settings")


def _place(change: Changed) -> str:
    return escape(f"{change.id} {change.field}" if change.id else change.field)


def _value(value: object) -> str:
    return escape(json.dumps(cast("Any", value), ensure_ascii=False))
