"""
Type each install line of README and documentation in an environment of its own: ``make install-check``.

Rules that hold here:

1. A line is typed as it stands. What is filled in for it: the prompt of root, ``/opt/reconcile`` for a new virtual environment, and the
   address of an example for a git repository on this machine that holds the last commit.
2. Each ends with ``reconcile --version`` of this version, run from the folder that the line installed it into.
3. pipx and uv are installed with pip, and each then uses the index that it is set up for. Wheels that pip has built or finds are offered to
   both, so that llama-cpp-python is compiled once at most. ``--without-engine`` leaves it out of every line.
4. Nothing is written outside a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reconciler import __version__

TOP = Path(__file__).parents[1]
PAGES = ("README.md", "docs/how-to/install.md", "docs/how-to/upgrade.md")
_LINE = re.compile(r"(?:# )?((?:/opt/reconcile/bin/)?(?:pip install|pipx install|uv tool install) .*?)(?:\s+#.*)?")
_TOOLS = ("pipx", "uv")


def lines() -> list[tuple[str, str]]:
    """Return the install lines with the page that each stands on, and the two ways that a page describes in words."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", (TOP / page).read_text(), re.DOTALL | re.MULTILINE):
            found += [(page, match[1]) for line in block.splitlines() if (match := _LINE.fullmatch(line))]
    worded = (TOP / "docs/how-to/install.md").read_text()
    assert "(`pip wheel --no-deps .`) or a git address (`git+https://…`)" in worded
    assert "install `requirements.lock` first, with `--require-hashes`" in " ".join(worded.split())
    page = "docs/how-to/install.md"
    found.append((page, "pip wheel --no-deps . && pip install ./reconcile_models-*.whl"))
    found.append((page, "pip install 'git+https://git.example.org/reconcile.git'"))
    return found


class Place:
    """A temporary folder with a checkout, the tools, and what they install."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkout = folder / "checkout"
        self.wheels = folder / "wheels"
        for target in (self.checkout, folder / "reconcile.git"):
            subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", *_bare(target), str(TOP), str(target)], check=True)
        self.tools = self._environment("tools")
        subprocess.run([self.tools / "pip", "install", "--quiet", *_TOOLS], check=True)

    def _environment(self, name: str) -> Path:
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / name)], check=True)
        return self.folder / name / "bin"

    def build_engine(self) -> None:
        """Build or find the wheel of llama-cpp-python, once for all lines."""
        subprocess.run([self.tools / "pip", "wheel", "--quiet", "--no-deps", "-w", str(self.wheels), "llama-cpp-python"], check=True)

    def type(self, line: str, number: int) -> str:
        """Type *line* and return what ``reconcile --version`` says then."""
        own = self._environment(f"venv{number}")
        home = self.folder / f"home{number}"
        home.mkdir()
        typed = line.replace("/opt/reconcile/bin", str(own)).replace("git+https://git.example.org", f"git+file://{self.folder}")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("VIRTUAL_ENV")}
        environment |= {
            "PATH": f"{own}:{self.tools}:{environment['PATH']}", "HOME": str(home), "XDG_DATA_HOME": str(home),
            "UV_CACHE_DIR": str(self.folder / "uv"), "UV_TOOL_DIR": str(home / "tools"), "UV_TOOL_BIN_DIR": str(home / "bin"),
            "PIPX_HOME": str(home / "pipx"), "PIPX_BIN_DIR": str(home / "bin"),
            "PIP_CACHE_DIR": _pip("cache", "dir"), "PIP_FIND_LINKS": f"{self.wheels} {os.environ.get('PIP_FIND_LINKS', '')}".strip(),
            "UV_FIND_LINKS": ",".join([str(self.wheels), *os.environ.get("PIP_FIND_LINKS", "").split()]), "UV_SYSTEM_CERTS": "true",
        }  # fmt: skip
        subprocess.run(["bash", "-euo", "pipefail", "-c", typed], cwd=self.checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        program = next(path for path in (home / "bin/reconcile", own / "reconcile") if path.exists())
        ran = subprocess.run([program, "--version"], cwd=home, env=environment, capture_output=True, text=True, check=True)
        return ran.stdout.strip()


def _bare(target: Path) -> list[str]:
    return ["--bare"] if target.suffix == ".git" else []


def _pip(*words: str) -> str:
    ran = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def main() -> int:
    """Type the lines; return 1 if one does not end with this version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--without-engine", action="store_true", help="leave [llama-cpp] out of every line")
    parser.add_argument("--only", default="", help="only lines with this text in them")
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        if not chosen.without_engine:
            place.build_engine()
        place.wheels.mkdir(exist_ok=True)
        for number, (page, line) in enumerate(lines()):
            typed = line.replace("[llama-cpp]", "") if chosen.without_engine else line
            if chosen.only not in typed:
                continue
            begun = time.monotonic()
            try:
                said = place.type(typed, number)
            except (subprocess.CalledProcessError, StopIteration) as error:
                said = f"failed: {error}"
            is_ours = said == f"reconcile, version {__version__}"
            failed += not is_ours
            sys.stdout.write(f"{'ok    ' if is_ours else 'FAILED'}  {time.monotonic() - begun:5.1f} s  {page}: {typed}: {said}\n")
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
