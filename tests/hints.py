"""
Every hint in the source, and the row of a table that produces its situation, types what it tells and looks at what comes of it.

Rules that hold here:

1. ``inventory`` reads the source: whatever is given as ``hint``, wherever its text stands. A hint without a row fails a test.
2. A row makes its situation with the real command line and finds the hint in what is printed. Each command in back quotes is taken out
   of the printed line and typed; a row that names no command says so with ``told``.
3. What would change the machine, or needs an account, is not typed: ``LEFT_ALONE`` says why.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import Struct, field

from tests.node import Node, Ran, run

PACKAGE = Path(__file__).parents[1] / "reconciler"

#: Commands of others that hints name and that no test runs, each with the reason.
LEFT_ALONE = {
    "systemctl": "it needs systemd as the first process",
    "timedatectl": "it sets or asks the clock of the machine",
    "pip install": "it needs a package index",
    "dmesg": "it reads the log of the kernel",
    "smartctl": "it reads a disk",
    "quota": "it needs a file system with quotas",
    "ulimit": "it belongs to a shell",
    "mount": "it shows the mounts, in whatever form the machine has",
    "git lfs": "it needs a repository with large files elsewhere",
    "git annex": "it needs a repository with large files elsewhere",
    "hf auth": "it needs an account",
    "git fetch origin": "it needs a remote repository",
}


class Scene:
    """A folder to type in, and a node where the row is about one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, node: Node | None = None) -> None:
        self.folder = folder
        self.patch = patch
        self._node = node

    @property
    def node(self) -> Node:
        assert self._node is not None
        return self._node

    def type(self, line: str) -> Ran:
        """Type one line: ours in this process, others in their own."""
        words = shlex.split(line)
        if words[0] == "reconcile":
            return run(*words[1:])
        ran = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return Ran(ran.returncode, ran.stdout, ran.stderr)


class Row(Struct, kw_only=True):
    """One hint, its situation, and what comes of typing what it tells."""

    #: The hint as it stands in the source; ``{}`` for what is filled in there.
    hint: str
    #: The line whose output has the hint, without ``reconcile``; or what makes the situation and returns what was printed.
    line: str | Callable[[Scene], Ran]
    #: What goes before: lines, or a function.
    before: tuple[str | Callable[[Scene], object], ...] = ()
    #: What stands for the words that a person fills in, such as FILE.
    names: dict[str, str] = field(default_factory=dict)
    #: How the typed commands end.
    codes: tuple[int, ...] = (0,)
    #: What is typed after them, as the words of the hint tell, and how it ends.
    then: str = ""
    then_code: int = 0
    #: How the line of the situation ends when it is typed once more; None: not typed again.
    again: int | None = None
    #: True: the hint names no command.
    told: bool = False
    #: True: wherever the error is raised, a better hint is given; this one stands in the reference of errors alone.
    general: bool = False


def told(
    hint: str, line: str | Callable[[Scene], Ran], *before: str | Callable[[Scene], object], then: str = "", then_code: int = 0
) -> Row:
    """Return the row of a hint that names no command."""
    return Row(hint=hint, line=line, before=before, then=then, then_code=then_code, told=True)


def check(row: Row, scene: Scene) -> None:
    """Make the situation of *row*, find its hint, type what it tells."""
    for step in row.before:
        if isinstance(step, str):
            ran = scene.type(f"reconcile {step}")
            assert ran.code in {0, 2}, (step, ran)
        else:
            step(scene)
    said = _say(row, scene)
    printed = _printed(row.hint, said.err + "\n" + said.out)
    assert printed is not None, f"not printed: {row.hint}\n{said.err}{said.out}"
    named = commands(printed)
    assert row.told == (not named), printed
    for command in named:
        _type(command, row, scene)
    if row.then:
        ran = scene.type(f"reconcile {row.then}" if not row.then.startswith("!") else row.then[1:])
        assert ran.code == row.then_code, (row.then, ran)
    if row.again is not None:
        ran = _say(row, scene)
        assert ran.code == row.again, ran


def _say(row: Row, scene: Scene) -> Ran:
    return scene.type(f"reconcile {row.line}") if isinstance(row.line, str) else row.line(scene)


def _printed(hint: str, text: str) -> str | None:
    """Return the hint as it was printed, to the end of its line."""
    pattern = re.compile(".*?".join(re.escape(part) for part in hint.split("{}")))
    for line in text.splitlines():
        if found := pattern.search(line):
            return line[found.start() :]
    return None


def commands(printed: str) -> list[str]:
    """Return the command lines in back quotes."""
    return [
        found
        for found in re.findall(r"`([^`]+)`", printed)
        if re.match(r"[a-z/]", found) and (" " in found or found in LEFT_ALONE) and " = " not in found
    ]


