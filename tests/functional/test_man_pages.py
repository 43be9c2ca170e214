"""The manual pages: they are made from the help, groff renders them, and whoever installs a wheel has them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest

from reconciler.cli import cli, man_pages

TOP = Path(__file__).parents[2]
FOLDER = TOP / "docs/man"


def commands(command: click.Command = cli, parent: click.Context | None = None, name: str = "reconcile") -> list[click.Context]:
    """Return the context of each command, in the way in which its help is asked for."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    if not isinstance(command, click.Group):
        return [context]
    children = [(child, command.get_command(context, child)) for child in command.list_commands(context)]
    return [context, *(found for child, inner in children if inner for found in commands(inner, context, child))]


def page_of(context: click.Context) -> Path:
    return FOLDER / f"{context.command_path.replace(' ', '-')}.1"


def rendered(page: Path, device: str = "utf8") -> str:
    """Render *page* with every warning of groff on, and return the text without bold and underline."""
    words = ["groff", "-man", "-ww", f"-T{device}", "-rLL=400n", "-rHY=0", "-P-c", "-P-b", "-P-u", "-P-o", str(page)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr == "", page.name
    return ran.stdout


def test_the_manual_pages_are_made_from_the_help() -> None:
    made = man_pages.pages()
    if os.environ.get("UPDATE"):
        for name, text in made.items():
            (FOLDER / name).write_text(text)
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == made, "run `make man`"


def test_each_command_has_a_page() -> None:
    assert {page_of(context) for context in commands()} == set(FOLDER.iterdir())
    assert len(commands()) > 50


needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")


@needs_groff
@pytest.mark.parametrize("device", ["utf8", "ascii"])
def test_groff_renders_each_page_without_a_warning_and_loses_no_character(device: str) -> None:
    for page in FOLDER.iterdir():
        assert "NAME" in rendered(page, device)


@needs_groff
def test_each_command_and_each_option_with_its_help_stands_in_its_page() -> None:
    for context in commands():
        text = re.sub(r"[\s\u2010]+", "", rendered(page_of(context), "ascii"))
        command = context.command
        told = [name for option in command.get_params(context) if not getattr(option, "hidden", False) for name in option.opts]
        told = [name for name in told if name.startswith("-")]
        told += [option.help or "" for option in command.get_params(context) if isinstance(option, click.Option) and not option.hidden]
        told += [context.command_path, *(command.list_commands(context) if isinstance(command, click.Group) else ())]
        told += (command.help or "").replace("\b", "").split("\n\n")
        for one in told:
            shown = re.sub(r"\s+", "", one.replace("…", "...").replace("·", ";"))
            assert shown in text, (context.command_path, one)


@needs_groff
@pytest.mark.parametrize("text", ["'quoted' first", ".a full stop first", "a \\b and \\e backslash", "~ ^ ` -- ‘é’"])
def test_no_text_becomes_a_command_of_groff(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.1"
    command = click.Command("page", help=f"{text}\n\n\b\n  {text}", callback=lambda: None)
    page.write_text(man_pages._page(click.Context(command, info_name="page")))
    assert rendered(page).count(text) == 3  # under NAME, and twice in the description


@pytest.mark.slow
def test_a_wheel_installs_the_pages_where_man_finds_them(tmp_path: Path) -> None:
    build = "from hatchling.build import build_wheel; print(build_wheel(__import__('sys').argv[1]))"
    built = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=TOP, capture_output=True, text=True, check=True)
    name = built.stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        packed = {Path(found).name for found in wheel.namelist() if "/data/share/man/man1/" in found}
    assert packed == {path.name for path in FOLDER.iterdir()}

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv/bin/python"), "--disable-pip-version-check", "install"]
    subprocess.run([*install, "--quiet", "--no-index", "--no-deps", str(tmp_path / name)], check=True)
    assert (tmp_path / "venv/share/man/man1/reconcile-snapshot-add.1").exists()
    if shutil.which("man") is not None:
        environment = {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        found = subprocess.run(["man", "-w", "reconcile"], env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(tmp_path / "venv/share/man/man1/reconcile.1")
