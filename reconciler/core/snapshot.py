"""
The snapshot: every model that a node may hold, as a value.

Rules that hold here:

1. Values enter through ``decode`` alone, since a constructor checks nothing. What was decoded is well-formed.
2. Fields that this reader does not know are ignored at every level, and covered by the digest. A word that it does not know, where
   ``vocabulary`` lists words, makes one model incompatible and never the list an error.
3. Names and paths are refused here, before anything could join them to a folder or a URL.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from reconciler.core import strict_json, units, urls
from reconciler.core import swarm as peers
from reconciler.core.digest import AnyDigest
from reconciler.core.errors import BadEnvelope
from reconciler.core.swarm import Swarm
from reconciler.core.text import printable
from reconciler.core.vocabulary import Feature, Role, State, Task, Unpack

#: Integers that every JSON reader holds exactly (RFC 8259, section 6).
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**53 - 1)]
Instant = Annotated[datetime, Meta(tz=True)]

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}(?!\n)$")]
Version = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?!\n)$")]
Text = Annotated[str, Meta(max_length=65536)]
Short = Annotated[str, Meta(min_length=1, max_length=256)]
HostText = Annotated[str, Meta(min_length=1, max_length=256)]

ModelId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}:[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?!\n)$")]

MAX_MODELS = 20_000
MAX_ARTIFACTS = 1_000  # of one model
MAX_PATH_BYTES = 1024
MAX_COMPONENT_BYTES = 255  # NAME_MAX of every file system a store is put on


class Runtime(Struct, frozen=True, kw_only=True):
    """The engine that a model needs, and the versions of it that will do, as a PEP 440 specifier set."""

    engine: Name  #: Its name.
    version: Annotated[str, Meta(max_length=256)] = ""  #: Versions that will do (PEP 440); empty: any.


#: Which rules an answer is recorded by; another margin, or another choice of tokens, is another version.
ANSWER_VERSION = 1
#: Tokens of a recorded answer, and its sure positions, at least: fewer tell little of a model.
LEAST_TOKENS, LEAST_SURE = 32, 8


class Answer(Struct, frozen=True, kw_only=True):
    """What the model computed where this was recorded: token ids, or an embedding. Arithmetic differs a little from device to device."""

    #: Token ids that it chose one after the other, each the likeliest that does not end the text. A test job feeds these very tokens.
    tokens: Annotated[tuple[Count, ...], Meta(max_length=4096)] = ()
    #: Positions in ``tokens`` where the first choice led by a wide margin: other first choices of a test job contradict it
    #: there (``runtime.known_answer``).
    sure: Annotated[tuple[Count, ...], Meta(max_length=4096)] = ()
    #: The prompt's embedding.
    embedding: Annotated[tuple[float, ...], Meta(max_length=65536)] = ()
    #: The least cosine between ``embedding`` and a test job's own.
    cosine: Annotated[float, Meta(ge=-1, le=1)] = 0.999
    #: Token ids of the prompt, as the recorder's tokenizer split it; absent: not known, and not compared.
    prompt: Annotated[tuple[Count, ...], Meta(max_length=8192)] | UnsetType = UNSET
    #: Logits by which the recorder's first choice led the second, at least, at each position in ``sure``; absent: not known.
    margin: Annotated[float, Meta(gt=0, le=1e6)] | UnsetType = UNSET
    #: Of the test job's rules for recorded answers; absent: from before they had a number.
    version: Annotated[int, Meta(ge=1, le=2**31)] | UnsetType = UNSET


class Expect(Struct, frozen=True, kw_only=True):
    """What a test job's answer must be; all that is given must hold."""

    #: The answer contains this text.
    text: Text | None = None
    #: ``re.search`` of this finds something in the answer.
    regex: Text | None = None
    #: At least so many tokens were generated.
    min_tokens: Count = 0
    #: Exactly these token ids were generated, by a run at temperature 0.
    tokens: tuple[Count, ...] | None = None
    #: At least so many tokens a second were generated.
    min_rate: Count = 0
    #: An embedding has so many components.
    dimension: Positive | None = None
    #: What it must compute; null, or absent: whatever the rest permits.
    answer: Answer | UnsetType | None = UNSET


