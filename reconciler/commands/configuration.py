"""
``config show`` and ``config check``: what the settings are, where each one comes from, and whether what they name is there.

Rules that hold here:

1. Nothing is changed and nothing is fetched.
2. No secret is shown: an address is shown without user and query, a proxy without its password, and of variables their names alone.
3. A check yields everything that it finds, and not the first alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from reconciler import environment
from reconciler.commands import documents
from reconciler.core import trust
from reconciler.core.errors import ReconcileError
from reconciler.settings import ServerSettings, Settings
from reconciler.settings_file import read_tree

Origin = Literal["default", "file", "environment"]
_SERVERS = ("runtime", "servers")
#: The one key that holds a list of tables.
_TABLES = ("serve",)


class Setting(Struct, frozen=True, kw_only=True):
    """One key with its value and where that comes from."""

    key: str  #: With its table, as in `store.path`.
    value: Any  #: Its value, without secrets.
    origin: Origin  #: Where it comes from.
    where: str = ""  #: The file, or the environment variable; empty for a default.
    variable: str = ""  #: The environment variable that sets it; empty: none does.


class Finding(Struct, frozen=True, kw_only=True):
    """Something that a setting names and that is not as a run needs it."""

    key: str  #: The key.
    text: str  #: What is wrong.
    hint: str = ""  #: What to do.


def show(settings: Settings, file: Path | None, data: bytes, variables: Mapping[str, str]) -> tuple[Setting, ...]:
    """Return every key of *settings*, which *data*, the bytes of *file*, and the environment's *variables* set."""
    values: dict[str, Any] = msgspec.to_builtins(settings)
    values["runtime"] |= values["runtime"]["servers"]  # as in the file, where each server is a table of its own
    tree = read_tree(data, str(file)) if file else {}
    from_variables = environment.given(Settings, variables)
    return tuple(_setting(path, values, tree, str(file), from_variables) for path in _paths(settings))


def _paths(settings: Settings) -> Iterator[tuple[str, ...]]:
    for path, _ in environment.keys(Settings):
        if path == _TABLES and not settings.serve:
            continue
        if path != _SERVERS:
            yield path
            continue
        for engine in settings.runtime.servers:
            yield from (inner for inner, _ in environment.keys(ServerSettings, ("runtime", engine)))


def _setting(
    path: tuple[str, ...], values: dict[str, Any], tree: dict[str, Any], file: str, variables: Mapping[tuple[str, ...], str]
) -> Setting:
    in_file, _ = _find(tree, path)
    origin: Origin = "environment" if path in variables else "file" if in_file else "default"
    where = variables.get(path, file if in_file else "")
    name = "" if path == _TABLES or (path[0] == "runtime" and path[:2] != ("runtime", "llama-cpp")) else environment.variable(path)
    return Setting(key=".".join(path), value=_shown(path, _find(values, path)[1]), origin=origin, where=where, variable=name)


def _find(tree: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False, None
        tree = tree[name]
    return True, tree


def _shown(path: tuple[str, ...], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: "…" if path[-1] == "env" else _shown((*path, name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(path, inner) for inner in value]
    return documents.redacted(value) if isinstance(value, str) and "://" in value else value


def to_toml(settings: tuple[Setting, ...]) -> Iterator[str]:
    """Yield the lines of a settings file that says the same, with the origin of each key as a comment."""
    import tomli_w

    table = ""
    width = 0
    for one in settings:
        place = one.key.rpartition(".")[0]
        if (one.key,) == _TABLES:
            yield from ("", *tomli_w.dumps({one.key: one.value}).rstrip().splitlines())
            continue
        if place != table:
            table = place
            yield ""
            yield f"[{place}]"
            width = max(len(_line(tomli_w.dumps, other)) for other in settings if other.key.rpartition(".")[0] == place)
        comment = one.where if one.origin == "environment" else one.origin
        yield f"{_line(tomli_w.dumps, one):<{min(width, 60)}}  # {comment}"


def _line(dumps: Any, one: Setting) -> str:
    return _assigned(dumps, one.key.rpartition(".")[2], one.value)


def _assigned(dumps: Any, key: str, value: Any) -> str:
    """Return *value* assigned to *key* in one line; a table is written in braces."""
    text: str = dumps({key: 0 if isinstance(value, dict) else value}, multiline_strings=False)
    line = " ".join(text.split())
    if not isinstance(value, dict):
        return line
    inner = ", ".join(_assigned(dumps, name, one) for name, one in value.items())
    return f"{line.removesuffix('0')}{{ {inner} }}" if inner else f"{line.removesuffix('0')}{{}}"


def check(settings: Settings) -> tuple[Finding, ...]:
    """Return what *settings* name and a run would not find; that their values are valid was checked when they were read."""
    return (*_root(settings), *_files(settings), *_programs(settings))


def _root(settings: Settings) -> Iterator[Finding]:
    path, key = settings.path(settings.network.root), "[network] root"
    try:
        with documents.named(str(path), documents.BAD_ROOT_HINT):
            trust.pin(path.read_bytes(), settings.network.root_fingerprint)
    except OSError as error:
        yield Finding(key=key, text=f"{path} cannot be read: {error.strerror}", hint="get root.json from the network's operator")
    except ReconcileError as error:
        yield Finding(key=key, text=error.message, hint=error.hint)


def _files(settings: Settings) -> Iterator[Finding]:
    """Look at what must be there before a run, and at the folders of what a run makes."""
    for key, text in settings.paths():
        path = settings.path(text)
        if key in {"[download] ca_file", "[download] netrc"} and not os.access(path, os.R_OK):
            yield Finding(
                key=key, text=f"{path} is not there, or cannot be read", hint="correct the path, or let the user who runs reconcile read it"
            )
        if key == "[network] snapshot" and not path.is_file():
            yield Finding(key=key, text=f"{path} is not there", hint="name the URL or the file of the network's signed snapshot")
        if key in {"[network] lockfile", "[agent] page"} and not path.parent.is_dir():
            yield Finding(key=key, text=f"its folder {path.parent} is not there", hint=f"make it: `mkdir -p {path.parent}`")


def _programs(settings: Settings) -> Iterator[Finding]:
    for key, argv in settings.commands():
        program = settings.command(argv)[0] if argv else ""
        if program and shutil.which(program) is None:
            yield Finding(key=key, text=f"{program} is not there, or cannot be run", hint="install it, or correct the path")
