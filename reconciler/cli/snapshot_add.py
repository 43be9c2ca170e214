"""``snapshot add``: a model file or archive is measured, its header read, and the model written to the snapshot."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import click

from reconciler.cli import document_io
from reconciler.cli.options import FILE, MODEL_STATE, Size
from reconciler.core import units
from reconciler.core.errors import FetchError, PublishError, UnpackRefused
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.core.gguf import GgufFacts
    from reconciler.core.snapshot import Answer, Artifact, Model, Snapshot
    from reconciler.core.vocabulary import KnownTask, KnownUnpack
    from reconciler.publish.artifacts import Measured

_TASK = click.Choice(["chat", "completion", "embedding"])


@click.command("add")
@click.argument("file", type=FILE)
@click.argument("model_id", metavar="NAME:VERSION")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--url",
    "urls",
    multiple=True,
    help="A URL from which nodes download it, in addition to a SOURCE that is a URL; {path}: the file's name (may be repeated).",
)
@click.option(
    "--path", "paths", multiple=True, help="The file's name in the model's folder, once for each SOURCE, in order [default: its own name]."
)
@click.option("--unpack", type=click.Choice(["tar", "tar.gz", "tar.xz", "tar.zst", "zip"]), help="SOURCE is an archive.")
@click.option(
    "--role",
    "roles",
    multiple=True,
    metavar="NAME=ROLE",
    help="What the file NAME is for, e.g. small.gguf=draft (may be repeated) [default: from its GGUF header, or its name].",
)
@click.option("--entrypoint", help="The file that the engine loads [default: the only file, or the first GGUF].")
@click.option("--task", "tasks", type=_TASK, multiple=True, help="A task of the model (may be repeated) [default: from its GGUF header].")
@click.option("--engine", default="llama-cpp", help="The engine that loads it.")
@click.option(
    "--engine-version", default="", show_default=False, metavar="SPEC", help="Versions of the engine that can run it, e.g. '>=0.3,<0.5'."
)
@click.option("--gpu-memory", type=Size(), metavar="SIZE", help="GPU memory that it needs [default: an estimate, to be confirmed].")
@click.option("--memory", type=Size(), metavar="SIZE", default=0, help="Main memory that it needs; 0: nodes do not check.")
@click.option("--state", type=MODEL_STATE, default="enabled")
@click.option("--replaces", multiple=True, metavar="ID", help="A model that it replaces [default: the other enabled version of NAME].")
@click.option("--beside", is_flag=True, help="Keep the other enabled versions of NAME, too.")
@click.option("--prompt", default="Hello", help="The test job's prompt.")
@click.option("--smoke-task", type=_TASK, help="The test job's task [default: the first of the model's].")
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=8, help="The most tokens that the test job generates.")
@click.option("--expect-text", help="The answer must contain this text.")
@click.option("--expect-regex", help="The answer must match this regular expression.")
@click.option("--expect-tokens", "min_tokens", type=click.IntRange(0), default=1, help="The fewest tokens that the answer must have.")
@click.option(
    "--record-answer", is_flag=True, help="Run the test job here, and let every node compare what it computes with what this machine did."
)
@click.option("--timeout", default="120s", metavar="TIME", help="The longest time that the test job may take.")
@click.option("--max-size", type=Size(), default="1TiB", metavar="SIZE", help="Refuse a file that is larger.")
@click.option("--ca-file", type=FILE, help="Certificate authorities for https, instead of the system's.")
def snapshot_add(*, file: Path, model_id: str, sources: tuple[str, ...], max_size: int, ca_file: Path | None, **given: Any) -> None:
    """
    Add a model. Each SOURCE, a file or URL, is read completely to compute its digest and size.

    \b
      reconcile snapshot add snapshot.json tiny:v1 tiny.gguf --url https://models.example.org/tiny.gguf
      reconcile snapshot add snapshot.json tiny:v2 https://models.example.org/tiny-v2.gguf \\
          --prompt "The capital of France is" --expect-regex Paris

    The other enabled version of NAME is retired: each node serves it until the new one is active there, and both change in one swap.

    Nodes download a SOURCE that is a URL from there; it must be https, or http to this machine. An archive that is a file is checked as
    nodes check it.
    """
    data = document_io.read_snapshot(file)
    _check_not_listed(data, model_id)
    if len(given["paths"]) not in {0, len(sources)}:
        raise PublishError(
            f"{len(sources)} SOURCEs and {len(given['paths'])} --path", hint="give --path once for each SOURCE, or not at all"
        )
    alone = len(sources) == 1 or bool(given["unpack"])
    measured = [_measure(source, max_size, ca_file, alone=alone) for source in sources]
    headers, refusals = _read_headers(sources, measured)
    members = _archive_members(sources, given["unpack"])
    model, facts = _model(model_id, sources, measured, given, headers, members)
    if given["record_answer"]:
        model = _with_recorded_answer(model, sources)
    replaced = _write_update(file, data, model, beside=given["beside"])
    _print_notes(model, given, members, refusals)
    size = units.human_size(sum(one.size for one in measured))
    document_io.print_line(f"added {model.id}: {size}, {', '.join(model.tasks)}, {_memory(model)}")
    if shown := [f"{printable(one.path)} {one.role}" for one in model.artifacts if one.role]:
        document_io.print_line(f"roles: {', '.join(shown)}")
    for old in replaced:
        document_io.print_line(f"{model.id} replaces {old}, which is retired: each node serves it until {model.id} is active there")
    if facts:
        parts = f"{facts.architecture}, {facts.quantisation}, {facts.parameters:,} parameters, context {facts.context_length:,}"
        document_io.print_line(f"GGUF header: {printable(parts)}")
        if given["gpu_memory"] is None:
            document_io.note("the GPU memory is an estimate: measure it on a node, and give --gpu-memory (0: it needs no GPU)")


def _with_recorded_answer(model: Model, sources: tuple[str, ...]) -> Model:
    """Return *model* with what its test job computes here as what it must compute on every node."""
    from msgspec.structs import replace

    from reconciler.commands import record_answer
    from reconciler.fetch import http

    if any(artifact.unpack for artifact in model.artifacts) or any(http.is_url(source) for source in sources):
        raise PublishError("--record-answer needs the model's files on this machine, unpacked", hint="give files as SOURCE")
    found = record_answer.record(model, dict(zip((one.path for one in model.artifacts), map(Path, sources), strict=True)))
    document_io.print_line(f"recorded: {_answer_in_words(found)}")
    return replace(model, smoke=replace(model.smoke, expect=replace(model.smoke.expect, answer=found)))


def _answer_in_words(found: Answer) -> str:
    if found.embedding:
        return f"an embedding of {len(found.embedding):,} components, cosine at least {found.cosine}"
    return f"{units.count(len(found.tokens), 'token')}, of which {len(found.sure)} are compared: there the first choice leads by far"


def _print_notes(model: Model, given: dict[str, Any], members: tuple[str, ...] | None, refusals: list[str]) -> None:
    """Print what nodes may make of *model* that its publisher may not expect."""
    from reconciler.fetch.sources import host_of, is_loopback_name

    if not all(artifact.urls for artifact in model.artifacts):
        document_io.note("no --url is given: nodes download it from the snapshot's --fallback, or from their own mirrors")
    if given["unpack"] and members is None:
        document_io.note(f"an archive at a URL is not checked, one in a file is. Pack it with: {_PACK}")
    if any(url.startswith("http://") and not is_loopback_name(host_of(url)) for url in given["urls"]):
        document_io.note("nodes refuse plain http to another machine, unless they set [download] allow_http")
    if any("?" in url for artifact in model.artifacts for url in artifact.urls):
        document_io.note("a URL has a query, and snapshots are public: make sure that it is not a secret and does not expire")
    for refusal in refusals:
        document_io.note(f"an engine may refuse this file: {printable(refusal)}")


def _write_update(file: Path, data: bytes, model: Model, *, beside: bool) -> tuple[str, ...]:
    """Write the snapshot with *model* in it; return the ids that it replaces."""
    from reconciler.publish import snapshots

    replaced: tuple[str, ...] = ()

    def change(found: Snapshot) -> Snapshot:
        nonlocal replaced
        if beside or model.state != "enabled":
            return snapshots.with_model(found, model)
        made, replaced = snapshots.with_update(found, model)
        return made

    document_io.write_snapshot(file, snapshots.edit(data, change, now=document_io.now()))
    return replaced


def _check_not_listed(data: bytes, model_id: str) -> None:
    """Refuse a duplicate before the sources are read, which may take an hour."""
    from reconciler.publish import snapshots

    name, colon, version = model_id.partition(":")
    if not (name and colon and version):
        raise PublishError(f"{model_id!r} is not a model id", hint="write NAME:VERSION, e.g. mistral-7b-instruct:v1")
    if any(entry.id.casefold() == model_id.casefold() for entry in snapshots.inspect(data).models):
        raise PublishError(f"the snapshot lists {model_id} already", hint="new content needs a new version, e.g. NAME:v2")


def _measure(source: str, max_size: int, ca_file: Path | None, *, alone: bool) -> Measured:
    from reconciler.fetch import http
    from reconciler.publish import artifacts

    if not http.is_url(source):
        path = Path(source)
        size = path.stat().st_size if path.is_file() else 0
        chunks = _with_progress(artifacts.read_chunks(path, max_bytes=max_size), size, source)
        return artifacts.measure(chunks, head_bytes=_HEAD_BYTES, may_be_empty=not alone)
    with http.opened(source, timeout_seconds=60, ca_file=str(ca_file or "")) as answer:
        if answer.length is None and not answer.chunked:
            raise FetchError(f"{printable(source)} does not state its length, so an incomplete download would not be noticed")
        chunks = http.chunks(answer, source, max_bytes=max_size)
        chunks = _with_progress(chunks, answer.length or 0, source)
        return artifacts.measure(chunks, head_bytes=_HEAD_BYTES, may_be_empty=not alone)


_HEAD_BYTES = 64 << 20  # enough for what precedes the tensors of a GGUF file: vocabularies have tens of megabytes


#: Not GNU tar's default format, whose long names nodes refuse.
_PACK = "tar --format=ustar --dereference --hard-dereference"


def _archive_members(sources: tuple[str, ...], kind: KnownUnpack | None) -> tuple[str, ...] | None:
    """
    Return the files that nodes will unpack from the archives *sources*; None if these are not archives, or not local files.

    Raises:
        UnpackRefused: nodes would refuse one.
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
            hint = error.hint or f"pack it with: {_PACK}"
            raise UnpackRefused(f"every node would refuse {source}: {error.message}", hint=hint) from None
    if twice := next((path for path, count in Counter(found).items() if count > 1), None):
        raise UnpackRefused(f"every node would refuse these archives: two of them contain {twice!r}")
    return tuple(found)