class Smoke(Struct, frozen=True, kw_only=True):
    """The test inference job of a model."""

    task: Task = "completion"  #: What is asked of the model.
    prompt: Text = "Hello"  #: The input.
    max_tokens: Annotated[int, Meta(ge=1, le=4096)] = 8  #: At most so many are generated.
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0  #: Of the random numbers.
    expect: Expect = Expect()  #: What the answer must be.
    #: A duration; the node's own limit holds if it is shorter.
    timeout: Annotated[str, Meta(max_length=16)] = "120s"


class Artifact(Struct, frozen=True, kw_only=True):
    """One file as it is downloaded: a model file, or an archive whose members take its place."""

    path: Annotated[str, Meta(min_length=1, max_length=MAX_PATH_BYTES)]  #: Its path in the model's tree.
    digest: AnyDigest  #: Digest of its bytes.
    size: Count  #: Its size in bytes; 0 for an empty file that is neither an archive nor the entrypoint.
    urls: Annotated[tuple[Annotated[str, Meta(min_length=8, max_length=4096)], ...], Meta(max_length=64)] = ()
    unpack: Unpack | None = None  #: How it is unpacked; null: not at all.
    #: What it is for, or, of an archive, what its entrypoint is for; absent: ``model``.
    role: Role | UnsetType = UNSET


#: Versions that do not know the field accept whatever stands there, so this one does too.
_PUBLISHER: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("identity", "method", "key", "signature")},
}


class Model(Struct, frozen=True, kw_only=True):
    """One model that the network approved, with what it needs."""

    name: Name  #: Its name.
    version: Version  #: Its version; with the name the model id.
    state: State = "enabled"  #: What nodes do with it.
    #: Ids of the models that this one stands in for: a retired or archived one of them serves until this one is active on the node.
    replaces: Annotated[tuple[ModelId, ...], Meta(max_length=64)] | UnsetType = UNSET
    #: Features that a reader must know to treat this model rightly; one that does not know them leaves the model alone.
    requires: Annotated[tuple[Feature, ...], Meta(max_length=64)] | UnsetType = UNSET
    tasks: Annotated[tuple[Task, ...], Meta(min_length=1, max_length=64)]  #: What it is for.
    runtime: Runtime  #: The engine that it needs.
    #: Bytes of memory on the GPU; 0: none needed.
    gpu_memory: Count = 0
    #: Bytes of main memory; 0: none needed.
    memory: Count = 0
    artifacts: Annotated[tuple[Artifact, ...], Meta(min_length=1, max_length=MAX_ARTIFACTS)]  #: Its files.
    #: The file that the engine is given, as a path in the model's tree.
    entrypoint: Annotated[str, Meta(min_length=1, max_length=MAX_PATH_BYTES)]
    smoke: Smoke = Smoke()  #: Its test job.
    #: Who signed its files before this network did, as the publisher's tools checked it. For people: nodes do nothing with it.
    publisher: Annotated[Any, Meta(extra_json_schema=_PUBLISHER)] = UNSET

    @property
    def id(self) -> str:
        """``name:version``."""
        return f"{self.name}:{self.version}"


class Sources(Struct, frozen=True, kw_only=True):
    """Where blobs may be had beside the urls of their artifacts."""

    #: URL templates with ``{algorithm}`` and ``{hex}``.
    fallback: Annotated[tuple[Annotated[str, Meta(min_length=8, max_length=4096)], ...], Meta(max_length=64)] = ()
    #: Whether a node's own mirrors and fallback templates may be used.
    allow_node_fallback: bool = True
    #: For a source's host, patterns of hosts that it may redirect to, such as ``*.example.org``. Credentials are never sent there.
    redirects: Annotated[dict[HostText, Annotated[tuple[HostText, ...], Meta(max_length=64)]], Meta(max_length=1000)] | UnsetType = UNSET


class Rollout(Struct, frozen=True, kw_only=True):
    """A step of the way on which models reach a network: which nodes have them yet (``core.rollout``)."""

    models: Annotated[tuple[ModelId, ...], Meta(max_length=MAX_MODELS)] = ()  #: Ids of the models.
    #: They are for the nodes whose place is below this.
    per_10000: Annotated[int, Meta(ge=0, le=10_000)] = 0
    #: They are also for nodes of these cohorts, which nodes name in their own settings.
    cohorts: Annotated[tuple[Short, ...], Meta(max_length=64)] = ()


