"""
Reading ``reconcile.toml``: from bytes and environment variables to checked ``Settings``.

Rules that hold here:

1. An unknown key is an error that names the nearest known one.
2. Sizes, times and addresses are checked when the file is read, and not when they are used.
3. Environment variables win over the file (``environment``). What a variable names was named by the caller.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from reconciler import environment
from reconciler.core import snapshot, units, urls
from reconciler.core.errors import SettingsError
from reconciler.core.text import tool_damage
from reconciler.settings import VERSION, HostCredential, LlamaCppSettings, Serve, ServerSettings, Settings

_SIZES = (
    ("store", "reserve"), ("store", "quarantine"), ("download", "limit"), ("download", "min_rate"), ("swarm", "upload_limit"),
    ("swarm", "reserve"), ("swarm", "min_rate"),
)  # fmt: skip
_TIMES = (
    ("network", "quiet_after"), ("store", "grace"), ("download", "timeout"), ("smoke", "timeout"), ("agent", "interval"),
    ("agent", "jitter"), ("agent", "scrub_after"), ("hooks", "healthy_timeout"), ("swarm", "seed_time"), ("swarm", "slow_after"),
    ("swarm", "alone_after"),
)  # fmt: skip


def decode(data: bytes, base: Path, name: str = "reconcile.toml", variables: Mapping[str, str] = {}) -> Settings:
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
    return environment.hint_for_key(Settings, found[1]) if found else ""


def keys_from(variables: Mapping[str, str]) -> frozenset[str]:
    """Return the keys that the environment's *variables* set, as messages name them: ``[store] path``."""
    return frozenset(f"[{'.'.join(path[:-1])}] {path[-1]}" for path in environment.given(Settings, variables))


def read_tree(data: bytes, name: str) -> dict[str, Any]:
    """Return the tables in *data*, the bytes of a settings file; raises SettingsError where it is not TOML."""
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        hint = "it is UTF-8 text, as `reconcile init` writes it"
        raise SettingsError(f"{name} is not TOML: {tool_damage(data) or error}", hint=hint) from None


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
