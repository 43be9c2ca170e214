"""What the documents say is what the program does. ``UPDATE=1 pytest tests/functional/test_readme.py`` writes the parts that are made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from reconciler.cli import cli
from reconciler.commands import schemas
from tests.node import run

TOP = Path(__file__).parents[2]
DOCUMENTS = [*sorted(TOP.glob("*.md")), *sorted((TOP / "docs").rglob("*.md"))]
_HELP = re.compile(r"(<!-- help:begin -->\n)(.*?)(<!-- help:end -->)", re.DOTALL)
_LINE = re.compile(r"^(?:\$ )?(?:\*/5 \* \* \* \*  )?reconcile ((?:[a-z]|--).*)$", re.MULTILINE)
_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def help_block() -> str:
    shown = run("--help").out
    return f"```\n$ reconcile --help\n{shown.strip()}\n```\n"


def test_the_readme_shows_the_help_as_it_is() -> None:
    path = TOP / "README.md"
    text = path.read_text()
    expected = _HELP.sub(lambda found: found[1] + help_block() + found[3], text)
    if os.environ.get("UPDATE"):
        path.write_text(expected)

    assert path.read_text() == expected


@pytest.mark.parametrize("name", sorted(schemas.DOCUMENTS))
def test_the_schemas_are_those_of_the_types(name: str) -> None:
    path = TOP / "docs" / "schemas" / f"{name}.schema.json"
    made = schemas.schema(schemas.DOCUMENTS[name])
    if os.environ.get("UPDATE"):
        path.write_bytes(made)

    assert path.read_bytes() == made


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in _BLOCK.findall(document.read_text()):
            lines = [line.split("  #")[0].split("   ")[0] for line in _LINE.findall(block)]
            found += [(document.name, line.strip()) for line in lines if "OPTIONS" not in line]
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_in_the_documents_exists_with_its_options(document: str, line: str) -> None:
    words = re.split(r"\s+", re.sub(r"[|&>;].*", "", line))
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{document}: there is no command {name!r} in {line!r}"
        command = found
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}
    used = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
    assert used <= known | ({"--version"} if command is cli else set()), f"{document}: {line!r}"


def test_every_help_has_a_sentence_and_works() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        ran = run(*path, "--help")
        assert ran.code == 0
        assert len(ran.out.splitlines()) > 3
        assert command.help, path
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                walk(child, [*path, name])

    walk(cli, [])


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_recording_of_the_readme_is_text_that_loads_nothing() -> None:
    text = (TOP / "docs/demo.svg").read_text()
    assert "$ reconcile apply --yes" in text.replace("&#160;", " ")
    assert "<script" not in text
    assert not re.search(r"url\((?!#)|href=|@font-face|@import", text)


def test_the_readme_counts_the_packages_that_are_installed() -> None:
    pinned = re.findall(r"^[\w.-]+==", (TOP / "requirements.lock").read_text(), re.MULTILINE)

    assert f"{len(pinned)} packages, each pinned" in (TOP / "README.md").read_text()


def test_the_command_line_runs_from_a_checkout() -> None:
    ran = subprocess.run([sys.executable, TOP / "cli.py", "lock", "--check"], cwd=TOP, capture_output=True, text=True)
    assert ran.returncode == 0, ran
    assert "up to date" in ran.stdout
