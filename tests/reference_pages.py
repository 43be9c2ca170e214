"""
The reference part of the documentation, made from the code: ``python -m tests.reference_pages`` writes it.

Rules that hold here:

1. Every sentence comes from where a developer reads it too: a docstring, a ``#:`` comment above a field, a command's help, a hint.
   What reads badly in a page is mended there, and the page is written again.
2. The pages are committed, so that they are read without a build; ``tests/functional/test_docs.py`` compares them.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import msgspec

from reconciler import settings
from reconciler.cli import cli
from reconciler.commands import schemas, status
from reconciler.core import errors
from reconciler.report import metrics
from tests.unit.test_metrics import FULL, NOW

FOLDER = Path(__file__).parents[1] / "docs"
_MADE = "<!-- Made from the code by `python -m tests.reference_pages`: edit there, not here. -->\n\n"


def pages() -> dict[str, str]:
    """Return every made page by its path in ``docs/``."""
    made = {
        "reference/settings.md": _settings(),
        "reference/errors.md": _errors(),
        "reference/events.md": _events(),
        "reference/metrics.md": _metrics(),
        "reference/documents.md": _documents("JSON documents of the network", ("envelope", "root", "snapshot")),
        "reference/index-json.md": _documents("The index of the active set", ("index",)),
        "reference/output.md": _documents("JSON documents of a node", ("status", "plan", "incidents")),
        "reference/fleet.md": _documents("JSON documents of many nodes", ("node-status", "fleet-report")),
        **{f"reference/commands-{name}.md": _commands(title, names) for name, (title, names) in _SECTIONS.items()},
    }
    return {path: _MADE + text.rstrip() + "\n" for path, text in made.items()}


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        (FOLDER / path).parent.mkdir(exist_ok=True)
        (FOLDER / path).write_text(text)
        sys.stdout.write(f"docs/{path}\n")


# -- settings ------------------------------------------------------------------------------------------


def _settings() -> str:
    text = (
        "# Settings\n\n`reconcile.toml`: every key, its type and its default. The file is found by `--config`, by `$RECONCILE_CONFIG`,\n"
        "or in the working directory or the nearest folder above it. Relative paths are relative to the file. An unknown key is an\n"
        "error that names the nearest known one. Sizes are written as `10GiB`, times as `30s`, `5m`, `24h`, `30d`; only 0 needs no\n"
        "unit.\n\n"
        "Each key has an environment variable, named after its table and itself: `RECONCILE_STORE_PATH` is `path` in `[store]`. Text is\n"
        'taken as it is; any other value is written as in TOML, such as `8`, `true` or `["a", "b"]`. The command line wins over the\n'
        "environment, the environment over the file, the file over the default; `reconcile config show` says where each value\n"
        "comes from.\n\n"
        "Settings that were found, and not named by `--config` or `$RECONCILE_CONFIG`, are refused (`untrusted-file`) where another\n"
        "user of the machine can change them or a file that they name.\n"
    )
    return text + "".join(_table_of_settings(name, kind) for name, kind in _tables(settings.Settings, ""))


def _tables(kind: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, type[msgspec.Struct]]]:
    for field in msgspec.structs.fields(kind):
        if table := _table(field):
            name = f"{prefix}{'NAME' if get_origin(field.type) is dict else field.encode_name}"
            if any(not _table(inner) for inner in msgspec.structs.fields(table)):
                yield f"[{name}]" if get_origin(field.type) is tuple else name, table
            yield from _tables(table, f"{name}.")


def _table(field: msgspec.structs.FieldInfo) -> type[msgspec.Struct] | None:
    """Return the kind of table that *field* is: one of its own name, one for each name, or one of several."""
    inner = get_args(field.type)
    found = inner[-1] if get_origin(field.type) is dict else inner[0] if get_origin(field.type) is tuple and inner else field.type
    return found if isinstance(found, type) and issubclass(found, msgspec.Struct) else None


def _table_of_settings(name: str, kind: type[msgspec.Struct]) -> str:
    comments = comments_of(kind)
    rows = [
        f"| `{field.encode_name}` | {_type(field.type)} | `{_toml(_default(field))}` | {_cell(comments.get(field.name, ''))} |\n"
        for field in msgspec.structs.fields(kind)
        if not _table(field)
    ]
    return f"\n## `[{name}]`\n\n{_prose(kind.__doc__)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{''.join(rows)}"


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _toml(value: Any) -> str:
    return json.dumps(msgspec.to_builtins(value))


# -- errors ----------------------------------------------------------------------------------------------


def _errors() -> str:
    text = (
        "# Errors\n\nAn error is shown as `error[name]: what went wrong` and `hint: what to do next`; with `--json` it is\n"
        '`{"error": {"name": "…", "message": "…", "hint": "…"}}`. Names and exit codes are stable. Many errors carry a hint of their own\n'
        "that fits the case; the table has the general one.\n"
    )
    rows = [f"| `{found.name}` | {found.exit_code} | {_cell(found.cause)} | {_cell(found.hint)} |\n" for found in errors.reference()]
    return f"{text}\n| name | exit code | cause | what to do |\n|---|---|---|---|\n{''.join(rows)}"


# -- events ------------------------------------------------------------------------------------------------


def _events() -> str:
    text = (
        "# Events\n\n`reconcile apply --json` and `reconcile sync --json` write one event a line to standard output. Each is a JSON\n"
        "object whose `type` says which. A field that has its default may be missing. Readers should ignore types and fields that\n"
        "they do not know.\n"
    )
    for kind in get_args(schemas.Events):
        name = kind.__struct_config__.tag
        text += f"\n## `{name}`\n\n{_prose(kind.__doc__)}\n\n{_fields(kind)}"
    return text


def _fields(kind: type[msgspec.Struct]) -> str:
    comments = comments_of(kind)
    head = ("field", "type", "default", "meaning") if any(comments.values()) else ("field", "type", "default")
    rows = [
        (f"`{field.encode_name}`", _type(field.type), _needed(field), _cell(comments.get(field.name, "")))[: len(head)]
        for field in msgspec.structs.fields(kind)
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def _needed(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "always there"
    default = _default(field)
    if isinstance(default, msgspec.Struct):
        return "that of its fields"
    return "missing" if default is msgspec.UNSET else f"`{_toml(default)}`"


# -- metrics -------------------------------------------------------------------------------------------------


def _metrics() -> str:
    text = (
        "# Metrics\n\nWhat the agent tells Prometheus, at `[agent] metrics_address` or with `--metrics-file`. "
        "What is not known has no sample.\n\n"
        "| name | kind | labels | meaning |\n|---|---|---|---|\n"
    )
    for family in sorted(metrics.registry(lambda: FULL, lambda: NOW).collect(), key=lambda found: found.name):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = sorted({f"`{label}`" for sample in family.samples for label in sample.labels})
        text += f"| `{name}` | {family.type} | {', '.join(labels)} | {_cell(family.documentation)} |\n"
    states = ", ".join(f"`{state}`" for state in metrics.STATES)
    kinds = ", ".join(f"`{kind}`" for kind in status.INCIDENT_KINDS)
    return text + f"\n`state` is one of {states}. `kind` is one of {kinds}.\n"


# -- documents -----------------------------------------------------------------------------------------------


def _documents(title: str, names: tuple[str, ...]) -> str:
    text = (
        f"# {title}\n\nEvery field, from the types that read and write it. A field that has a default may be missing. The JSON Schemas\n"
        "(draft 2020-12): "
    )
    text += ", ".join(f"[{name}](../schemas/{name}.schema.json)" for name in names) + ".\n"
    shown: set[type] = set()
    for name in names:
        for kind in _structs(schemas.DOCUMENTS[name]):
            if kind not in shown:
                shown.add(kind)
                heading = f"## {name}" if kind == next(iter(_structs(schemas.DOCUMENTS[name]))) else f"### {kind.__name__}"
                text += f"\n{heading}\n\n{_prose(kind.__doc__)}\n\n{_fields(kind)}"
    return text


def _structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield the types of objects in *kind*, each before those inside it."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from _structs(field.type)
    for inner in get_args(kind):
        yield from _structs(inner)


# -- commands ------------------------------------------------------------------------------------------------

_REVIEW_TITLE = "Commands to review and sign snapshots"
_SECTIONS = {
    "node": ("Commands of a node", ("init", "lock", "plan", "apply", "sync", "agent", "status", "demo", "completion")),
    "maintenance": (
        "Commands for maintenance",
        ("verify", "gc", "rollback", "resume", "history", "incidents", "retry", "doctor", "config", "trust"),
    ),
    "bundle": ("Commands for nodes without a network", ("bundle",)),
    "serve": ("Commands for servers", ("serve",)),
    "swarm": ("Commands of a swarm", ("swarm",)),
    "operator": ("Commands of the network's operator", ("key", "root", "fleet")),
    "snapshot": ("Commands for snapshots", ("snapshot",)),
    "review": (_REVIEW_TITLE, ("snapshot",)),
}


#: Options that most commands have: shown once on each page.
_SHARED = ("--json", "--json-into", "--config", "--color", "--quiet", "--verbose", "--lock-timeout")


def _commands(title: str, names: tuple[str, ...]) -> str:
    top = click.Context(cli, info_name="reconcile", **cli.context_settings)
    commands = [found for name in names for found in _walk(_command(cli, name), top, name) if _is_on(title, found[1].command_path)]
    shared: dict[str, str] = {}
    for command, context in commands:
        shared |= {option.name or "": _option(option, context) for option in _options(command) if _is_shared(option)}
    text = "".join(_section(command, context) for command, context in commands)
    return f"# {title}\n{text}\n## Options that many commands share\n\n{_OPTIONS}{''.join(shared.values())}"


#: Commands of those who sign: the page of the other commands for snapshots is long enough.
_REVIEW = frozenset(f"reconcile snapshot {name}" for name in ("inspect", "diff", "lint", "sign", "pae", "attach", "export"))


def _is_on(title: str, path: str) -> bool:
    """Return whether the command *path* is on the page *title*."""
    return (path in _REVIEW) == (title == _REVIEW_TITLE) if path.startswith("reconcile snapshot") else True


def _walk(command: click.Command, parent: click.Context, name: str) -> Iterator[tuple[click.Command, click.Context]]:
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield command, context
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _walk(_command(command, child), context, child)


def _command(group: click.Group, name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None, name
    return found


def _section(command: click.Command, context: click.Context) -> str:
    path = context.command_path
    own = "".join(_option(option, context) for option in _options(command) if not _is_shared(option))
    shared = ", ".join(f"`{max(option.opts, key=len)}`" for option in _options(command) if _is_shared(option))
    text = f"\n## `{path}`\n\n`{path} {' '.join(command.collect_usage_pieces(context))}`\n\n{_help(command)}\n"
    return text + (f"\n{_OPTIONS}{own}" if own else "") + (f"\nAlso {shared}.\n" if shared else "")


_OPTIONS = "| option | default | meaning |\n|---|---|---|\n"


def _options(command: click.Command) -> list[click.Option]:
    return [found for found in command.params if isinstance(found, click.Option) and not found.hidden]


def _is_shared(option: click.Option) -> bool:
    return not {*option.opts}.isdisjoint(_SHARED)


def _help(command: click.Command) -> str:
    """Return the help in Markdown: paragraphs as they are, and what click shall not wrap as a block."""
    return "\n\n".join(map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n")))


def _paragraph(text: str) -> str:
    block = textwrap.dedent(text.removeprefix("\b").strip("\n"))
    return f"```text\n{block}\n```" if text.startswith("\b") else _prose(text)


def _option(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    takes = "" if option.is_flag or option.count else f" `{option.make_metavar(context)}`"
    default = option.to_info_dict()["default"]
    shown = f"`{default}`" if isinstance(default, str | int | float) and default != "" and not option.is_flag and not option.count else ""
    return f"| {names}{takes.replace('|', chr(92) + '|')} | {'required' if option.required else shown} | {_cell(option.help)} |\n"


# -- words ---------------------------------------------------------------------------------------------------


def comments_of(kind: type) -> dict[str, str]:
    """Return the ``#:`` comment above, or behind, each field of the class *kind* and of the classes that it extends."""
    found: dict[str, str] = {}
    for base in reversed([one for one in kind.__mro__ if one.__module__.startswith("reconciler")]):
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]  # the source of a class holds one class
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = _above(lines, node.lineno - 1)
    return found