class Snapshot(Struct, frozen=True, kw_only=True):
    """A versioned document that lists every model a node may hold."""

    schema: Literal[1]
    network: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}(?!\n)$")]  #: The network's name.
    version: Positive  #: Rises with each change.
    issued_at: Instant  #: When it was made.
    expires_at: Instant  #: Until when it may be acted on.
    sources: Sources = Sources()  #: Where blobs may be fetched from, for all models.
    #: For a model's name the version that the bare name leads to, where that is active; else each node chooses by the same rule.
    names: dict[Name, Version] | UnsetType = UNSET
    #: Models that are not for every node yet, by the rollout's name.
    rollouts: Annotated[dict[Short, Rollout], Meta(max_length=1000)] | UnsetType = UNSET
    #: A test job's result is good for so long; absent: until the runtime or the device changes.
    retest_after: Annotated[str, Meta(max_length=16)] | UnsetType = UNSET
    #: Trackers and torrents, by which nodes may fetch blobs from each other; it is not in the lock.
    swarm: Swarm | UnsetType = UNSET
    models: Annotated[tuple[Model, ...], Meta(max_length=MAX_MODELS)]  #: Every model that a node may hold.


def decode(payload: bytes) -> Snapshot:
    """
    Decode a snapshot's payload and check every rule that holds between its fields.

    Raises:
        BadEnvelope: the payload is not a snapshot; the message names the place, as in ``models[3].artifacts[0].digest``.
    """
    try:
        snapshot = strict_json.decode(payload, Snapshot)
        check(snapshot)
    except ValueError as error:
        raise BadEnvelope(f"not a snapshot: {printable(str(error)).replace('`$.', '`')}", hint=_HINT) from None
    return snapshot


_HINT = "the network's operator can check it with `reconcile snapshot inspect FILE`"


def check(snapshot: Snapshot) -> None:
    """
    Check what a type cannot say.

    Raises:
        ValueError: a rule is broken; the message names the place.
    """
    _within("issued_at", check_instant, snapshot.issued_at)
    _within("expires_at", check_instant, snapshot.expires_at)
    if snapshot.expires_at <= snapshot.issued_at:
        raise ValueError("expires_at is not after issued_at")
    if snapshot.retest_after is not UNSET:
        _within("retest_after", units.seconds, snapshot.retest_after)
    for index, template in enumerate(snapshot.sources.fallback):
        _within(f"sources.fallback[{index}]", urls.check_template, template)
    _check_tables(snapshot)
    _check_replacements(snapshot.models)
    seen: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for index, model in enumerate(snapshot.models):
        where = f"models[{index}]"
        twin = seen.setdefault(model.id.casefold(), index)
        if twin != index:
            raise ValueError(f"duplicate id {model.id!r} - at `{where}` and `models[{twin}]`")
        _within(where, _check_model, model)
        for artifact in model.artifacts:
            if sizes.setdefault(artifact.digest, artifact.size) != artifact.size:
                raise ValueError(f"two sizes for {artifact.digest} - at `{where}`")
            if not (artifact.urls or snapshot.sources.fallback or snapshot.sources.allow_node_fallback):
                raise ValueError(f"no source for {artifact.path!r} - at `{where}`")


def _check_tables(snapshot: Snapshot) -> None:
    """Check the hosts of redirects, and the names of rollouts."""
    for host, patterns in (snapshot.sources.redirects or {}).items():
        _within("sources.redirects", urls.check_host, host)
        for pattern in patterns:
            _within("sources.redirects", urls.check_pattern, pattern)
    for name in snapshot.rollouts or {}:
        _within("rollouts", _check_label, name)
    if snapshot.swarm:
        peers.check(snapshot.swarm)


def _check_replacements(models: tuple[Model, ...]) -> None:
    """Refuse a circle of replacements, and an id that two enabled models replace (SPEC 4)."""
    replaced: dict[str, str] = {}
    for index, model in enumerate(models):
        for old in model.replaces or ():
            if model.state == "enabled" and replaced.setdefault(old, model.id) != model.id:
                raise ValueError(f"{old!r} is replaced by {replaced[old]!r} already - at `models[{index}].replaces`")
    if not (edges := {model.id: model.replaces for model in models if model.replaces}):
        return
    import graphlib  # few lists need it, and each plan starts faster without it

    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"models replace each other in a circle: {', '.join(error.args[1][:4])} - at `models`") from None


def _check_label(text: str) -> None:
    if not text.isprintable():
        raise ValueError(f"name {text!r} has a character that is not printable")


