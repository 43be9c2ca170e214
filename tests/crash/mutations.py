"""
Take out each protection in turn, and see which test goes red: ``python -m tests.crash.mutations [WORD...]``.

Every fsync, every refusal to follow a link, every check of bytes, sizes, identities, signatures, times and numbers. A copy of the
package and its tests is changed at one place, and the tests that are about it run until the first failure. A change that no test
notices is a violation: either a test is missing, or the protection is not needed. With words, only what has one of them in its line.
With ``--write``, the pages of the documentation are renewed with what was found; what was not tried keeps its line.

The test that noticed last time (``RECORDS``) is tried first, with the change and without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from tests.crash.protections import EQUIVALENT, ROOT, TESTS, Mutation, mutations

#: The pages that say which test noticed each change, with their titles. The first is for what guards the store and decides.
RECORDS = {
    ROOT / "docs" / "protections.md": "Protections of the store and the rules",
    ROOT / "docs" / "protections-outside.md": "Protections against what comes from outside",
}
_INSIDE = ("reconciler/store/", "reconciler/core/", "reconciler/apply/", "reconciler/files.py", "reconciler/hooks.py")
_HEAD = """# {title}

Each line below guards against one fault or attack. `python -m tests.crash.mutations --write` takes out each in turn, runs the tests that
are about it until one fails, and renews these pages. Last run: {at}.

| taken out | the test that goes red |
|---|---|
"""
_ROW = re.compile(r"(?m)^\| (.+?) \| (.+?) \|$")
#: A test that does not end within so many seconds went red, too.
SECONDS = 180.0


def outcome(mutation: Mutation) -> str:
    """Return the first test that goes red, and again when it runs alone, or nothing."""
    if mutation.what in EQUIVALENT:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name in ("reconciler", "tests", "deploy"):
            shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "cli.py"):
            shutil.copy(ROOT / name, here)
        if known := _noticed_again(here, mutation):
            return known
        _change(here / mutation.file, mutation)
        tests = TESTS[mutation.file]
        for _ in range(3):  # a test that a busy machine turns red says nothing
            red = _red(here, tests)
            if not red or _red(here, tests, "-k", red):
                break
        else:
            return ""
        shutil.copy(ROOT / mutation.file, here / mutation.file)
        return f"{red}, which is red without it too" if red.startswith("test_") and _red(here, tests, "-k", red) else red


def _noticed_again(here: Path, mutation: Mutation) -> str:
    """Return the test that noticed the change last time, if it still does and is green without the change; else nothing."""
    known = recorded().get(mutation.what, "").strip("`")
    places = [path for path in sorted((here / "tests").rglob("test_*.py")) if f"def {known}(" in path.read_text()]
    if not known.startswith("test_") or not places:
        return ""
    tests = (str(places[0].relative_to(here / "tests").with_suffix("")),)
    _change(here / mutation.file, mutation)
    red = _red(here, tests, "-k", known)
    shutil.copy(ROOT / mutation.file, here / mutation.file)
    return known if red == known and not _red(here, tests, "-k", known) else ""


def _red(here: Path, tests: tuple[str, ...], *options: str) -> str:
    """Return the first of *tests* that goes red, run in the copy at *here*."""
    paths = [f"tests/{test}.py" for test in tests]
    ran = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *options, *paths],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(here)},
    )  # fmt: skip
    try:
        said, _ = ran.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        ran.kill()
        ran.communicate()
        return "no end"
    red = re.search(r"(?:FAILED|ERROR) \S*::(\w+)", said)
    return red[1] if red else "" if ran.returncode == 0 else f"exit {ran.returncode}"


def _change(path: Path, mutation: Mutation) -> None:
    text = path.read_text()
    place = list(re.finditer(mutation.old, text))[mutation.count]
    path.write_text(text[: place.start()] + mutation.new + text[place.end() :])


def recorded() -> dict[str, str]:
    """Return what the pages say of each protection: the test that noticed, in backquotes, or why nobody can."""
    return {row[1]: row[2] for page in RECORDS if page.exists() for row in _ROW.finditer(page.read_text())}


def write(found: dict[str, str], at: str) -> None:
    """Renew the pages with what was *found* on the day *at*; what was not tried keeps its line."""
    known = dict.fromkeys((mutation.what for mutation in mutations()), "not tried yet") | recorded() | found
    for page, title in RECORDS.items():
        inside = page == next(iter(RECORDS))
        rows = [mutation.what for mutation in mutations() if mutation.file.startswith(_INSIDE) == inside]
        page.write_text(_HEAD.format(title=title, at=at) + "".join(f"| {what} | {known.get(what, 'not tried yet')} |\n" for what in rows))


def main() -> None:
    """Print the table; exit 1 if a change went unnoticed."""
    words = [word for word in sys.argv[1:] if word != "--write"] or [""]
    chosen = [mutation for mutation in mutations() if any(word in f"{mutation.what} {mutation.file}" for word in words)]
    print("| taken out | the test that goes red |\n|---|---|")
    unnoticed, noticed = 0, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, red in zip(chosen, pool.map(outcome, chosen), strict=True):
            unnoticed += not red and mutation.what not in EQUIVALENT
            noticed[mutation.what] = f"`{red}`" if red else EQUIVALENT.get(mutation.what, "NOBODY NOTICES")
            print(f"| {mutation.what} | {noticed[mutation.what]} |", flush=True)
    if "--write" in sys.argv:
        write(noticed, datetime.now(UTC).date().isoformat())
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
