"""
What is probably wrong with a snapshot although nodes would take it.

Rules that hold here:

1. An error is what keeps a model from serving on every node, or lets a secret into a public document; a warning is what a person should
   look at. Nothing is changed.
2. The network is asked through functions that the caller gives.
3. What a file is, its name alone does not prove: an error that follows from a name is one that no file of such a name escapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from msgspec import Struct

from reconciler.core import units
from reconciler.core.errors import PublishError, ReconcileError
from reconciler.core.gguf import GgufFacts
from reconciler.core.node import NodeFacts
from reconciler.core.snapshot import LEAST_SURE, LEAST_TOKENS, Artifact, Model, Snapshot
from reconciler.publish import signable

Level = Literal["error", "warning"]
#: Asks a URL for its first byte; returns why it gives none, empty where it does.
Probe = Callable[[str, int], str]
#: Reads a URL to its end; returns its digest by the algorithm given.
Hash = Callable[[str, Artifact], str]
#: Reads the GGUF header at a URL; None where there is none.
Header = Callable[[str, Artifact], GgufFacts | None]

#: Engines that nodes have without a binding of their own.
_ENGINES = frozenset({"llama-cpp", "openai"})
#: Suffixes under which GGUF files are found too.
_MAYBE_GGUF = frozenset({"", ".bin", ".ggml", ".part"})
#: Parts of query parameters' names that carry a signature or a secret (AWS, Google, Azure, CloudFront, plain tokens).
_SECRETS = re.compile(r"signature|credential|token|secret|password|^sig$|^key$|api[-_]?key|policy|key-pair-id|expires", re.IGNORECASE)

_NOT_READ = "correct the URL; nodes try the other sources, and install nothing where none answers"
_OTHER_BYTES = "every node refuses these bytes: correct the URL, or add the new content as another version"
_NEEDS = "measure what it needs, and correct it with `reconcile snapshot edit FILE ID --gpu-memory SIZE --memory SIZE`"
_EXPECT = "`reconcile snapshot edit FILE ID --expect-regex REGEX` says what must come out"
_TRACKER = "`reconcile snapshot swarm add FILE --files DIR --tracker URL` names one"
_COMMIT = "name a commit in place of the branch: `reconcile snapshot add`, given an hf:// address, writes the commit"


class Finding(Struct, frozen=True, kw_only=True):
    """One thing that is probably wrong; ``id`` is empty for the snapshot itself."""

    level: Level
    id: str
    text: str
    hint: str = ""


def lint(found: Snapshot, *, nodes: Iterable[NodeFacts] = ()) -> tuple[Finding, ...]:
    """Return what is probably wrong with *found*, on *nodes* like these, without asking the network."""
    profiles = tuple(nodes)
    of_models = (
        finding
        for model in found.models
        for check in (_engine, _format, _template, _licence, _job, _answer, _urls)
        for finding in (*check(model), *(_fits(model, profiles) if check is _engine else ()))
    )
    return (*of_models, *_relations(found), *_swarm(found))


def before_signing(found: Snapshot) -> tuple[Finding, ...]:
    """
    Return the warnings about *found*, which whoever signs it is shown.

    Raises:
        PublishError: there are errors; it names the first.
    """
    findings = lint(found)
    errors = [one for one in findings if one.level == "error"]
    if errors:
        first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        text = f"{first.id}: {first.text}" if first.id else first.text
        hint = f"{first.hint}; " if first.hint else ""
        raise PublishError(f"{text}{more}", hint=f"{hint}`reconcile snapshot lint FILE` shows all; --no-lint signs it all the same")
    return findings


def secret_in(url: str) -> str:
    """Return the name of the first query parameter of *url* that looks like a signature or a secret; empty if there is none."""
    names = [name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)]
    return next((name for name in names if _SECRETS.search(name)), "")


def online(found: Snapshot, probe: Probe, hash_: Hash | None = None, header: Header | None = None) -> Iterator[Finding]:
    """Yield which URLs of *found* do not give their blob, and what headers tell; with *hash_*, each is read to its end."""
    for model in found.models:
        if header and (read := _entrypoint_header(model, header)) is not None:
            yield from of_header(model, *read)
        for artifact in model.artifacts:
            for url in artifact.urls:
                if refusal := probe(url, artifact.size):
                    yield _error(model, f"{_shown(url)}: {refusal}", _NOT_READ)
                elif hash_ and (digest := hash_(url, artifact)) != artifact.digest:
                    yield _error(model, f"{_shown(url)} gives {digest}, and {artifact.digest} is listed", _OTHER_BYTES)


def _entrypoint_header(model: Model, header: Header) -> tuple[GgufFacts | None] | None:
    """Return what the first address of the entrypoint of *model* that answers has as its header; None where that is not known."""
    for artifact in model.artifacts:
        for url in artifact.urls if artifact.path == model.entrypoint and not artifact.unpack else ():
            try:
                return (header(url, artifact),)
            except ReconcileError:  # the probe names it
                continue
    return None


def of_header(model: Model, facts: GgufFacts | None) -> Iterator[Finding]:
    """Yield what is wrong with *model* by the GGUF header of its entrypoint; *facts* are None where it has none."""
    if model.runtime.engine != "llama-cpp":
        return
    if facts is None:
        yield _error(model, f"{model.entrypoint} is no GGUF file, and the engine llama-cpp loads nothing else")
    elif not facts.chat_template and _chats(model) and not _has_template(model):
        yield _no_template(model)


def _chats(model: Model) -> bool:
    return "chat" in model.tasks or model.smoke.task == "chat"


def _has_template(model: Model) -> bool:
    names = {artifact.path.rpartition("/")[2].lower() for artifact in model.artifacts}
    listed = any(artifact.role == "template" for artifact in model.artifacts)
    return listed or bool(names & {"tokenizer_config.json", "chat_template.jinja", "chat_template.json"})


def _no_template(model: Model) -> Finding:
    hint = "engines then guess one: add it as an artifact with the role template, or take the task chat out"
    return _warning(model, "its task is chat, and it has no chat template", hint)


def _template(model: Model) -> Iterator[Finding]:
    """Look at names alone: a GGUF file has its template in its header, and an archive may have one."""
    unpacked = any(artifact.unpack for artifact in model.artifacts)
    if _chats(model) and model.runtime.engine != "llama-cpp" and not unpacked and not model.entrypoint.endswith(".gguf"):
        yield from () if _has_template(model) else (_no_template(model),)


def _engine(model: Model) -> Iterator[Finding]:
    if model.runtime.engine not in _ENGINES:
        known = ", ".join(sorted(_ENGINES))
        yield _warning(
            model,
            f"nodes have no engine {model.runtime.engine!r} by default, only {known}",
            "name that engine as [runtime.NAME] in the settings of each node that shall run the model",
        )


def _fits(model: Model, nodes: tuple[NodeFacts, ...]) -> Iterator[Finding]:
    if nodes and not any(model.gpu_memory <= node.gpu_bytes and model.memory <= node.memory_bytes for node in nodes):
        needs = f"{units.human_size(model.gpu_memory)} of GPU memory and {units.human_size(model.memory)} of memory"
        yield _warning(model, f"no listed node has what it needs: {needs}", _NEEDS)
    size = sum(artifact.size for artifact in model.artifacts)
    if nodes and all(0 < node.disk_total_bytes < size for node in nodes):
        yield _warning(model, f"no listed node has a disk of its size, {units.human_size(size)}")


def _format(model: Model) -> Iterator[Finding]:
    unpacked = any(artifact.unpack for artifact in model.artifacts)
    if model.runtime.engine == "llama-cpp" and not model.entrypoint.endswith(".gguf") and not unpacked:
        level: Level = "warning" if PurePosixPath(model.entrypoint).suffix.lower() in _MAYBE_GGUF else "error"
        text = f"{model.entrypoint} is no GGUF file by its name, and the engine llama-cpp loads nothing else"
        yield Finding(level=level, id=model.id, text=text)


def _licence(model: Model) -> Iterator[Finding]:
    names = [artifact.path.rpartition("/")[2].lower() for artifact in model.artifacts]
    listed = any(artifact.role == "licence" for artifact in model.artifacts)
    if not listed and not any(name.startswith(("license", "licence", "copying", "notice", "use_policy")) for name in names):
        yield _warning(model, "it carries no licence file", "add the licence file as one more SOURCE of the next version")


def _job(model: Model) -> Iterator[Finding]:
    expect = model.smoke.expect
    asks_nothing = not (expect.text or expect.regex or expect.tokens or expect.dimension or getattr(expect, "answer", None))
    if asks_nothing and expect.min_tokens <= 1:
        yield _warning(model, "its test job accepts nearly any answer", _EXPECT)


def _answer(model: Model) -> Iterator[Finding]:
    answer = model.smoke.expect.answer
    if not answer or answer.embedding:
        return
    tokens, sure = len(answer.tokens), len(set(answer.sure))
    if tokens < LEAST_TOKENS or sure < LEAST_SURE:
        yield _warning(
            model,
            f"its answer has {units.count(tokens, 'token')} and is compared at {units.count(sure, 'position')}: a broken device may agree",
            f"`reconcile snapshot test FILE ID --record` records it again, with at least {LEAST_TOKENS} tokens and {LEAST_SURE} positions",
        )


def _urls(model: Model) -> Iterator[Finding]:
    for artifact in model.artifacts:
        for url in artifact.urls:
            if name := secret_in(url):
                hint = "snapshots are public and outlive a signature: publish a plain address, an s3:// one, or give nodes credentials"
                yield _error(model, f"{_shown(url)} carries {name!r}, a signature or a secret", hint)
            elif re.search(r"/(resolve|raw|blob)/(main|master)/", url):
                yield _warning(model, f"{_shown(url)} names a branch, whose content changes", _COMMIT)


def _relations(found: Snapshot) -> Iterator[Finding]:
    states = {model.id: model.state for model in found.models}
    for model in found.models:
        for old in model.replaces or ():
            if model.state == "enabled" and states.get(old) == "enabled" and not _in_rollout(found, model.id):
                yield _warning(
                    model,
                    f"it replaces {old}, which stays enabled: nodes serve both",
                    f"`reconcile snapshot set-state FILE {old} retired` lets nodes change from one to the other",
                )
    for check in (signable.refuse_never_replaced, signable.refuse_empty_rollout):
        if refusal := signable.refusal(check, found):
            yield Finding(level="error", id="", text=refusal.message, hint=refusal.hint)


def _swarm(found: Snapshot) -> Iterator[Finding]:
    if not found.swarm:
        return
    if not found.swarm.trackers:
        yield Finding(level="warning", id="", text="it has torrents and no tracker: no node would find another", hint=_TRACKER)
    listed = {artifact.digest for model in found.models for artifact in model.artifacts}
    if stale := sorted(found.swarm.torrents.keys() - listed):
        text = f"{units.count(len(stale), 'torrent')} of files that no model lists, the first of {stale[0]}"
        yield Finding(level="warning", id="", text=text, hint="`reconcile snapshot swarm add FILE --files DIR` takes them out")
    for name, entry in found.swarm.torrents.items():
        for url in entry.urls:
            if secret := secret_in(url):
                text = f"the torrent of {name}: {_shown(url)} carries {secret!r}, a signature or a secret"
                yield Finding(level="error", id="", text=text, hint="publish the torrents at plain addresses")


def _in_rollout(found: Snapshot, model: str) -> bool:
    return any(model in rollout.models for rollout in (found.rollouts or {}).values())


def _shown(url: str) -> str:
    return f"{url.partition('?')[0]}{'?…' if '?' in url else ''}"


def _error(model: Model, text: str, hint: str = "") -> Finding:
    return Finding(level="error", id=model.id, text=text, hint=hint)


def _warning(model: Model, text: str, hint: str = "") -> Finding:
    return Finding(level="warning", id=model.id, text=text, hint=hint)
