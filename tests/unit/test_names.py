"""
Twenty questions of a stranger, and the one place that each should guess from the names alone.

A question is answered by a path and a definition in it. The test reads the source and not the running program: the definition must stand
in that very file, not be imported into it, and what it is there for must happen in its body. CONTRIBUTING.md shows the same table
(``UPDATE=1 pytest tests/unit/test_names.py`` writes it).
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TOP = Path(__file__).parents[2]
GUIDE = TOP / "CONTRIBUTING.md"


class Place(NamedTuple):
    """Where a question is answered: a file under ``reconciler/``, a definition in it, and a name that its body uses to do the work."""

    question: str
    path: str
    definition: str
    uses: str


QUESTIONS = (
    Place("Where are an envelope's signatures verified?", "core/dsse.py", "verify", "threshold"),
    Place("Where is a signed snapshot accepted or refused?", "core/trust.py", "verify", "check_fresh"),
    Place("Where is the newest accepted snapshot recorded?", "store/trust_state.py", "write", "set_fact"),
    Place("Where does a snapshot become a lock?", "core/lock.py", "compile", "Lock"),
    Place("Where is it decided what happens to each model?", "core/plan.py", "diff", "Plan"),
    Place("Where is the order of a run's effects?", "apply/run.py", "execute", "STEPS"),
    Place("Where does one set of active models replace another?", "apply/activate.py", "swap", "generations"),
    Place("Where is a file renamed so that a power cut does not undo it?", "store/atomic.py", "rename", "sync_folder"),
    Place("Where are redirects decided?", "fetch/sources.py", "redirect_target", "urljoin"),
    Place("Where is the next source chosen after one failed?", "fetch/source_selection.py", "SourceSelector", "TrySources"),
    Place("Where is aria2 started?", "fetch/aria2_daemon.py", "Daemon", "Popen"),
    Place("Where does a process of its own hash a downloaded file?", "fetch/hash_worker.py", "_hash", "update"),
    Place("Where is an archive member's name checked?", "core/archive_rules.py", "check", "_path"),
    Place("Where is the sandbox chosen?", "sandbox/choose.py", "choose", "_cached_probe"),
    Place("Where is a test job's memory bounded?", "sandbox/confine.py", "_limit", "setrlimit"),
    Place("Where is it found out which engines are installed?", "runtime/engines.py", "installed", "version"),
    Place("Where is a model's answer compared with the expected one?", "runtime/result.py", "check_expectations", "BadModel"),
    Place("Where is what failed put into quarantine?", "store/housekeeping.py", "StoreHousekeeping", "quarantine"),
    Place("Where is a snapshot signed?", "publish/snapshots.py", "sign", "sign"),
    Place("Where are the default settings?", "settings.py", "Settings", "StoreSettings"),
)


def definition(place: Place) -> ast.AST:
    """Return the class or function that *place* names, from the top level of its file."""
    tree = ast.parse((TOP / "reconciler" / place.path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in tree.body if isinstance(node, kinds) and node.name == place.definition]
    assert len(found) == 1, f"{place.path} does not define {place.definition}"
    return found[0]


def used(node: ast.AST) -> set[str]:
    """Return the names that the body of *node* uses; no strings, and not its own name."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    names |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    return names | {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg | ast.keyword) and inner.arg}


def table() -> str:
    rows = "".join(f"| {one.question} | `reconciler/{one.path}` | `{one.definition}` |\n" for one in QUESTIONS)
    return f"| question | file | definition |\n|---|---|---|\n{rows}"


@pytest.mark.parametrize("place", QUESTIONS, ids=lambda place: place.question)
def test_a_stranger_finds_it_where_the_names_say(place: Place) -> None:
    assert place.uses in used(definition(place)), f"{place.definition} in {place.path} does not use {place.uses}"


def test_there_are_twenty_questions_with_one_answer_each() -> None:
    assert len({place.question for place in QUESTIONS}) == len({(place.path, place.definition) for place in QUESTIONS}) == 20


def test_an_imported_or_mentioned_name_is_no_answer() -> None:
    imported = Place("?", "apply/run.py", "annotations", "")
    with pytest.raises(AssertionError, match="does not define"):
        definition(imported)
    assert "fsync" not in used(ast.parse('def f():\n    "fsync"\n'))


def test_the_guide_for_contributors_has_the_same_table() -> None:
    part = re.compile(r"(<!-- questions:begin -->\n).*?(<!-- questions:end -->)", re.DOTALL)
    expected = part.sub(lambda found: f"{found[1]}{table()}{found[2]}", GUIDE.read_text())
    if os.environ.get("UPDATE"):
        GUIDE.write_text(expected)

    assert GUIDE.read_text() == expected
