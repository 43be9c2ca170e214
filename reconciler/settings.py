"""
The settings that a node's operator chooses: each table of ``reconcile.toml``, with its keys. ``settings_file`` reads and checks them.

Rules that hold here:

1. Every key has a default.
2. Relative paths are relative to the file's folder, and so are those in hooks, which run there.
3. Settings that were found, and not named by the caller, are used only if nobody but root and the caller can change them or any file that
   they name (``Settings.check_trusted``).

Longer than 400 lines because each key has a sentence beside it, from which the reference is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from reconciler import files
from reconciler.core import units
from reconciler.core.errors import SettingsError, UntrustedFile
from reconciler.core.node import Policy

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
