"""
``reconcile.toml``: the settings that a node's operator chooses.

Rules that hold here:

1. Every key has a default. An unknown key is an error that names the nearest known one.
2. Relative paths are relative to the file's folder, and so are those in hooks, which run there.
3. Sizes, times and addresses are checked when the file is read, and not when they are used.
4. Settings that were found, and not named by the caller, are used only if nobody but root and the caller can change them or any file that
   they name (``Settings.check_trusted``).
5. Environment variables win over the file (``environment``). What a variable names was named by the caller.

Longer than 400 lines because each key has a sentence beside it, from which the reference is made.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

from reconciler import environment, files
from reconciler.core import snapshot, units, urls
from reconciler.core.errors import SettingsError, UntrustedFile
from reconciler.core.node import Policy
from reconciler.core.text import tool_damage

Argv = tuple[str, ...]
#: A version, as PEP 440 has it, of a server.
VERSION = r"[0-9]+(\.[0-9]+){0,4}([a-z0-9.+-]{0,32})"
Positive = Annotated[int, Meta(ge=1, le=1024)]


class Network(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the signed snapshot and the trust root come from."""

    #: URL or path of the network's signed snapshot, or `oci://REGISTRY/REPOSITORY:TAG`.
    snapshot: str = "snapshot.json"
    #: The pinned trust root, an envelope in a file.
    root: str = "root.json"
    #: The fingerprint that the pinned root must have, received by another way than the file; empty: not compared.
    root_fingerprint: str = ""
    #: URL or path template with ``{version}`` at which newer trust roots are looked for; empty: none are.
    root_updates: str = ""
    #: The lock. ``snapshot.json``, the envelope that it was compiled from, is kept beside it.
    lockfile: str = "models.lock"
    #: How long no snapshot can be fetched until ``sync`` ends with exit code 6; before that it warns.
    quiet_after: str = "24h"


class StoreSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the store is and how much it may hold."""

    #: The store's folder.
    path: str = "store"
    #: Cold storage: a folder, often on another disk; empty: ``archive`` in the store.
    archive: str = ""
    #: Free space on the store's file system that is never used.
    reserve: str = "1GiB"
    #: How long the bytes of a model are kept after the snapshot stops listing it. It stops being active at once.
    grace: str = "24h"
    #: How many generations are kept.
    generations: Positive = 10
    #: How much of what failed is kept; the oldest goes first.
    quarantine: str = "10GiB"


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who this node is to its network: which rollouts it is in."""

    #: Its name, which ``reconcile init`` makes at random; a rollout reaches nodes in an order that follows from it.
    id: str = ""
    #: Groups that it belongs to, such as ``canary``: rollouts may name them.
    cohorts: tuple[str, ...] = ()


