"""``snapshot add``: a model file or archive is measured, its header read, and the model written to the snapshot."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.cli import document_io, model_from_options
from reconciler.cli.options import FILE, MODEL_STATE, Size
from reconciler.core import units
from reconciler.core.errors import PublishError, UnpackRefused
from reconciler.core.text import printable

if TYPE_CHECKING:
    from reconciler.commands.read_source import SourceReader
    from reconciler.core.gguf import GgufFacts
    from reconciler.core.snapshot import Model, Snapshot
    from reconciler.publish.artifacts import Measured
    from reconciler.publish.sources.listing import SourceFile

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
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Of a SOURCE with several files, only those that match (may be repeated)."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Of a SOURCE with several files, not those that match (may be repeated).")
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
@click.option("--expect-token-ids", "tokens", metavar="N,N,…", help="The answer must be exactly these tokens.")
@click.option("--min-rate", type=click.IntRange(0), default=0, help="The fewest tokens a second.")
@click.option("--dimension", type=click.IntRange(1), help="How many components an embedding has [default: from its GGUF header].")
@click.option("--seed", type=click.IntRange(0), default=0, help="The seed of the test job's random numbers.")
@click.option("--requires", multiple=True, metavar="WORD", help="A feature that a reader must know (may be repeated).")
@click.option(
    "--record-answer", is_flag=True, help="Run the test job here, and let every node compare what it computes with what this machine did."
)
@click.option(
    "--model-signature",
    type=FILE,
    help="The publisher's signature over the files (OpenSSF model signing), which must hold.",
)
@click.option("--publisher-key", type=FILE, help="The publisher's public key, for a signature by a bare key.")
@click.option("--publisher-ca", type=FILE, help="Certificate authorities, for a signature by a certificate that one of them issued.")
@click.option("--identity", default="", metavar="NAME", help="Who must have signed: a name in the certificate. For a key: what to call it.")
@click.option("--timeout", default="120s", metavar="TIME", help="The longest time that the test job may take.")
@click.option("--max-size", type=Size(), default="1TiB", metavar="SIZE", help="Refuse a file that is larger.")
@click.option("--hash", "read_all", is_flag=True, help="Read every byte, also where a hub or a registry vouches for a digest.")
@click.option("--netrc", type=FILE, help="A netrc file with passwords by host, for reading URLs.")
@click.option("--ca-file", type=FILE, help="Certificate authorities for https, instead of the system's.")
def snapshot_add(
    *, file: Path, model_id: str, sources: tuple[str, ...], max_size: int, netrc: Path | None, ca_file: Path | None, **given: Any
) -> None:
    """
    Add a model. A SOURCE is a file, a folder, a URL, or a place that knows its files:

    \b
      reconcile snapshot add snapshot.json tiny:v1 tiny.gguf --url https://models.example.org/tiny.gguf
      reconcile snapshot add snapshot.json tiny:v2 https://models.example.org/tiny-v2.gguf \\
          --prompt "The capital of France is" --expect-regex Paris
      reconcile snapshot add snapshot.json embed:v1 ./embed --url 'https://models.example.org/embed/{path}' --engine vllm
      reconcile snapshot add snapshot.json tiny:v3 hf://ORG/REPO@COMMIT/tiny.gguf
      reconcile snapshot add snapshot.json tiny:v4 oci://registry.example.org/models/tiny:v4
      reconcile snapshot add snapshot.json tiny:v5 s3://BUCKET/KEY
      reconcile snapshot add snapshot.json tiny:v6 ./tiny --url 'https://models.example.org/tiny/{path}' \\
          --model-signature tiny.sig --publisher-ca example-ca.pem --identity models@example.org

    Files and URLs are read completely to compute digest and size. A branch or a tag is pinned to the commit or the digest that it names
    now. Hosts that a source redirects to are written down, so that nodes may follow.

    The other enabled version of NAME is retired: each node serves it until the new one is active there, and both change in one swap.

    Nodes download a SOURCE that is a URL from there; it must be https, or http to this machine. An archive that is a file is checked as
    nodes check it.
    """
    from reconciler.commands.read_source import SourceReader

    data = document_io.read_snapshot(file)
    _check_not_listed(data, model_id)
    reader = SourceReader(ca_file=str(ca_file or ""), netrc=netrc, max_bytes=max_size, progress=_with_progress)
    found = _list_files(reader, sources, given)
    alone = len(found) == 1 or bool(given["unpack"])
    measured = [reader.measure(one, read_all=given["read_all"], may_be_empty=not alone) for one in found]
    headers, refusals = _read_headers(found, measured)
    members = _archive_members(found)
    model, facts = model_from_options.make(model_id, found, measured, given, headers, members)
    if given["model_signature"]:
        model = _with_publisher(model, given)
    if given["record_answer"]:
        model = _with_recorded_answer(model, found)
    replaced = _write_update(file, data, model, beside=given["beside"], redirects=reader.redirects)
    _print_notes(model, given, members, refusals)
    _print_findings(model, headers, members)
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


def _list_files(reader: SourceReader, sources: tuple[str, ...], given: dict[str, Any]) -> tuple[SourceFile, ...]:
    """Return the files of *sources*, with the paths and the archive kind that are *given*; print what people should know of them."""
    from msgspec.structs import replace

    from reconciler.commands import read_source

    for url in (*sources, *given["urls"]):
        _refuse_secret(url)
    listings = [reader.listing(source, include=given["include"], exclude=given["exclude"]) for source in sources]
    for note in (note for listing in listings for note in listing.notes):
        document_io.note(printable(note))
    found = tuple(file for listing in listings for file in listing.files if not _is_signature(file, given["model_signature"]))
    if len(given["paths"]) not in {0, len(found)}:
        what = "SOURCEs" if len(found) == len(sources) else "files in the SOURCEs"
        raise PublishError(f"{len(found)} {what} and {len(given['paths'])} --path", hint="give --path once for each, or not at all")
    if given["paths"]:
        found = tuple(replace(file, path=path) for file, path in zip(found, given["paths"], strict=True))
    if given["unpack"]:
        found = tuple(replace(file, unpack=given["unpack"]) for file in found)
    read_source.refuse_doubles(found)
    return found


def _refuse_secret(url: str) -> None:
    """Refuse a URL with a signature in it: snapshots are public, and nodes fetch long after it has expired."""
    from reconciler.fetch.sources import redact
    from reconciler.publish import lint

    if name := lint.secret_in(url):
        raise PublishError(
            f"{redact(url)} carries {name!r}, a signature or a secret, which would stand in a public document",
            hint="give its address without it: nodes sign s3:// addresses themselves, and have [download.credentials] for the rest",
        )


def _is_signature(file: SourceFile, signature: Path | None) -> bool:
    """Return whether *file* is the signature over the others, which some publishers put beside them."""
    return signature is not None and "://" not in file.place and Path(file.place).resolve() == signature.resolve()


def _with_publisher(model: Model, given: dict[str, Any]) -> Model:
    """Return *model* with who signed its files, if somebody did."""
    from msgspec import to_builtins
    from msgspec.structs import replace

    from reconciler.publish import model_signature

    found = model_signature.verify(
        document_io.read(given["model_signature"], most=model_signature.MOST_BYTES),
        {artifact.path: artifact.digest for artifact in model.artifacts},
        identity=given["identity"],
        key_file=given["publisher_key"],
        ca_file=given["publisher_ca"],
    )
    document_io.print_line(f"its files are signed by {printable(found.identity)} ({found.method}, {found.key})")
    return replace(model, publisher=to_builtins(found))


def _with_recorded_answer(model: Model, sources: tuple[SourceFile, ...]) -> Model:
    """Return *model* with what its test job computes here as what it must compute on every node."""
    from msgspec.structs import replace

    from reconciler.cli import snapshot_test
    from reconciler.commands import run_test_job
    from reconciler.fetch import http

    if any(artifact.unpack for artifact in model.artifacts) or any(http.is_url(one.place) for one in sources):
        raise PublishError("--record-answer needs the model's files on this machine, unpacked", hint="give files as SOURCE")
    found = run_test_job.record_answer(model, {one.path: Path(one.place) for one in sources})
    document_io.print_line(f"recorded: {snapshot_test.answer_in_words(found)}")
    return replace(model, smoke=replace(model.smoke, expect=replace(model.smoke.expect, answer=found)))


def _print_notes(model: Model, given: dict[str, Any], members: tuple[str, ...] | None, refusals: list[str]) -> None:
    """Print what nodes may make of *model* that its publisher may not expect."""
    from reconciler.fetch.sources import host_of, is_loopback_name

    if not all(artifact.urls for artifact in model.artifacts):
        document_io.note("no --url is given: nodes download it from the snapshot's --fallback, or from their own mirrors")
    if any(artifact.unpack for artifact in model.artifacts) and members is None:
        document_io.note(f"an archive at a URL is not checked, one in a file is. Pack it with: {_PACK}")
    if any(url.startswith("http://") and not is_loopback_name(host_of(url)) for url in given["urls"]):
        document_io.note("nodes refuse plain http to another machine, unless they set [download] allow_http")
    if any("?" in url for artifact in model.artifacts for url in artifact.urls):
        document_io.note("a URL has a query, and snapshots are public: make sure that it is not a secret and does not expire")
    for refusal in refusals:
        document_io.note(f"an engine may refuse this file: {printable(refusal)}")


def _print_findings(model: Model, headers: list[GgufFacts | None], members: tuple[str, ...] | None) -> None:
    """Print what its files tell against *model*: they are here now, and are not when it is signed."""
    from reconciler.publish import lint

    facts = next((facts for one, facts in zip(model.artifacts, headers, strict=True) if one.path == model.entrypoint), None)
    if members is None and (facts is not None or not model.entrypoint.endswith(".gguf")):  # of the others is said what they are instead
        for one in lint.of_header(model, facts):
            document_io.note(f"{one.level}: {printable(one.text)}{f' ({one.hint})' if one.hint else ''}")


def _write_update(file: Path, data: bytes, model: Model, *, beside: bool, redirects: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Write the snapshot with *model* in it, and with the hosts that its sources redirect to; return the ids that it replaces."""
    from reconciler.publish import snapshots

    replaced: tuple[str, ...] = ()

    def change(found: Snapshot) -> Snapshot:
        nonlocal replaced
        found = snapshots.with_redirects(found, redirects)
        if beside or model.state != "enabled":
            return snapshots.with_model(found, model)
        made, replaced = snapshots.with_update(found, model)
        return made

    document_io.write_snapshot(file, snapshots.edit(data, change, now=document_io.now()))
    for host, patterns in redirects.items():
        document_io.note(f"{printable(host)} redirects, and nodes may follow: {printable(', '.join(patterns))}")
    return replaced


