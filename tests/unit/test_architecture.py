"""
What holds of every module of the package, beside the direction of imports, types and docstrings, which import-linter, mypy and ruff check.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
MODULES = {".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path for path in TOP.glob("reconciler/**/*.py")}

#: Words in names that said nothing to a stranger, and were replaced.
ODD = frozenset(
    word
    for line in (
        "amounts attend ballast bell bring bringing brings brought cage cell course ear figures floor hear heard hearing hears",
        "keeper knock look papers passage pulse reach scene shell stray tally thaw upkeep wary",
    )
    for word in line.split()
)
#: A module imports no more others than this, beside those of ``core``: values and rules are everybody's vocabulary.
MOST_IMPORTS = 12
#: The commands and the command line join all the others.
MOST_IMPORTS_OF_JOINING = 15
JOINING = ("reconciler.cli", "reconciler.commands")
LONG = 400


def tree(name: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(MODULES[name].read_text())


def words(name: str) -> set[str]:
    """Return the words of a name in snake case or camel case; to look something up is one word."""
    return {word.lower() for word in re.findall(r"look_up|[A-Z]?[a-z]+|[A-Z]+", name)}


def imported(name: str) -> set[str]:
    """Return the modules outside ``core`` that the module *name* imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {full if (full := f"{node.module}.{one.name}") in MODULES else node.module for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
    return {one for one in found & MODULES.keys() if not one.startswith("reconciler.core")} - {name}


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the name of each class, function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_most_of_the_others(name: str) -> None:
    most = MOST_IMPORTS_OF_JOINING if name.startswith(JOINING) else MOST_IMPORTS
    assert len(imported(name)) <= most, sorted(imported(name))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_odd_name_comes_back(name: str) -> None:
    last = name.rpartition(".")[2]
    assert last != "confirm", "as a module; a question that a person answers may have the name"
    assert [one for one in (last, *defined(tree(name))) if words(one) & ODD] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_long_module_says_why_it_is_long(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    said = " ".join((ast.get_docstring(tree(name)) or "").split())
    assert lines <= LONG or f"Longer than {LONG} lines because" in said, f"{lines} lines"


PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py" and name != "reconciler"}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_package_says_where_to_start_reading(name: str) -> None:
    said = re.findall(r"``([a-z0-9_.]+)``", ast.get_docstring(tree(name)) or "")
    own = {module.removeprefix(f"{name}.") for module in MODULES if module.startswith(f"{name}.")}
    anywhere = {module.rpartition(".")[2] for module in MODULES}

    assert own & set(said), "it names none of its modules"
    assert [word for word in said if word.rpartition(".")[2] not in anywhere] == [], "there is no such module"


def test_words_of_names_are_found() -> None:
    assert words("_hear_and_accept") & ODD == {"hear"}
    assert words("FetcherWithWary") & ODD == {"wary"}
    assert not words("hearth_cells_look_up") & ODD