def _with_progress(chunks: Iterator[bytes], size: int, source: str) -> Iterator[bytes]:
    """Yield *chunks*, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from chunks
        return
    bar: Any = click.progressbar(length=size or None, label=printable(source)[-40:], file=sys.stderr)
    with bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _read_headers(sources: tuple[str, ...], measured: list[Measured]) -> tuple[list[GgufFacts | None], list[str]]:
    """Return the facts of each file's GGUF header, None for other files, and why an engine may refuse a file."""
    from reconciler.core import file_type, gguf
    from reconciler.publish import artifacts

    headers: list[GgufFacts | None] = []
    refusals = []
    for source, one in zip(sources, measured, strict=True):
        artifacts.refuse_substitute(source, one)
        try:
            headers.append(artifacts.gguf_facts(one))
        except gguf.Malformed as error:
            headers.append(None)
            refusals.append(f"{source}: {error}")
            continue
        if headers[-1] is None and _name(source).endswith(".gguf"):
            kind = file_type.identify(one.head, one.size)
            refusals.append(f"{source} is {kind.text}{'; ' if kind.hint else ''}{kind.hint}")
    return headers, refusals


def _with_other_weights(
    facts: GgufFacts, artifacts: tuple[Artifact, ...], headers: dict[str, GgufFacts | None], entrypoint: str
) -> GgufFacts:
    """Return the entrypoint's *facts* with the estimate of the memory that it needs with all other files that are loaded beside it."""
    from msgspec.structs import replace

    others = sum(one.size for one in artifacts if headers.get(one.path) and one.path != entrypoint and one.role != "other")
    return replace(facts, gpu_bytes_estimate=facts.gpu_bytes_estimate + others * 6 // 5)


def _tasks(facts: GgufFacts | None) -> tuple[KnownTask, ...]:
    if facts and facts.embedding:
        return ("embedding",)
    return ("chat", "completion") if facts and facts.chat_template else ("completion",)


def _model(
    model_id: str,
    sources: tuple[str, ...],
    measured: list[Measured],
    given: dict[str, Any],
    headers: list[GgufFacts | None],
    members: tuple[str, ...] | None,
) -> tuple[Model, GgufFacts | None]:
    """Return the model, and the facts of its entrypoint's header."""
    from msgspec import UNSET

    from reconciler.core.snapshot import Expect, Model, Runtime, Smoke

    artifacts = _artifacts(sources, measured, given)
    known = dict(zip((one.path for one in artifacts), headers, strict=True)) if members is None else dict.fromkeys(members)
    files = tuple(one.path for one in artifacts if not one.unpack) if members is None else members
    entrypoint = given["entrypoint"] or _entrypoint(files, known)
    if members is not None and entrypoint not in members:
        raise PublishError(
            f"no archive contains the entrypoint {entrypoint!r}", hint=f"they contain: {', '.join(members[:10]) or 'nothing'}"
        )
    artifacts = _with_roles(artifacts, known, given, entrypoint)
    facts = known.get(entrypoint)
    facts = _with_other_weights(facts, artifacts, known, entrypoint) if facts else None
    tasks: tuple[KnownTask, ...] = tuple(dict.fromkeys(given["tasks"])) or _tasks(facts)
    name, _, version = model_id.partition(":")
    task: KnownTask = given["smoke_task"] or tasks[0]
    model = Model(
        name=name,
        version=version,
        state=given["state"],
        replaces=given["replaces"] or UNSET,
        tasks=tasks,
        runtime=Runtime(engine=given["engine"], version=given["engine_version"]),
        gpu_memory=(facts.gpu_bytes_estimate if facts else 0) if given["gpu_memory"] is None else given["gpu_memory"],
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
                dimension=(facts.embedding_length or None) if facts and task == "embedding" else None,
            ),
            timeout=given["timeout"],
        ),
    )
    return model, facts


