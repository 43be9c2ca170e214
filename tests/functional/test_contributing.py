"""CONTRIBUTING.md is run: each block as if it stood in the file that its first line names."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import click
import pytest

from reconciler import cli
from reconciler.runtime import engines
from tests.node import Node

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def blocks() -> list[tuple[str, str]]:
    """Return each block of Python with the file that it is for."""
    return re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the blocks define, after each was added to its module."""
    defined: dict[str, Any] = {}
    for file, code in blocks():
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        before = dict(vars(module))
        there = dict(before)
        exec(compile(code, file, "exec"), there)
        for name in there.keys() - before.keys() - {"__builtins__"}:
            monkeypatch.setattr(module, name, there[name], raising=False)
            defined[name] = there[name]
    return defined


def test_every_block_is_for_a_file_that_is_there_and_defines_something_new(guide: dict[str, Any]) -> None:
    assert len(blocks()) == len(guide) >= 6
    assert all((GUIDE.parent / file).exists() for file, _ in blocks())


def test_the_command_of_the_guide_works(guide: dict[str, Any], used: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cli.cli.get_command

    def get_command(context: click.Context, name: str) -> click.Command | None:
        return guide["generation"] if name == "generation" else found(context, name)

    monkeypatch.setattr(cli.cli, "get_command", get_command)
    guide["test_the_number_of_the_active_generation_is_shown"](used)


def test_the_engine_of_the_guide_has_every_method_of_an_engine(guide: dict[str, Any]) -> None:
    made = guide["Whisper"]
    wanted = {name: kind for name, kind in vars(engines.Engine).items() if inspect.isfunction(kind) and not name.startswith("_")}
    assert set(wanted) >= {"version", "module", "options", "folders"}
    for name, method in wanted.items():
        assert inspect.signature(getattr(made, name)) == inspect.signature(method), name
    assert all(isinstance(getattr(made, name), kind) for name, kind in (("name", str), ("server", bool)))
    assert set(engines.Engine.__annotations__) == {"name", "server"}


def test_the_check_of_the_guide_refuses_what_it_says(guide: dict[str, Any]) -> None:
    guide["test_a_prompt_with_a_nul_character_is_refused"]()
    guide["check_prompt"]("The capital of France is")


def test_every_file_folder_and_command_of_make_that_the_guide_names_is_there() -> None:
    text = GUIDE.read_text()
    planned = {"reconciler/serve/", "reconciler/runtime/whisper_worker.py"}
    named = set(re.findall(r"`((?:reconciler|tests)/[\w/.]*)`", text)) - planned
    assert len(named) > 8
    assert all((GUIDE.parent / name).exists() for name in named), named
    made = set(re.findall(r"^([a-z-]+):", (GUIDE.parent / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)(?:`|  )", text)) <= made
