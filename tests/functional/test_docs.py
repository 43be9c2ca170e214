"""
The documentation is run: every command and every program in it, in order; what it shows is what comes out.

Rules that hold here:

1. A line of a ``console`` block that begins with ``$`` is run; the lines after it are its output, in which ``…`` stands for anything.
   One that ends in ``&`` runs until the page is over. ``cd`` holds for the rest of the page.
2. A line that begins with ``#`` is for root. It is not run; the commands of this program in it are parsed.
3. ``python`` blocks are run where the lines before them left off. ``toml`` and ``json`` blocks are read.
4. Pages that continue one another share a folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import cast

import click
import msgspec
import pytest
import yaml

from reconciler.cli import cli
from reconciler.commands import status
from reconciler.core import lock, snapshot, swarm, trust
from reconciler.core.dsse import Envelope
from reconciler.demo.server import serving
from reconciler.settings_file import decode
from tests import reference_pages
from tests.network import Document
from tests.node import Node, run, tiny

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Pages that begin in an empty folder, with those that continue them.
FROM_NOTHING = (
    ("tutorial.md",),
    (
        "how-to/operate-a-network.md",
        "how-to/rotate-keys.md",
        "how-to/replace-a-version.md",
        "how-to/roll-out-in-steps.md",
        "how-to/peers.md",
    ),
)
#: Pages that are about a node that runs.
ON_A_NODE = (
    "how-to/run-unattended.md", "how-to/serve.md", "how-to/engines.md",
    "how-to/use-in-ci.md", "how-to/monitor.md", "how-to/disk-space.md", "how-to/back-up.md",
    "how-to/roll-back.md", "how-to/model-not-active.md", "how-to/incidents.md", "how-to/check-for-damage.md", "how-to/upgrade.md",
    "how-to/air-gap.md", "how-to/watch-many-nodes.md", "serving.md",
)  # fmt: skip
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    return (DOCS / page).read_text()


def blocks(text: str, kind: str) -> list[str]:
    return [body for found, body in _BLOCK.findall(text) if found == kind]


def steps(text: str) -> list[tuple[str, str, list[str]]]:
    """Return what is run, in order: its kind, its text, and the lines of output that are shown for it."""
    found: list[tuple[str, str, list[str]]] = []
    for kind, body in _BLOCK.findall(text):
        if kind == "python":
            found.append((kind, body, []))
        for line in body.replace("\\\n", " ").splitlines() if kind == "console" else ():
            if line.startswith("$ "):
                found.append((kind, line[2:], []))
            elif not line.startswith("# "):
                found[-1][2].append(line)
    return found


def shows(expected: list[str], output: str) -> bool:
    """Say whether *output* holds the lines of *expected*, in their order; ``…`` stands for anything."""
    pattern = ".*".join("^" + ".*".join(re.escape(part) for part in line.split("…")) for line in expected if line.strip(" …"))
    return re.search(pattern, output, re.DOTALL | re.MULTILINE) is not None


# -- running -------------------------------------------------------------------------------------------------


class Shell:
    """A folder in which ``reconcile`` and ``python`` are this checkout's, and what runs there meanwhile."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._here = folder
        self._behind: list[subprocess.Popen[bytes]] = []
        programs.mkdir()
        for name, words in (("reconcile", [sys.executable, str(TOP / "cli.py")]), ("python", [sys.executable])):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (programs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RECONCILE_")}
        self.environment = kept | {"PATH": f"{programs}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": str(TOP)}

    def run(self, text: str, *, alone: bool = True) -> int:
        """Run a page, each command of ours *alone* in a process, or in this one; return of how many steps."""
        port = str(_free_port())
        for kind, command, expected in steps(text.replace("8765", port)):
            if command.startswith("cd "):
                self._here = Path(os.path.normpath(self._here / command[3:]))
            elif command.endswith(" &"):
                self._run_behind(command[:-2], int(port))
            elif kind == "console" and not alone and re.fullmatch(r"reconcile (?!agent)[^|&;$(>]+", command):
                self._run_here(shlex.split(command)[1:])
            else:
                self._run(["python", "-c", command] if kind == "python" else ["bash", "-euo", "pipefail", "-c", command], expected)
        return len(steps(text))

    def _run(self, words: list[str], expected: list[str]) -> None:
        ran = subprocess.run(
            words, cwd=self._here, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        output = ran.stderr + ran.stdout
        refused = any(line.startswith("error[") for line in expected)
        assert (ran.returncode != 0) is refused, f"$ {words[-1]}\n{output}"
        assert shows(expected, output), f"$ {words[-1]}\nshown:\n{expected}\nfound:\n{output}"

    def _run_here(self, words: list[str]) -> None:
        with chdir(self._here):
            ran = run(*words)
        assert ran.code == 0, f"$ reconcile {shlex.join(words)}\n{ran.err}{ran.out}"

    def _run_behind(self, command: str, port: int) -> None:
        words = ["bash", "-c", f"exec {command}"]
        quiet = subprocess.DEVNULL
        self._behind.append(subprocess.Popen(words, cwd=self._here, env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet))
        deadline = time.monotonic() + 30
        while not _answers(port):
            assert time.monotonic() < deadline, command
            time.sleep(0.05)

    def close(self) -> None:
        for process in self._behind:
            process.send_signal(signal.SIGTERM)
            process.wait()


@contextmanager
def shell(folder: Path, here: Path) -> Iterator[Shell]:
    made = Shell(here, folder / "bin")
    try:
        yield made
    finally:
        made.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return cast("int", found.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("pages", FROM_NOTHING, ids=lambda pages: pages[0])
def test_what_a_page_tells_to_type_does_what_it_shows(tmp_path: Path, pages: tuple[str, ...]) -> None:
    (tmp_path / "work").mkdir()
    with shell(tmp_path, tmp_path / "work") as found:
        assert sum(found.run(read(page)) for page in pages) > 15


@pytest.mark.parametrize("page", ON_A_NODE)
def test_what_a_page_tells_to_type_works_on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    with serving() as server:
        node = Node(tmp_path / "node", server)
        known = node.item("mistral-7b-instruct:v1", tiny("mistral"))
        monkeypatch.delenv("RECONCILE_CONFIG", raising=False)
        failing: Document = {"smoke": {"expect": {"text": "no model says this"}}}
        name, changes = ("failing:v1", failing) if "failing:v1" in read(page) else ("another:v1", Document())
        other = node.item(name, tiny("another"), **changes)
        for listed in ([known], [known, other]):
            node.publish(*listed)
            assert node.run("apply", "--yes").code in {0, 3}
        for version in (2, 3):
            (node.folder / f"{version}.root.json").write_bytes(node.network.rotate(version=version))
        with shell(tmp_path, node.folder) as found:
            assert found.run(read(page), alone=False) > 0


def test_every_page_with_something_to_type_is_run() -> None:
    tried = {page for pages in FROM_NOTHING for page in pages} | set(ON_A_NODE)

    assert tried == {str(page.relative_to(DOCS)) for page in PAGES if steps(page.read_text())}


def test_the_reader_of_these_pages_sees_a_difference() -> None:
    assert shows(["a … c", "…", "d"], "a b c\nx\nd\n")
    assert not shows(["a … c"], "a b\n")
    assert not shows(["d", "a"], "a\nd\n")
    typed = [("console", "one    two", ["out"]), ("console", "three", [])]
    assert steps("```console\n$ one \\\n  two\nout\n# root\n$ three\n```\n") == typed


# -- blocks that are read --------------------------------------------------------------------------------------


def test_every_settings_file_in_the_documents_is_one() -> None:
    found = [body for page in PAGES for body in blocks(page.read_text(), "toml") if not body.startswith("# models.lock")]

    assert found
    for body in found:
        decode(body.encode(), Path("/etc/reconcile"))


def test_every_document_in_the_formats_is_one_and_the_lock_is_what_the_snapshot_compiles_to() -> None:
    text = read("formats.md")
    envelope, root, listed, peers = blocks(text, "json")
    swarm.check(msgspec.json.decode(peers, type=dict[str, swarm.Swarm])["swarm"])
    assert msgspec.json.decode(envelope, type=Envelope).payload_type == trust.SNAPSHOT_TYPE
    trust.check_root(msgspec.json.decode(root, type=trust.TrustRoot))
    payload = listed.strip().encode()
    digest = f"sha256:{hashlib.sha256(payload).hexdigest()}"
    verified = trust.Verified(snapshot=snapshot.decode(payload), digest=digest, root_version=1, role="")
    made = lock.encode(lock.compile(verified)).decode()
    part = re.compile(r"(<!-- lock:begin -->\n```toml\n).*?(```\n<!-- lock:end -->)", re.DOTALL)
    expected = part.sub(lambda found: f"{found[1]}{made.rstrip()}\n{found[2]}", text)
    if os.environ.get("UPDATE"):
        (DOCS / "formats.md").write_text(expected)

    assert read("formats.md") == expected


def test_every_json_and_python_block_is_one() -> None:
    for page in PAGES:
        for body in blocks(page.read_text(), "json"):
            assert json.loads(body) is not None, page
        for body in blocks(page.read_text(), "python"):
            ast.parse(body)


# -- lines for root ------------------------------------------------------------------------------------------------


def root_lines() -> list[str]:
    lines = [line for page in PAGES for body in blocks(page.read_text(), "console") for line in body.splitlines()]
    typed = re.compile(r"# (?:sudo -u reconcile \S+ )?/opt/reconcile/bin/reconcile (.*)")
    return [match[1] for line in lines if (match := typed.match(line))]


@pytest.mark.parametrize("line", root_lines())
def test_every_command_of_ours_among_the_lines_for_root_is_one(line: str) -> None:
    words = shlex.split(line)
    found = cli.get_command(click.Context(cli), words[0])

    assert found is not None
    assert found.make_context(words[0], words[1:]).info_name == words[0]


def test_no_page_tells_to_install_the_package_of_that_name_from_an_index() -> None:
    named = re.compile(r"pip install [^\n]*['\" ]reconciler\b")
    for page in [TOP / "README.md", TOP / "CONTRIBUTING.md", *PAGES]:
        assert not named.search(page.read_text()), page


# -- what the pages name ---------------------------------------------------------------------------------------


def test_every_file_of_deploy_that_the_pages_name_exists_and_the_settings_fit_the_units() -> None:
    for page in PAGES:
        for name in re.findall(r"deploy/[\w./-]+\w", page.read_text()):
            assert (TOP / name).exists(), f"{page.name}: {name}"
    chosen = decode(blocks(read("how-to/install.md"), "toml")[0].encode(), Path("/etc/reconcile"))
    assert re.search(r"^StateDirectory=reconcile\b", (TOP / "deploy/systemd/reconcile.service").read_text(), re.MULTILINE)
    state = Path("/var/lib/reconcile")
    assert chosen.store_path.is_relative_to(state)
    assert chosen.path(chosen.network.lockfile).is_relative_to(state)
    assert chosen.path(chosen.network.root) == Path("/etc/reconcile/root.json")


def test_every_kind_of_incident_has_its_line() -> None:
    assert all(f"`{kind}`" in read("how-to/incidents.md") for kind in status.INCIDENT_KINDS)


def test_every_test_that_a_page_names_is_there() -> None:
    named = [found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())]
    assert len(named) > 40
    for file, name in named:
        functions = {node.name for node in ast.parse((TOP / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not name or name in functions, f"{file} has no {name}"


def test_every_package_of_the_program_stands_in_the_design_and_the_readme() -> None:
    packages = {path.name for path in (TOP / "reconciler").iterdir() if (path / "__init__.py").exists()}
    modules = {path.stem for path in (TOP / "reconciler").glob("*.py") if not path.stem.startswith("__")}
    assert set(re.findall(r"^\| `(\w+)` \|", read("design.md"), re.MULTILINE)) == packages | modules
    table = (TOP / "README.md").read_text().partition("## Modules")[2].partition("## More")[0]
    assert packages <= set(re.findall(r"\w+", " ".join(re.findall(r"`([\w/]+)`", table))))


# -- form ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(reference_pages.pages()))
def test_the_reference_is_made_from_the_code(path: str) -> None:
    made = reference_pages.pages()[path]
    if os.environ.get("UPDATE"):
        (DOCS / path).write_text(made)

    assert read(path) == made, "run `make reference`"


def test_the_pages_of_the_reference_are_those_that_are_made() -> None:
    assert {f"reference/{path.name}" for path in (DOCS / "reference").iterdir()} == set(reference_pages.pages())


@pytest.mark.parametrize("page", [TOP / "CONTRIBUTING.md", TOP / "SECURITY.md", TOP / "README.md", *PAGES], ids=lambda path: path.name)
def test_no_page_is_longer_than_300_lines(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 300


def test_every_page_is_reached_from_the_navigation() -> None:
    def leaves(entries: object) -> Iterator[str]:
        if isinstance(entries, str):
            yield entries
        for inner in entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ():
            yield from leaves(inner)

    reached = set(leaves(yaml.safe_load((TOP / "mkdocs.yml").read_text())["nav"]))
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    assert reached == there | {"changelog.md", "contributing.md", "security.md"}


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    ran = subprocess.run(words, cwd=TOP, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?([^"'\s>]+)|<link[^>]*\shref=["']?([^"'\s>]+)""", page.read_text())
        assert not [url for found in loaded for url in found if "//" in url and not url.startswith("data:")], page


def test_the_forms_for_issues_ask_for_something() -> None:
    forms = [path for path in (TOP / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form.keys() == {"name", "description", "body"}
        assert any(part.get("validations", {}).get("required") for part in form["body"])


# -- words -----------------------------------------------------------------------------------------------------------


def glossary() -> dict[str, str]:
    return dict(re.findall(r"^\| `?([\w ]+?)`? \| (.+) \|$", read("glossary.md").partition("|---|---|\n")[2], re.MULTILINE))


def test_the_glossary_has_at_most_25_words_each_said_in_at_most_25() -> None:
    found = glossary()
    assert len(found) <= 25
    assert all(len(said.split()) <= 25 for said in found.values())
    assert {"absent", "pending", "active", "inactive", "failed", "archived", "snapshot", "lock", "blob", "tree", "generation"} <= set(found)


#: Words that once stood for one of the glossary's, or for nothing that a stranger knows.
AVOIDED = (
    r"network's word", r"last word", r"\bhears?\b", r"\bheard\b", r"\bthe house\b", r"\brooms? (?:of|in|that)\b", r"\bthe floor\b",
    r"\btrust floor\b", r"\bverdicts?\b", r"\bthaw", r"\blockfile\b", r"\bsmoke tests?\b", r"\bliars?\b", r"\bmade anew\b",
    r"\bwalk(?:s|ed)? (?:newer |the )?roots?\b",
)  # fmt: skip


@pytest.mark.parametrize("word", AVOIDED)
def test_the_pages_say_it_in_the_words_of_the_glossary(word: str) -> None:
    for page in [*TOP.glob("*.md"), *PAGES]:
        if not page.name.startswith("protections"):  # it names lines of code
            text = re.sub(r"```.*?```|`[^`\n]*`", "``", page.read_text(), flags=re.DOTALL)
            assert not (found := re.search(word, text)), f"{page.relative_to(TOP)}: {found}"


def test_settings_in_the_documents_are_toml() -> None:
    for page in PAGES:
        for body in blocks(page.read_text(), "toml"):
            assert tomllib.loads(body) is not None
