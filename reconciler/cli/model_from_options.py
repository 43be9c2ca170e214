"""The model that the options of ``snapshot add`` and the files that were measured describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from reconciler.cli.options import token_ids
from reconciler.core.errors import PublishError

if TYPE_CHECKING:
    from reconciler.core.gguf import GgufFacts
    from reconciler.core.snapshot import Artifact, Model
    from reconciler.core.vocabulary import KnownTask
    from reconciler.publish.artifacts import Measured
    from reconciler.publish.sources.listing import SourceFile


def _gpu_memory(
    facts: GgufFacts | None, artifacts: tuple[Artifact, ...], headers: dict[str, GgufFacts | None], entrypoint: str, given: dict[str, Any]
) -> int:
    """Return the GPU memory that is *given*, or else estimated for the test job, with all other files that are loaded beside it."""
    if given["gpu_memory"] is not None:
        return int(given["gpu_memory"])
    if facts is None:
        return 0
    from reconciler.core import fit

    others = sum(one.size for one in artifacts if headers.get(one.path) and one.path != entrypoint and one.role != "other")
    chat = (given["smoke_task"] or "") == "chat" or (not given["smoke_task"] and facts.chat_template)
    context = fit.context_of(prompt_bytes=len(given["prompt"].encode()), tokens=given["max_tokens"], chat=chat, most=facts.context_length)
    job = fit.Job(context=context, batch=context if facts.embedding else min(context, 512))
    return fit.estimate(facts.shape, job).gpu_bytes + others


def _tasks(facts: GgufFacts | None) -> tuple[KnownTask, ...]:
    if facts and facts.embedding:
        return ("embedding",)
    return ("chat", "completion") if facts and facts.chat_template else ("completion",)


def make(
    model_id: str,
    sources: tuple[SourceFile, ...],
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
    tasks: tuple[KnownTask, ...] = tuple(dict.fromkeys(given["tasks"])) or _tasks(facts)
    name, _, version = model_id.partition(":")
    task: KnownTask = given["smoke_task"] or tasks[0]
    model = Model(
        name=name,
        version=version,
        state=given["state"],
        replaces=given["replaces"] or UNSET,
        requires=given["requires"] or UNSET,
        tasks=tasks,
        runtime=Runtime(engine=given["engine"], version=given["engine_version"]),
        gpu_memory=_gpu_memory(facts, artifacts, known, entrypoint, given),
        memory=given["memory"],
        artifacts=artifacts,
        entrypoint=entrypoint,
        smoke=Smoke(
            task=task,
            prompt=given["prompt"],
            max_tokens=given["max_tokens"],
            seed=given["seed"],
            expect=Expect(
                text=given["expect_text"],
                regex=given["expect_regex"],
                min_tokens=0 if task == "embedding" else given["min_tokens"],
                tokens=tuple(token_ids(given["tokens"])) if given["tokens"] else None,
                min_rate=given["min_rate"],
                dimension=given["dimension"] or ((facts.embedding_length or None) if facts and task == "embedding" else None),
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
    if any(one.unpack for one in artifacts):  # the role of an archive is its entrypoint's
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


def _artifacts(sources: tuple[SourceFile, ...], measured: list[Measured], given: dict[str, Any]) -> tuple[Artifact, ...]:
    from reconciler.core.snapshot import Artifact

    if len(sources) > 1 and any("{path}" not in url for url in given["urls"]):
        raise PublishError("one --url for several SOURCEs", hint="write {path} in place of the file's name")
    made = []
    for source, one in zip(sources, measured, strict=True):
        urls = (*source.urls, *(url.replace("{path}", quote(source.path)) for url in given["urls"]))
        made.append(Artifact(path=source.path, digest=one.digest, size=one.size, urls=tuple(dict.fromkeys(urls)), unpack=source.unpack))
    return tuple(made)


def _entrypoint(files: tuple[str, ...], headers: dict[str, GgufFacts | None]) -> str:
    from reconciler.core import roles

    models = [path for path in files if path.endswith(".gguf")]
    models = [path for path in models if roles.infer(path, headers.get(path)) == "model"] or models
    if len(files) == 1:
        return files[0]
    if models:
        return min(models)
    raise PublishError("the file that the engine loads cannot be guessed", hint="name it with --entrypoint")