def _with_roles(
    artifacts: tuple[Artifact, ...], headers: dict[str, GgufFacts | None], given: dict[str, Any], entrypoint: str
) -> tuple[Artifact, ...]:
    """Return *artifacts* with their roles; ``model``, the default, is left out."""
    from msgspec import UNSET
    from msgspec.structs import replace

    from reconciler.core import vocabulary
    from reconciler.publish import artifacts as publishing

    named = dict(_named_role(text, vocabulary.ROLES) for text in given["roles"])
    if given["unpack"]:  # the role of an archive is its entrypoint's
        roles = {one.path: named.get(one.path, "") for one in artifacts}
        publishing.assign_roles(dict.fromkeys(roles), named, entrypoint, engine="")
        publishing.assign_roles(headers, {}, entrypoint, engine="")
    else:
        roles = publishing.assign_roles(headers, named, entrypoint, engine=given["engine"])
    return tuple(replace(one, role=UNSET if roles[one.path] in {"", "model"} else roles[one.path]) for one in artifacts)


def _named_role(text: str, known: tuple[str, ...]) -> tuple[str, str]:
    path, _, role = text.rpartition("=")
    if not path or role not in known:
        raise PublishError(f"--role {text!r} is not NAME=ROLE", hint=f"roles are: {', '.join(known)}")
    return path, role