class HostCredential(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one host is sent, and no other; exactly one of these is given."""

    #: A file with a bearer token, which only its owner can read; ``%d/name`` is a credential that systemd passes on.
    token_file: str = ""
    #: The environment variable that holds a bearer token.
    token_env: str = ""
    #: A file with ``user:password``, which only its owner can read; ``%d/name`` as above.
    basic_file: str = ""


class Download(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How blobs are fetched."""

    #: Mirrors that are asked first, one at a time: URL templates with ``{algorithm}``, ``{hex}`` and ``{hex:2}``, its first two digits.
    mirrors: tuple[str, ...] = ()
    #: Further sources, tried last: URL templates such as ``https://mirror.example.org/{algorithm}/{hex}``.
    fallback: tuple[str, ...] = ()
    #: Hosts that may be contacted, or patterns such as ``*.example.org``; empty: those that the snapshot's sources and redirects,
    #: ``mirrors`` and ``fallback`` name.
    allowed_hosts: tuple[str, ...] = ()
    #: For a source's host, hosts or patterns that it may redirect to, beside those that the snapshot names.
    redirects: dict[str, tuple[str, ...]] = {}
    #: Whether plain http is allowed to hosts other than this machine.
    allow_http: bool = False
    #: Connections to each file's sources.
    connections: Annotated[int, Meta(ge=1, le=16)] = 8
    #: Files that are downloaded at once.
    concurrent: Annotated[int, Meta(ge=1, le=64)] = 4
    #: Most bytes per second, e.g. ``50MiB``; 0: no limit.
    limit: str = "0"
    #: A source that stays slower than this, in bytes per second, is left for the next one.
    min_rate: str = "1KiB"
    #: How long a source may take to answer.
    timeout: str = "60s"
    #: ``http://[user:password@]host:port``; empty: none.
    proxy: str = ""
    #: Certificate authorities for https, in place of the system's.
    ca_file: str = ""
    #: A netrc file with credentials by host; they are never sent to another host.
    netrc: str = ""
    #: Credentials by host, or host:port: one table ``[download.credentials."host"]`` for each. They are never sent to another host.
    credentials: dict[str, HostCredential] = {}


class SwarmTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Large files from other nodes, where the snapshot has torrents of them; HTTP stands behind it.

    ``reconcile swarm run`` is the process that talks to peers, as a user of its own (``reconcile-swarm.service``); it reads this table too.
    """

    #: Whether this node fetches from peers, and gives them what it has.
    enabled: bool = False
    #: The folder of that process, which its user owns.
    folder: str = "/var/lib/reconcile-swarm"
    #: The ports at which peers are answered, such as ``6881-6889``.
    ports: str = "6881-6889"
    #: Most bytes per second that peers are given, in all; 0: no limit.
    upload_limit: str = "0"
    #: How long a file is given to peers.
    seed_time: str = "24h"
    #: A file is no longer given once peers had so many times its size; 0: no limit.
    seed_ratio: Annotated[float, Meta(ge=0, le=1000)] = 2.0
    #: Free space below which nothing is fetched from peers. A file takes its size twice until it is in the store.
    reserve: str = "10GiB"
    #: Peers that stay slower than this, in bytes per second ...
    min_rate: str = "64KiB"
    #: ... for so long are left, and HTTP takes over.
    slow_after: str = "60s"
    #: HTTP takes over too where, after so long, one machine alone gives a file, no other node fetches it, and more than 15s are left.
    alone_after: str = "5s"


class SmokeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How test jobs are confined."""

    #: Which sandbox runs test jobs; ``auto`` takes the first that works. Without one, models stay ``pending``.
    sandbox: Literal["auto", "bubblewrap", "landlock"] = "auto"
    #: The longest time for one test job, whatever the snapshot allows it.
    timeout: str = "300s"


class LlamaCppSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine llama-cpp."""

    #: How many layers are put on the GPU; -1: all.
    gpu_layers: Annotated[int, Meta(ge=-1)] = -1
    #: Threads; 0: as the engine chooses. The bound is ggml's (GGML_MAX_N_THREADS); with more, every model would fail its test.
    threads: Annotated[int, Meta(ge=0, le=512)] = 0
    #: The GPUs that models are served on, and so tested on: their numbers as ``nvidia-smi -L`` lists them, or the beginnings of their
    #: UUIDs; a slice's begins with MIG-. Empty: those that the variable CUDA_VISIBLE_DEVICES names, else all.
    devices: tuple[str, ...] = ()
    #: Whether one model may be split over several of them. Otherwise it is tested on the one with the most free memory, and a model that
    #: fits on none of them alone is ``incompatible``.
    split: bool = False
    #: Folders with the GPU driver's and CUDA's libraries, where they are in no usual place.
    library_path: tuple[str, ...] = ()
    #: A folder with kernels that the driver compiled before, which test jobs read and cannot change; empty: each compiles what it needs.
    cuda_cache: str = ""


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A server with the OpenAI API, which runs the test jobs of the engine that the table is named for, as ``vllm`` in ``[runtime.vllm]``.

    It is started in the sandbox for each test job, and ended after it. There may be several such tables.
    """

    #: The command that starts it, with its absolute path. In it, ``{model}`` stands for the path of the model's entrypoint,
    #: ``{folder}`` for that of its folder, ``{name}`` for its name, ``{port}`` for the port on 127.0.0.1 at which it must listen, and
    #: ``{context}`` for the tokens of context that the test job needs. Empty: the engine is missing.
    argv: Argv = ()
    #: The server's version (PEP 440): snapshots may ask for one, and when it changes, models are tested again.
    version: str = ""
    #: A command that prints the version, instead of ``version``. It is asked again when its program, or a folder in ``bind``, has changed.
    version_argv: Argv = ()
    #: How long it may take until it answers. The time that the snapshot allows the test job begins then.
    ready_timeout: str = "120s"
    #: Further files and folders that it may read, such as a virtual environment or CUDA's libraries. The folder that its program is
    #: installed in, and every path in ``argv``, need not be named.
    bind: tuple[str, ...] = ()
    #: Variables of its environment.
    env: dict[str, str] = {}
    #: Folders with the GPU driver's and CUDA's libraries, where they are in no usual place. LD_LIBRARY_PATH in ``env`` replaces all.
    library_path: tuple[str, ...] = ()
    #: The most memory that its processes may use; 0: no bound of its own.
    memory: str = "0"
    #: The most shared memory, in ``/dev/shm``.
    shm: str = "1GiB"
    #: The largest file that it may write, and the size of the scratch folder in which it may; the folder is empty for each test job.
    file_size: str = "1GiB"
    #: The most processes that it may have at once.
    processes: Annotated[int, Meta(ge=1, le=65536)] = 512


class Runtimes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engines by name."""

    llama_cpp: LlamaCppSettings = field(default=LlamaCppSettings(), name="llama-cpp")
    #: Servers by the name of their engine: every other table in ``[runtime]``.
    servers: dict[str, ServerSettings] = {}

    def library_path(self, engine: str) -> tuple[str, ...]:
        """Return the folders with a GPU's libraries that the settings name for *engine*."""
        return self.llama_cpp.library_path if engine == "llama-cpp" else self.server(engine).library_path

    def server(self, engine: str) -> ServerSettings:
        """Return the settings of *engine*'s server; one without a command where there is none."""
        return self.servers.get(engine, ServerSettings())


class Serve(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that follows the active set. One table each, written ``[[serve]]``."""

    #: What kind of server it is.
    kind: Literal["llama-server", "llama-swap", "llama-cpp-python", "hf-cache", "ollama", "command", "http"] = "llama-server"
    #: Its name in the status and in metrics; unique.
    name: str = "main"
    #: The file, or for ``hf-cache`` and ``ollama`` the folder, that is written for it.
    path: str = ""
    #: How it is told of a change: a URL, or a command and its arguments. Empty: by the change of its file alone.
    reload: str | Argv = ""
    #: Ids, names or tasks (``task:chat``) of the models that it gets; empty: all.
    models: tuple[str, ...] = ()
    #: Passed on to the server's own file.
    options: dict[str, Any] = {}
    #: How long a reload that would unload a busy model waits for it at most; ``0s``: it does not ask whether one is busy.
    drain: str = "5m"


class Agent(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often the agent runs a cycle."""

    #: Time between two cycles.
    interval: str = "5m"
    #: The most that is added to it, different on each host, so that nodes do not all ask at once.
    jitter: str = "30s"
    #: Every blob is re-hashed at least this often.
    scrub_after: str = "30d"
    #: A file to which the status page is written after each cycle, one HTML file that loads nothing else; empty: none is.
    page: str = ""
    #: Where the agent serves its metrics and whether it is healthy, as HOST:PORT; empty: nowhere.
    metrics_address: str = "127.0.0.1:9460"


class Hooks(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The operator's own commands, run after a swap."""

    #: A command that is run after each swap, with ``index.json`` on standard input.
    activated: Argv = ()
    #: A command that must exit with 0 after a swap; otherwise the generation before becomes active again.
    healthy: Argv = ()
    #: How long ``healthy`` may take.
    healthy_timeout: str = "60s"


class Report(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where this node sends signed statuses, for the network's operator."""

    #: A folder, or an https address that takes them by POST; empty: none are sent.
    to: str = ""
    #: The node's private key, which only its owner can read; ``reconcile init`` makes it, with ``node.pub`` beside it.
    key: str = ""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, with the folder that relative paths are relative to."""

    network: Network = Network()
    store: StoreSettings = StoreSettings()
    node: Node = Node()
    download: Download = Download()
    swarm: SwarmTable = SwarmTable()
    smoke: SmokeSettings = SmokeSettings()
    runtime: Runtimes = Runtimes()
    serve: tuple[Serve, ...] = ()
    agent: Agent = Agent()
    report: Report = Report()
    hooks: Hooks = Hooks()
    base: str = "."

    def path(self, text: str) -> Path:
        """Return *text* as a path, relative to the settings' folder."""
        return Path(self.base, Path(text).expanduser())

    def command(self, argv: Argv) -> Argv:
        """Return *argv* with its program relative to the settings' folder, unless it is a name that PATH is searched for."""
        return (str(self.path(argv[0])), *argv[1:]) if argv and "/" in argv[0] else argv

    @property
    def engines(self) -> Runtimes:
        """The table ``[runtime]``, with the folders that servers may read relative to the settings' folder."""
        bound = {
            engine: msgspec.structs.replace(server, bind=self._absolute(server.bind), library_path=self._absolute(server.library_path))
            for engine, server in self.runtime.servers.items()
        }
        own = self.runtime.llama_cpp
        cache = self._absolute((own.cuda_cache,))[0] if own.cuda_cache else ""
        own = msgspec.structs.replace(own, library_path=self._absolute(own.library_path), cuda_cache=cache)
        return msgspec.structs.replace(self.runtime, llama_cpp=own, servers=bound)

    def _absolute(self, places: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(os.path.normpath(self.path(text).absolute()) for text in places)

    def check_trusted(self, uid: int, *, named: frozenset[str] = frozenset()) -> None:
        """
        Check that only root and the user *uid* can change the files that these settings name. For settings that the caller did not name.

        *named* are the keys that the caller did name, in the environment, as in ``[store] path``.

        Raises:
            UntrustedFile: another user can; the message names the key and the file.
            SettingsError: what a key names cannot be followed.
        """
        for key, path in self._files():
            if key in named:
                continue
            try:
                files.check_trusted_path(path, uid)
            except UntrustedFile as error:
                raise UntrustedFile(f"{key}: {error.message}", hint=error.hint) from None
            except OSError as error:
                raise SettingsError(f"{key}: {path} cannot be read: {error.strerror}") from None

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield every file and folder that these settings name, with the key that names it."""
        yield from ((key, self.path(text)) for key, text in self.paths())
        yield "the envelope beside [network] lockfile", self.envelope_path
        for key, argv in self.commands():
            yield from ((key, path) for path in self._programs(argv))

    def paths(self) -> Iterator[tuple[str, str]]:
        """Yield every path that these settings name but those in commands, as it is written, with the key that names it."""
        network, download = self.network, self.download
        named = [
            ("[network] root", network.root), ("[network] snapshot", network.snapshot), ("[network] lockfile", network.lockfile),
            ("[network] root_updates", network.root_updates), ("[download] ca_file", download.ca_file),
            ("[download] netrc", download.netrc), ("[store] path", self.store.path), ("[store] archive", self.store.archive),
            ("[agent] page", self.agent.page),
            ("[report] key", self.report.key),
        ]  # fmt: skip
        named += [(f"[runtime.{engine}] bind", text) for engine, server in self.runtime.servers.items() for text in server.bind]
        named += [("[runtime.llama-cpp] cuda_cache", self.runtime.llama_cpp.cuda_cache)]
        tables = {"llama-cpp": self.runtime.llama_cpp.library_path} | {name: one.library_path for name, one in self.runtime.servers.items()}
        named += [(f"[runtime.{engine}] library_path", text) for engine, places in tables.items() for text in places]
        for host, one in download.credentials.items():
            named += [(f"[download.credentials.{host!r}]", text) for text in (one.token_file, one.basic_file) if not text.startswith("%d/")]
        named += [(f"[[serve]] {server.name} path", server.path) for server in self.serve]
        yield from ((key, text) for key, text in named if text and "://" not in text)

    def commands(self) -> Iterator[tuple[str, Argv]]:
        """Yield every command that these settings name, empty where none is set, with its key."""
        yield "[hooks] activated", self.hooks.activated
        yield "[hooks] healthy", self.hooks.healthy
        for engine, server in self.runtime.servers.items():
            yield f"[runtime.{engine}] argv", server.argv
            yield f"[runtime.{engine}] version_argv", server.version_argv
        yield from ((f"[[serve]] {one.name} reload", one.reload) for one in self.serve if isinstance(one.reload, tuple))

    def programs(self) -> Iterator[tuple[str, str]]:
        """Yield the program of every command that is named by a path, as it is written, with the key that names it."""
        yield from ((key, argv[0]) for key, argv in self.commands() if argv and "/" in argv[0])

    def _programs(self, argv: Argv) -> Iterator[Path]:
        """Yield the files that a command may run: its program, and each further word that can be a script, as in ``["sh", "hook.sh"]``."""
        for word in self.command(argv)[:1]:
            if "/" in word:
                yield Path(word)
        for word in argv[1:]:
            if not word.startswith("/") or os.path.isfile(word):  # noqa: PTH113  it accepts a text of any length
                yield Path(self.base, word)

    @property
    def store_path(self) -> Path:
        """The store's folder."""
        return self.path(self.store.path)

    @property
    def archive_path(self) -> Path:
        """The folder of cold storage."""
        return self.path(self.store.archive) if self.store.archive else self.store_path / "archive"

    @property
    def envelope_path(self) -> Path:
        """Where the signed envelope is kept, beside the lock."""
        return self.path(self.network.lockfile).with_name("snapshot.json")

    def own(self, path: Path) -> str:
        """Return which of the node's own files *path* is, as in "the lock"; empty if it is none. No other output may replace them."""
        place = Path(os.path.realpath(path))
        named = {"the lock": self.network.lockfile, "the trust root": self.network.root, "the snapshot": self.network.snapshot}
        here = {what: self.path(text) for what, text in named.items() if "://" not in text}
        here["the envelope beside the lock"] = self.envelope_path
        if self.report.key:
            here["the node's key"] = self.path(self.report.key)
        folders = {"in the store": self.store_path, "in cold storage": self.archive_path}
        found = [what for what, own in here.items() if place == Path(os.path.realpath(own))]
        found += [what for what, own in folders.items() if place.is_relative_to(os.path.realpath(own))]
        return found[0] if found else ""

    @property
    def policy(self) -> Policy:
        """The limits that these settings set, in bytes and seconds."""
        return Policy(
            reserve_bytes=units.size(self.store.reserve),
            grace_seconds=units.seconds(self.store.grace),
            generations=self.store.generations,
            quarantine_bytes=units.size(self.store.quarantine),
            scrub_seconds=units.seconds(self.agent.scrub_after),
            fallback=self.download.fallback,
        )


_SIZES = (
    ("store", "reserve"), ("store", "quarantine"), ("download", "limit"), ("download", "min_rate"), ("swarm", "upload_limit"),
    ("swarm", "reserve"), ("swarm", "min_rate"),
)  # fmt: skip
_TIMES = (
    ("network", "quiet_after"), ("store", "grace"), ("download", "timeout"), ("smoke", "timeout"), ("agent", "interval"),
    ("agent", "jitter"), ("agent", "scrub_after"), ("hooks", "healthy_timeout"), ("swarm", "seed_time"), ("swarm", "slow_after"),
    ("swarm", "alone_after"),
)  # fmt: skip


_NO_VARIABLES: Mapping[str, str] = {}


def decode(data: bytes, base: Path, name: str = "reconcile.toml", variables: Mapping[str, str] = _NO_VARIABLES) -> Settings:
    """
    Return the settings in *data*, under those of the environment's *variables*; relative paths in both are relative to *base*.

    Raises:
        SettingsError: not TOML, an unknown key, or an invalid value; the message contains *name* and the key.
    """
    tree = _with_servers(read_tree(data, name), name)
    _refuse_unknown(tree, Settings, name, "")
    tree = environment.overlay(tree, Settings, variables)
    named = environment.given(Settings, variables).values()
    name = f"{name} and the environment ({', '.join(named)})" if named else name
    if any("\0" in text for text in _texts(tree)):
        raise SettingsError(f"{name} has a NUL character in a value, which no path, address or command may have")
    try:
        settings = msgspec.convert(tree | {"base": str(base)}, Settings)
        _check(settings)
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"{name}: {str(error).replace('`$.', '`')}", hint=_legal_hint(str(error))) from None
    return settings


def _legal_hint(message: str) -> str:
    """Return what the key may be that msgspec's *message* names; empty where it names none."""
    found = re.search(r"`\$\.([\w.-]+)", message)
    of = dict(environment.keys(Settings)).get(tuple(found[1].split("."))) if found else None
    return f"{found[1]} is {environment.legal(of)}; its default is {_default_of(found[1])}" if found and of else ""


def _default_of(key: str) -> str:
    """Return the default of *key*, such as ``store.grace``, as TOML writes it."""
    import json

    value: Any = Settings()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name.replace("-", "_"))
    return json.dumps(msgspec.to_builtins(value))


def keys_from(variables: Mapping[str, str]) -> frozenset[str]:
    """Return the keys that the environment's *variables* set, as messages name them: ``[store] path``."""
    return frozenset(f"[{'.'.join(path[:-1])}] {path[-1]}" for path in environment.given(Settings, variables))


def read_tree(data: bytes, name: str) -> dict[str, Any]:
    """Return the tables in *data*, the bytes of a settings file; raises SettingsError where it is not TOML."""
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise SettingsError(
            f"{name} is not TOML: {tool_damage(data) or error}", hint="it is UTF-8 text, as `reconcile init` writes it"
        ) from None


#: Times that must be more than zero; the others may be zero.
_SPANS = {"slow_after", "timeout", "ready_timeout", "healthy_timeout", "interval"}


def _check(settings: Settings) -> None:
    for table, key in _SIZES:
        _check_amount(f"[{table}] {key}", units.size, getattr(getattr(settings, table), key), least=0)
    for table, key in _TIMES:
        _check_amount(f"[{table}] {key}", units.seconds, getattr(getattr(settings, table), key), least=0.001 if key in _SPANS else 0)
    _check_addresses(settings)
    _check_homes(settings)
    _check_swarm(settings)
    _check_places(settings)
    _check_report(settings)
    for text in (settings.node.id, *settings.node.cohorts):
        if len(text) > 256 or not text.isprintable():
            raise ValueError(f"[node] {text[:40]!r}: it is longer than 256 characters, or has one that is not printable")
    _check_llama_cpp(settings.runtime.llama_cpp)
    for engine, server in settings.runtime.servers.items():
        _check_server(f"[runtime.{engine}]", server)
    _check_served(settings)
    for key in ("mirrors", "fallback"):
        for template in getattr(settings.download, key):
            _check_address(f"[download] {key}", urls.check_own_template, template)


def _check_amount(name: str, read: Callable[[str], float], text: str, *, least: float) -> None:
    try:
        amount = read(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if amount and text.strip().replace(".", "", 1).isdecimal():
        example = {"size": "512MiB or 10GiB", "seconds": "90s, 5m, 24h or 7d"}[read.__name__]
        raise ValueError(f"{name}: {text!r} has no unit; write it like {example}")
    if amount < least:
        raise ValueError(f"{name}: {text!r} is too little; it must be more than zero")


def _check_swarm(settings: Settings) -> None:
    chosen = settings.swarm
    first, _, last = chosen.ports.partition("-")
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", chosen.ports, re.ASCII) or not 1024 <= int(first) <= int(last or first) <= 65535:
        raise ValueError(f"[swarm] ports: {chosen.ports[:40]!r} is no range of ports from 1024 to 65535, such as 6881-6889")
    _check_home("[swarm] folder", settings, chosen.folder)
    if Path(os.path.normpath(settings.path(chosen.folder))).is_relative_to(os.path.normpath(settings.store_path)):
        raise ValueError("[swarm] folder: it is in the store, to which the swarm's process must not write")


def _check_addresses(settings: Settings) -> None:
    """Refuse an address from which nothing can be fetched; else it would look like a network that does not answer."""
    network = settings.network
    for key, text in (("snapshot", network.snapshot), ("root_updates", network.root_updates)):
        scheme = re.match("([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
        if scheme and scheme[1] == "oci" and key == "snapshot":  # its form is checked where it is read
            continue
        if scheme and scheme[1] not in {"https", "http"}:  # only the scheme is shown: the rest may be a secret
            raise ValueError(
                f"[network] {key}: nothing is fetched from {scheme[0]}…; write a path, or an address that begins with https://"
            )
        if scheme:
            _check_address(f"[network] {key}", urls.check_url, text.replace("{version}", "1"))
    if network.root_updates and "{version}" not in network.root_updates:
        raise ValueError("[network] root_updates: it does not contain {version}, which stands for the version of the root")
    _check_proxy(settings.download.proxy)
    for pattern in settings.download.allowed_hosts:
        _check_address("[download] allowed_hosts", urls.check_pattern, pattern)
    for host, patterns in settings.download.redirects.items():
        _check_address("[download] redirects", urls.check_host, host)
        for pattern in patterns:
            _check_address("[download] redirects", urls.check_pattern, pattern)
    for host, credential in settings.download.credentials.items():
        _check_credential(host, credential)


def _check_credential(host: str, credential: HostCredential) -> None:
    name, _, port = host.rpartition(":") if re.search(r"[^:]:[0-9]+$", host) else (host, "", "")
    _check_address("[download.credentials]", urls.check_host, name.strip("[]"))
    if port and not 0 < int(port) < 65536:
        raise ValueError(f"[download.credentials] {host!r}: {port} is no port")
    given = [key for key in ("token_file", "token_env", "basic_file") if getattr(credential, key)]
    if len(given) != 1:
        raise ValueError(f"[download.credentials.{host!r}]: exactly one of token_file, token_env and basic_file is given, not {len(given)}")


def _check_proxy(text: str) -> None:
    try:
        parts = urlsplit(text)
        is_proxy = parts.scheme == "http" and parts.hostname and parts.port and f"{parts.path}{parts.query}{parts.fragment}" in {"", "/"}
    except ValueError:  # no port, or no address
        is_proxy = False
    if text and not is_proxy:  # it is not shown, because it may contain a password
        raise ValueError("[download] proxy: it is not of the form http://[user:password@]host:port")


def _check_address(name: str, check: Callable[[str], None], text: str) -> None:
    try:
        check(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_homes(settings: Settings) -> None:
    """Refuse a path that begins with ``~`` where the home folder is not known: no such user, or a container without ``HOME``."""
    for key, text in (*settings.paths(), *settings.programs()):
        _check_home(key, settings, text)


def _check_home(key: str, settings: Settings, text: str) -> None:
    try:
        settings.path(text)
    except RuntimeError:
        raise ValueError(f"{key}: {text!r}: the home folder that ~ stands for is not known here; write the path in full") from None


def _check_places(settings: Settings) -> None:
    """Refuse one path for two files: the one that is written last would replace the other."""
    network = settings.network
    taken: dict[Path, str] = {}
    for key, text in (("[network] root", network.root), ("[network] lockfile", network.lockfile), ("[store] path", settings.store.path)):
        if not text:
            raise ValueError(f"{key}: it is empty")
        _claim(taken, key, settings, text)
    _claim(taken, "the envelope beside [network] lockfile", settings, str(settings.envelope_path))
    for key, text in (("[store] archive", settings.store.archive), ("[agent] page", settings.agent.page)):
        if text:
            _claim(taken, key, settings, text)
    if "://" not in network.snapshot and settings.path(network.snapshot) != settings.envelope_path:
        _claim(taken, "[network] snapshot", settings, network.snapshot)
    page = Path(os.path.normpath(settings.path(settings.agent.page)))
    if settings.agent.page and page.is_relative_to(os.path.normpath(settings.store_path)):
        raise ValueError("[agent] page: it is in the store, whose other files are private; name a place outside of it")
    for server in settings.serve:
        if server.path:
            _claim(taken, f"[[serve]] {server.name} path", settings, server.path)


def _check_report(settings: Settings) -> None:
    to = settings.report.to
    if not to:
        return
    if "://" in to:
        _check_address("[report] to", urls.check_url, to)
    else:
        _check_home("[report] to", settings, to)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", settings.node.id, re.ASCII):
        raise ValueError(
            "[report] to: statuses name this node by [node] id, which must be letters, digits and . _ -, at most 128, a letter or digit "
            f"first; it is {settings.node.id[:40]!r} (`reconcile init` writes a random one)"
        )
    if not settings.report.key:
        raise ValueError("[report] to: statuses are signed, and [report] key is empty; `reconcile init` makes a key")


def _claim(taken: dict[Path, str], key: str, settings: Settings, text: str) -> None:
    place = Path(os.path.normpath(settings.path(text)))
    if place in taken:
        raise ValueError(f"{key}: {place} is also {taken[place]}")
    taken[place] = key


#: An engine that is no server, and one whose table may name no command.
_NO_SERVER, _MAY_LACK = "llama-cpp", "openai"
#: What stands for something in a server's command.
PLACEHOLDERS = ("model", "folder", "name", "port", "context")
#: Folders that no server is given: they hold sockets of other programs, and what the kernel says of the machine.
_DRIVER_ON_NIXOS = "/run/opengl-driver/lib"
_NEVER_BOUND = ("/proc", "/sys", "/dev", "/run", "/var/run")


def _with_servers(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Return *tree* with the tables of servers, whose names are the network's, in a table of their own; each of them is checked."""
    runtime = tree.get("runtime")
    if not isinstance(runtime, dict):
        return tree
    own = {engine: table for engine, table in runtime.items() if engine == _NO_SERVER}
    servers = {engine: _server_table(engine, table, name) for engine, table in runtime.items() if engine != _NO_SERVER}
    return tree | {"runtime": own | {"servers": servers}}


def _server_table(engine: str, table: Any, name: str) -> dict[str, Any]:
    where = f"runtime.{engine}"
    named = isinstance(table, dict) and ("argv" in table or engine == _MAY_LACK)
    if not named and (not isinstance(table, dict) or _nearest(engine, dict.fromkeys((_NO_SERVER, _MAY_LACK)), "").startswith("did")):
        raise SettingsError(f"{name}: unknown key {where!r}", hint=_nearest(engine, dict.fromkeys((_NO_SERVER, _MAY_LACK)), "runtime."))
    _refuse_unknown(table, ServerSettings, name, f"{where}.")
    if not table.get("argv") and engine != _MAY_LACK:
        raise SettingsError(f"{name}: [{where}] argv: it is missing", hint="name the command that starts the server")
    try:
        msgspec.convert(engine, snapshot.Name)
        msgspec.convert(table, ServerSettings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{name}: {str(error).replace('`$.', f'`{where}.')}") from None
    return dict(table)


def _check_server(where: str, chosen: ServerSettings) -> None:
    _check_amount(f"{where} ready_timeout", units.seconds, chosen.ready_timeout, least=0.001)
    for key, least in (("memory", 0), ("shm", 1), ("file_size", 1)):
        _check_amount(f"{where} {key}", units.size, getattr(chosen, key), least=least)
    if chosen.version and not re.fullmatch(VERSION, chosen.version):
        raise ValueError(f"{where} version: {chosen.version!r} is not a version such as 1.2.3")
    if chosen.version and chosen.version_argv:
        raise ValueError(f"{where} version: it is given twice, also by version_argv; leave one of them out")
    for key, argv in (("argv", chosen.argv), ("version_argv", chosen.version_argv)):
        if argv and not argv[0].startswith("/"):
            raise ValueError(f"{where} {key}: {argv[0]!r} is not an absolute path; PATH is not searched")
    _check_placeholders(where, chosen)
    _check_given(f"{where} bind", chosen.bind)
    _check_given(f"{where} library_path", chosen.library_path)
    for variable in chosen.env:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ValueError(f"{where} env: {variable!r} is not the name of a variable")


def _check_given(where: str, places: tuple[str, ...]) -> None:
    """Refuse folders that no test job is given to read, whatever is in them."""
    for text in places:
        place = os.path.normpath(text)
        allowed = place == _DRIVER_ON_NIXOS
        if not allowed and (place in {"/", "."} or any(place == one or place.startswith(f"{one}/") for one in _NEVER_BOUND)):
            raise ValueError(f"{where}: {text!r} is not given to a server; name the folder that it needs")


def _check_llama_cpp(chosen: LlamaCppSettings) -> None:
    where = "[runtime.llama-cpp]"
    _check_given(f"{where} library_path", chosen.library_path)
    _check_given(f"{where} cuda_cache", (chosen.cuda_cache,) if chosen.cuda_cache else ())
    for word in chosen.devices:
        if not re.fullmatch(r"\d{1,4}|(GPU|MIG)-[0-9A-Za-z/-]{1,100}", word):
            raise ValueError(f"{where} devices: {word!r} names no GPU; write its number, or its UUID as `nvidia-smi -L` lists it")


def _check_placeholders(where: str, chosen: ServerSettings) -> None:
    """Refuse a misspelled placeholder, which the server would take for what it says."""
    import difflib

    for word in re.findall(r"\{([a-z_]+)\}", " ".join(chosen.argv)):
        near = difflib.get_close_matches(word, PLACEHOLDERS, n=1, cutoff=0.7)
        if near and word not in PLACEHOLDERS:
            raise ValueError(f"{where} argv: {{{word}}} stands for nothing; did you mean {{{near[0]}}}?")


#: Kinds for which a file or a folder is written.
_WITH_PATH = frozenset(("llama-server", "llama-swap", "llama-cpp-python", "hf-cache", "ollama"))
_SERVER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WANTED = re.compile(r"task:[a-z0-9][a-z0-9._-]*|[a-z0-9][a-z0-9._-]{0,127}(:[A-Za-z0-9][A-Za-z0-9._-]{0,63})?")


def _check_served(settings: Settings) -> None:
    names = [server.name for server in settings.serve]
    for server in settings.serve:
        if names.count(server.name) > 1:
            raise ValueError(f"[[serve]] name: {server.name!r} is there twice, and it must be unique")
        if fault := _fault_of(server, settings):
            raise ValueError(f"[[serve]] {server.name}: {fault}")
        _check_amount(f"[[serve]] {server.name} drain", units.seconds, server.drain, least=0)


def _fault_of(server: Serve, settings: Settings) -> str:
    """Return what is wrong with the table of *server*, or an empty text."""
    if not _SERVER_NAME.fullmatch(server.name):
        return "its name is not of letters, digits, dots, hyphens and underscores"
    if server.kind in _WITH_PATH and not server.path:
        return f"the kind {server.kind} needs a path, where it is written"
    if server.kind not in _WITH_PATH and server.path:
        return f"nothing is written for the kind {server.kind}, so it has no path"
    if server.path and Path(os.path.normpath(settings.path(server.path))).is_relative_to(os.path.normpath(settings.store_path)):
        return "its path is in the store, where everything belongs to reconcile"
    if wrong := [one for one in server.models if not _WANTED.fullmatch(one)]:
        return f"models: {wrong[0]!r} is no model id, no name and no task:NAME"
    return _fault_of_reload(server)


def _fault_of_reload(server: Serve) -> str:
    if isinstance(server.reload, tuple):
        return "reload: the address of the kind http is a URL" if server.kind == "http" else "" if server.reload else "reload: it is empty"
    if server.kind == "command":
        return 'reload: the kind command needs a command and its arguments, as in ["./tell", "router"]'
    if not server.reload:
        return "reload: the kind http needs the URL that gets the index" if server.kind == "http" else ""
    try:
        parts = urlsplit(server.reload)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.username is None and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    return "" if is_url else "reload: it is neither a URL of the form http://HOST:PORT/… without a user, nor a command with its arguments"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _refuse_unknown(tree: dict[str, Any], kind: type[Struct], name: str, where: str) -> None:
    """Refuse an unknown key with the nearest known one as a hint, which msgspec does not give."""
    known = {found.encode_name: found.type for found in msgspec.structs.fields(kind) if found.name != "base"}
    for key, value in tree.items():
        if key not in known:
            raise SettingsError(f"{name}: unknown key {where + key!r}", hint=_nearest(key, known, where))
        if isinstance(value, dict) and isinstance(known[key], type) and issubclass(known[key], Struct):
            _refuse_unknown(value, known[key], name, f"{where}{key}.")
        elif isinstance(value, dict) and known[key] == dict[str, HostCredential]:
            for host, table in value.items():
                if isinstance(table, dict):
                    _refuse_unknown(table, HostCredential, name, f"{where}{key}.{host!r}.")
        if key == "serve" and isinstance(value, list):
            for table in value:
                _refuse_unknown(table if isinstance(table, dict) else {}, Serve, name, f"{where}{key}.")


def _nearest(key: str, known: dict[str, Any], where: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {where + near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
