"""
Settings from environment variables: ``RECONCILE_STORE_PATH`` is ``path`` in the table ``[store]``.

Rules that hold here:

1. A variable's name is that of its key, in capitals, with ``_`` for each ``.`` and ``-``; every key of a table with fixed keys has one.
2. Text is taken as it is. Any other value is written as in TOML: ``true``, ``8``, ``["a", "b"]``.
3. A variable that begins as one of a table does, and names no key of it, is an error that names the nearest, as an unknown key is.
4. Variables win over the settings file, and the command line wins over both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import msgspec
from msgspec import Struct

from reconciler.core.errors import SettingsError

PREFIX = "RECONCILE_"
#: What begins as a variable of a table does, and is none of the settings.
_OTHERS = frozenset({"RECONCILE_CONFIG", "RECONCILE_PASSPHRASE_FILE"})

Path = tuple[str, ...]


def keys(kind: type[Struct], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path of every key of *kind* with its type: those of tables with fixed keys, in the order in which they are defined."""
    for found in msgspec.structs.fields(kind):
        if found.name == "base":
            continue
        inner = (*path, found.encode_name)
        if isinstance(found.type, type) and issubclass(found.type, Struct):
            yield from keys(found.type, inner)
        else:
            yield inner, found.type


def variable(path: Path) -> str:
    """Return the name of the variable of the key at *path*."""
    return PREFIX + "_".join(path).upper().replace("-", "_")


def given(kind: type[Struct], variables: Mapping[str, str]) -> dict[Path, str]:
    """
    Return which keys of *kind* are set by *variables*, each with its variable.

    Raises:
        SettingsError: a variable of a table names no key of it.
    """
    set_here = sorted(name for name in variables if name.startswith(PREFIX) and name not in _OTHERS)
    if not set_here:
        return {}
    known = {variable(path): path for path, of in keys(kind) if _is_plain(of)}
    for name in set_here:
        if name not in known and any(name.startswith(f"{variable((table,))}_") for table in _tables(kind)):
            raise SettingsError(f"the environment variable {name} names no key of the settings", hint=_nearest(name, known))
    return {known[name]: name for name in set_here if name in known}


def overlay(tree: dict[str, Any], kind: type[Struct], variables: Mapping[str, str]) -> dict[str, Any]:
    """
    Return *tree*, a settings file's content, with what *variables* say put over it.

    Raises:
        SettingsError: a variable of a table names no key of it, or its value is not TOML.
    """
    found = given(kind, variables)
    types = dict(keys(kind)) if found else {}
    for path, name in found.items():
        tree = _with(tree, path, _value(name, variables[name], types[path]))
    return tree


def legal(of: Any) -> str:
    """Return what a value of the type *of* may be, for people: ``auto, bubblewrap or landlock``; ``a whole number from 1 to 16``."""
    schema = msgspec.json.schema(of)
    if "enum" in schema:
        *most, last = map(str, schema["enum"])
        return f"{', '.join(most)} or {last}" if most else last
    if schema.get("type") == "integer":
        low, high = schema.get("minimum"), schema.get("maximum")
        return f"a whole number{f' from {low}' if low is not None else ''}{f' to {high}' if high is not None else ''}"
    words = {"boolean": "true or false", "array": 'a list of texts, such as ["a", "b"]', "string": "text in quotation marks"}
    return words.get(schema.get("type", ""), "a table")


def hint_for_key(kind: type[Struct], key: str) -> str:
    """Return what *key* of *kind*, such as ``store.grace``, may be, and its default; empty if there is no such key."""
    of = dict(keys(kind)).get(tuple(key.split(".")))
    return f"{key} is {legal(of)}; its default is {_default_of(kind, key)}" if of else ""


def _default_of(kind: type[Struct], key: str) -> str:
    """Return the default of *key* as TOML writes it."""
    import json

    value: Any = kind()
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name.replace("-", "_"))
    return json.dumps(msgspec.to_builtins(value))


def _tables(kind: type[Struct]) -> list[str]:
    return [found.encode_name for found in msgspec.structs.fields(kind) if found.name != "base"]


def _is_plain(of: Any) -> bool:
    """Return whether one variable can hold a value of this type: no table, and no list of tables."""
    if get_origin(of) is tuple:
        return not (isinstance(inner := get_args(of)[0], type) and issubclass(inner, Struct))
    schema = msgspec.json.schema(of)
    return schema.get("type") in {"string", "integer", "number", "boolean"} or "enum" in schema


def _value(name: str, text: str, of: Any) -> Any:
    schema = msgspec.json.schema(of)
    if schema.get("type") == "string" or "enum" in schema:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        example = {"integer": "8", "number": "0.5", "boolean": "true"}.get(schema.get("type", ""), '["a", "b"]')
        raise SettingsError(f"the environment variable {name} is not a value", hint=f"write it as in TOML, such as {example}") from None


def _with(tree: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Return *tree* with *value* at *path*; what is no table there stays, so that it is refused as in a file."""
    head, *rest = path
    if not rest:
        return {**tree, head: value}
    inner = tree.get(head, {})
    return {**tree, head: _with(inner, tuple(rest), value)} if isinstance(inner, dict) else tree


def _nearest(name: str, known: Mapping[str, object]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (
        f"did you mean {near[0]}?"
        if near
        else "unset it; the variable of a key is RECONCILE_, its table and its name: RECONCILE_STORE_PATH is path in [store]"
    )