def _above(lines: list[str], number: int) -> str:
    said = [part for part in lines[number].partition("  #: ")[2:] if part]
    while number and lines[number - 1].strip().startswith("#:"):
        number -= 1
        said.insert(0, lines[number].strip()[2:].strip())
    return " ".join(said)


def _type(kind: Any) -> str:
    """Return a type in words, as its JSON Schema has it."""
    found = msgspec.json.schema(kind)
    return _words(found, found.get("$defs", {}))


def _words(found: dict[str, Any], defined: dict[str, Any]) -> str:
    if "$ref" in found:
        name = found["$ref"].rsplit("/", 1)[1]
        return _words(defined[name], defined) if "enum" in defined.get(name, {}) else name
    if "anyOf" in found:
        return " or ".join(dict.fromkeys(_words(one, defined) for one in found["anyOf"]))
    if "enum" in found:
        return " or ".join(f"`{one}`" for one in found["enum"])
    if "examples" in found:  # words that newer versions add to
        return " or ".join(f"`{one}`" for one in found["examples"])
    if found.get("type") == "array":
        items = _words(found["items"], defined) if isinstance(found.get("items"), dict) else "any"
        return f"list of {items}"
    if found.get("type") == "integer" and ("minimum" in found or "maximum" in found):
        low, high = found.get("minimum"), found.get("maximum")
        high = None if high == 2**53 - 1 else high  # what every reader of JSON holds exactly
        return f"integer, {low} to {high}" if low is not None and high is not None else f"integer, {low} or more"
    return {"date-time": "RFC 3339 time"}.get(str(found.get("format")), str(found.get("type", "any")))


def _prose(text: str | None) -> str:
    """Return the text of a docstring in Markdown, in which ``<store>`` outside of code would be an element of HTML."""
    marked = re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(text or ""))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", marked))


def _cell(text: str | None) -> str:
    return re.sub(r"\s+", " ", _prose(text)).replace("|", "\\|")


if __name__ == "__main__":
    main()