def _check_not_listed(data: bytes, model_id: str) -> None:
    """Refuse a duplicate before the sources are read, which may take an hour."""
    from reconciler.publish import snapshots

    name, colon, version = model_id.partition(":")
    if not (name and colon and version):
        raise PublishError(f"{model_id!r} is not a model id", hint="write NAME:VERSION, e.g. mistral-7b-instruct:v1")
    if any(entry.id.casefold() == model_id.casefold() for entry in snapshots.inspect(data).models):
        raise PublishError(f"the snapshot lists {model_id} already", hint="new content needs a new version, e.g. NAME:v2")


#: Packs nothing that nodes refuse: links become files, and a path or a file that is too long is refused by tar itself.
_PACK = "tar --format=ustar --dereference --hard-dereference"


def _archive_members(sources: tuple[SourceFile, ...]) -> tuple[str, ...] | None:
    """
    Return the files that nodes will unpack from the archives *sources*; None if these are not all archives, or not local files.

    Raises:
        UnpackRefused: nodes would refuse one.
    """
    from reconciler.fetch import http
    from reconciler.unpack import extract

    found: list[str] = []
    for source in sources:
        if source.unpack is None or http.is_url(source.place):
            return None
        try:
            found += extract.list_files(Path(source.place).resolve(), source.unpack)
        except UnpackRefused as error:
            raise UnpackRefused(f"every node would refuse {source.place}: {error.message}", hint=error.hint) from None
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


def _read_headers(sources: tuple[SourceFile, ...], measured: list[Measured]) -> tuple[list[GgufFacts | None], list[str]]:
    """Return the facts of each file's GGUF header, None for other files, and why an engine may refuse a file."""
    from reconciler.core import file_type, gguf
    from reconciler.publish import artifacts

    headers: list[GgufFacts | None] = []
    refusals = []
    for file, one in zip(sources, measured, strict=True):
        source = file.place
        artifacts.refuse_substitute(source, one)
        try:
            headers.append(artifacts.gguf_facts(one))
        except gguf.Malformed as error:
            headers.append(None)
            refusals.append(f"{source}: {error}")
            continue
        if headers[-1] is None and file.path.endswith(".gguf"):
            kind = file_type.identify(one.head, one.size)
            refusals.append(f"{source} is {kind.text}{'; ' if kind.hint else ''}{kind.hint}")
    return headers, refusals


def _memory(model: Model) -> str:
    if not model.gpu_memory:
        return "no GPU memory"
    return f"{units.human_size(model.gpu_memory)} of GPU memory"
