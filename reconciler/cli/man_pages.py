r"""
Manual pages from the help of the commands: ``python -m reconciler.cli.man_pages FOLDER`` writes one for each command.

Rules that hold here:

1. Every sentence is the command's help, an option's help or an epilog: what reads badly is mended there.
2. The pages are committed in ``docs/man`` and installed by the wheel in ``share/man/man1``; a test compares and renders them.
3. The text is ASCII, so that a terminal without Unicode shows all of it; no line begins with a control character of groff.

click-man, the library for this, lists no command of a group that imports its commands late, leaves arguments and the epilog out, and
writes ``\b`` and a leading full stop as they stand.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from reconciler import __version__
from reconciler.cli import cli


def main() -> None:
    """Write the pages into the folder that the command line names, and delete the pages of commands that are no more."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for path in folder.glob("*.1"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (folder / name).write_text(text)


def pages() -> dict[str, str]:
    """Return the page of each command by its file name, such as ``reconcile-snapshot-add.1``."""
    return {f"{_name(context)}.1": _page(context) for context in _walk(cli, None, "reconcile")}


def _walk(command: click.Command, parent: click.Context | None, name: str) -> Iterator[click.Context]:
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield context
    for child in _children(context):
        yield from _walk(child, context, child.name or "")


def _children(context: click.Context) -> list[click.Command]:
    command = context.command
    if not isinstance(command, click.Group):
        return []
    found = (command.get_command(context, name) for name in command.list_commands(context))
    return [child for child in found if child and not child.hidden]


def _name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(context: click.Context) -> str:
    command = context.command
    pieces = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH "{_name(context).upper()}" 1 "" "reconcile {__version__}" "reconcile"',
        f".SH NAME\n{_escape(_name(context))} \\- {_escape(command.get_short_help_str(200).rstrip('.'))}",
        f".SH SYNOPSIS\n.B {_escape(context.command_path)}\n{_escape(pieces)}",
        f".SH DESCRIPTION\n{_paragraphs(command.help)}",
        _list("OPTIONS", [record for option in command.get_params(context) if (record := _option(option, context))]),
        _list("COMMANDS", [(child.name or "", child.get_short_help_str(200)) for child in _children(context)]),
        _exit_status(command.epilog or ""),
        _see_also(context),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _option(option: click.Parameter, context: click.Context) -> tuple[str, str] | None:
    return option.get_help_record(context) if isinstance(option, click.Option) and not option.hidden else None


def _list(title: str, entries: list[tuple[str, str]]) -> str:
    lines = [f".TP\n\\fB{_escape(name)}\\fR\n{_escape(' '.join(text.split()))}" for name, text in entries]
    return "\n".join([f".SH {title}", *lines]) if entries else ""


def _exit_status(epilog: str) -> str:
    """Return the section for an epilog such as ``Exit codes: 0 done · 1 error``."""
    codes = [found.partition(" ") for found in epilog.removeprefix("Exit codes: ").split(" · ") if found]
    return _list("EXIT STATUS", [(number, text) for number, _, text in codes])


def _see_also(context: click.Context) -> str:
    near = [_name(context.parent)] if context.parent else []
    near += [f"{_name(context)}-{child.name}" for child in _children(context)]
    return ".SH SEE ALSO\n" + ",\n".join(f".BR {_escape(name)} (1)" for name in near) if near else ""


def _paragraphs(text: str | None) -> str:
    return "\n.PP\n".join(map(_paragraph, inspect.cleandoc(text or "").split("\n\n")))


def _paragraph(text: str) -> str:
    """Return one paragraph; what click leaves unwrapped stays so here."""
    if text.startswith("\b"):
        block = textwrap.dedent(text.removeprefix("\b").strip("\n"))
        return f".RS 4\n.nf\n{_escape(block)}\n.fi\n.RE"
    return _escape(text)


#: What groff would change, or a terminal without Unicode would leave out.
_ESCAPES = {"\\": "\\e", "-": "\\-", "`": "\\(ga", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti", "…": "...", "·": ";"}


def _escape(text: str) -> str:
    plain = "".join(_ESCAPES.get(one, one if one.isascii() else f"\\[u{ord(one):04X}]") for one in text)
    return "\n".join(f"\\&{line}" if line.startswith(".") else line for line in plain.splitlines())


if __name__ == "__main__":
    main()