def check_instant(instant: datetime) -> None:
    """
    Refuse a time near either end of the calendar, where conversion to UTC overflows and tools disagree.

    Raises:
        ValueError: before 1970 or after 9998.
    """
    if not 1970 <= instant.year <= 9998:
        raise ValueError(f"the year {instant.year} is not between 1970 and 9998")


def _within(where: str, rule, value) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001  a rule about any one value
    try:
        rule(value)
    except ValueError as error:
        text = str(error)
        raise ValueError(f"{text} - at `{where}`" if " - at `" not in text else text.replace(" - at `", f" - at `{where}.")) from None


def _check_model(model: Model) -> None:
    if len(set(model.tasks)) != len(model.tasks):
        raise ValueError("a task is listed twice - at `tasks`")
    if model.smoke.task not in model.tasks:
        raise ValueError(f"the test job's task {model.smoke.task!r} is not among the model's - at `smoke.task`")
    _within("smoke.timeout", units.seconds, model.smoke.timeout)
    _within("smoke.expect.regex", _check_regex, model.smoke.expect.regex)
    if model.smoke.expect.answer:
        _within("smoke.expect.answer", _check_answer, model.smoke.expect.answer)
    _within("runtime.version", _check_specifier, model.runtime.version)
    taken: set[str] = set()
    for index, artifact in enumerate(model.artifacts):
        where = f"artifacts[{index}]"
        _within(f"{where}.path", check_path, artifact.path)
        folded = artifact.path.casefold()
        if folded in taken:
            raise ValueError(f"path {artifact.path!r} is listed twice - at `{where}.path`")
        taken.add(folded)
        if not artifact.size and (artifact.unpack or artifact.path == model.entrypoint):
            raise ValueError(f"an {'archive' if artifact.unpack else 'entrypoint'} is not empty - at `{where}.size`")
        for place, url in enumerate(artifact.urls):
            _within(f"{where}.urls[{place}]", urls.check_source, url)
    _refuse_file_as_folder(taken)
    _within("entrypoint", check_path, model.entrypoint)
    unpacked = any(artifact.unpack for artifact in model.artifacts)
    if not unpacked and model.entrypoint not in {artifact.path for artifact in model.artifacts}:
        raise ValueError("names no artifact - at `entrypoint`")


def _check_answer(answer: Answer) -> None:
    if bool(answer.tokens) == bool(answer.embedding):
        raise ValueError("an answer is made of tokens or of an embedding")
    if any(position >= len(answer.tokens) for position in answer.sure):
        raise ValueError(f"a position is not among the {len(answer.tokens)} tokens - at `sure`")


def _refuse_file_as_folder(paths: set[str]) -> None:
    for path in paths:
        above = path
        while "/" in above:
            above = above.rpartition("/")[0]
            if above in paths:
                raise ValueError(f"{above!r} is both a file and a folder - at `artifacts`")


def check_path(path: str) -> None:
    """
    Refuse whatever is not a relative POSIX path that means the same thing everywhere (SPEC 2).

    One rule for artifacts and archive members. Not ``PurePosixPath``: it drops empty and ``.`` components silently, and not
    ``os.path.normpath``: it resolves ``..`` by text and so hides it.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        raise ValueError(f"path is longer than {MAX_PATH_BYTES} bytes")
    if "\\" in path:
        raise ValueError(f"backslash in path {path!r}")
    if any(unicodedata.category(character) in {"Cc", "Cs", "Cf", "Zl", "Zp"} for character in path):
        raise ValueError(f"control character in path {path!r}")
    if not unicodedata.is_normalized("NFC", path):
        raise ValueError(f"path {path!r} is not in Unicode NFC")
    for component in path.split("/"):
        if component in {"", ".", ".."}:
            raise ValueError(f"path {path!r} is not relative, or has an empty, `.` or `..` component")
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            raise ValueError(f"a component of path {path!r} is longer than {MAX_COMPONENT_BYTES} bytes")


def _check_specifier(text: str) -> None:
    if not text:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # a sixth of a plan's start; decoding alone needs it

    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(str(error)) from None


def _check_regex(text: str | None) -> None:
    if text is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `[[a]` is understood and merely warned of, on standard error, of every command
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def utc(instant: datetime) -> datetime:
    """Return *instant* in UTC, in whole seconds, as documents carry it."""
    return instant.astimezone(UTC).replace(microsecond=0)