def _artifacts(sources: tuple[str, ...], measured: list[Measured], given: dict[str, Any]) -> tuple[Artifact, ...]:
    from reconciler.core.snapshot import Artifact
    from reconciler.fetch import http

    if len(sources) > 1 and any("{path}" not in url for url in given["urls"]):
        raise PublishError("one --url for several SOURCEs", hint="write {path} in place of the file's name")
    unpack: KnownUnpack | None = given["unpack"]
    made = []
    for index, (source, one) in enumerate(zip(sources, measured, strict=True)):
        path = given["paths"][index] if given["paths"] else _name(source)
        own = (source,) if http.is_url(source) else ()
        urls = (*own, *(url.replace("{path}", path) for url in given["urls"]))
        made.append(Artifact(path=path, digest=one.digest, size=one.size, urls=tuple(dict.fromkeys(urls)), unpack=unpack))
    return tuple(made)


def _name(source: str) -> str:
    return unquote(urlsplit(source).path if "://" in source else source).rstrip("/").rpartition("/")[2]


def _entrypoint(files: tuple[str, ...], headers: dict[str, GgufFacts | None]) -> str:
    from reconciler.core import roles

    models = [path for path in files if path.endswith(".gguf")]
    models = [path for path in models if roles.infer(path, headers.get(path)) == "model"] or models
    if len(files) == 1:
        return files[0]
    if models:
        return min(models)
    raise PublishError("the file that the engine loads cannot be guessed", hint="name it with --entrypoint")


def _memory(model: Model) -> str:
    if not model.gpu_memory:
        return "no GPU memory"
    return f"{units.human_size(model.gpu_memory)} of GPU memory"