def _type(command: str, row: Row, scene: Scene) -> None:
    if any(command.startswith(name) for name in LEFT_ALONE):
        return
    line = command
    for word, meant in row.names.items():
        line = line.replace(word, meant)
    words = shlex.split(line)
    assert not [word for word in words if re.fullmatch(r"[A-Z]{2,}|N", word) and word != "HEAD"], f"what stands for {line}?"
    ran = scene.type(line)
    assert ran.code in row.codes, (line, ran)


# -- what the source holds -----------------------------------------------------------------------------------


def inventory() -> dict[str, list[str]]:
    """Return every text that the source gives as a hint, with the places where it stands."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in _Module(path).hints():
            found.setdefault(" ".join(text.split()), []).append(f"{path.relative_to(PACKAGE)}:{line}")
    return found


class _Module:
    """One module, in which names lead to their texts."""

    def __init__(self, path: Path) -> None:
        self._tree = ast.parse(path.read_text())
        self._is_checks = path.name == "engine_checks.py"
        self._assigned: dict[str, list[ast.expr]] = {}
        self._functions: dict[str, ast.FunctionDef] = {}
        self._places: dict[str, int] = {}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self._assigned.setdefault(target.id, []).append(node.value)
            elif isinstance(node, ast.FunctionDef):
                self._functions[node.name] = node
                self._note(node.name, [one.arg for one in node.args.args])
            elif isinstance(node, ast.ClassDef):
                self._note(
                    node.name, [one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
                )

    def _note(self, name: str, fields: list[str]) -> None:
        if "hint" in fields:
            self._places[name] = fields.index("hint")

    def hints(self) -> Iterator[tuple[int, str]]:
        """Yield every text that is given as a hint, with its line."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call):
                yield from (one for keyword in node.keywords if keyword.arg == "hint" for one in self._texts(keyword.value))
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name in self._places and len(node.args) > self._places[name]:
                    yield from self._texts(node.args[self._places[name]])
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and "hint" in target.id.lower() for target in targets):
                    yield from self._texts(node.value)
            elif isinstance(node, ast.Yield) and self._is_checks and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 4:
                yield from self._texts(node.value.elts[3])
            elif isinstance(node, ast.FunctionDef) and "hint" in node.name:
                yield from self._returned(node, ())

    def _texts(self, node: ast.expr, seen: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
        """Yield the texts that the expression *node* may be."""
        if text := _literal(node):
            yield node.lineno, text
        elif isinstance(node, ast.IfExp):
            yield from (*self._texts(node.body, seen), *self._texts(node.orelse, seen))
        elif isinstance(node, ast.BoolOp | ast.Tuple | ast.List | ast.Dict):
            parts = node.values if isinstance(node, ast.BoolOp | ast.Dict) else node.elts
            yield from (one for part in parts for one in self._texts(part, seen))
        elif isinstance(node, ast.BinOp):
            yield from (*self._texts(node.left, seen), *self._texts(node.right, seen))
        elif isinstance(node, ast.Subscript):
            yield from self._texts(node.value, seen)
        elif isinstance(node, ast.Name) and node.id not in seen and not (node.id.isupper() and "HINT" in node.id):
            yield from (one for value in self._assigned.get(node.id, ()) for one in self._texts(value, (*seen, node.id)))
        elif isinstance(node, ast.Call):
            yield from self._called(node, seen)

    def _called(self, node: ast.Call, seen: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in self._functions and name not in seen:
            yield from self._returned(self._functions[name], (*seen, name))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and isinstance(node.func.value, ast.Dict):
            yield from (one for part in (*node.func.value.values, *node.args[1:]) for one in self._texts(part, seen))

    def _returned(self, function: ast.FunctionDef, seen: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        if ast.unparse(function.returns or ast.Constant(None)) == "str":
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from self._texts(node.value, seen)


def _literal(node: ast.expr) -> str:
    """Return the text of a literal, ``{}`` for what is filled in; empty for all else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) and len(node.value) > 3 else ""
    if isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return text if re.search(r"\w", text.replace("{}", "")) else ""
    if isinstance(node, ast.BinOp) and (left := _literal(node.left)) and (right := _literal(node.right)):
        return left + right
    return ""


def covers(row: str, text: str) -> bool:
    """Return whether a row for *row* is one for the hint *text* of the source."""
    words = " ".join(row.split())
    return words in text and (text.startswith(words) or len(words) > len(text) / 2)


def quiet_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in *folder*, on a wide terminal, without settings from outside."""
    patch.chdir(folder)
    patch.setenv("COLUMNS", "1000")
    for name in [name for name in os.environ if name.startswith("RECONCILE_")]:
        patch.delenv(name)
