"""
Writes ``docs/demo.svg``, the recording in the README, from a real run of the demo: ``python docs/record.py``.

The picture is text in SVG: no script, no font and no image is loaded.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

_COLUMNS = 100
_MOST_LINES = 48


def recorded() -> list[str]:
    """Return what the demo shows, without what differs from run to run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "reconciler", "demo", "--folder", f"{folder}/demo"]
        ran = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"NO_COLOR": "1"})
        lines = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8080", ran.stdout.replace(folder, "~")).splitlines()
    return [_cut(line.rstrip()) for line in lines if line.strip()]


def _cut(line: str) -> str:
    return line if len(line) <= _COLUMNS else f"{line[: _COLUMNS - 1]}…"


def svg(lines: list[str]) -> str:
    """Return *lines* as a picture of a terminal."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), highlight=False)
    shown = lines[:_MOST_LINES]
    for line in shown:
        style = "bold" if line.startswith("$ ") else ""
        console.print(Text(line, style=style), soft_wrap=False)
    made = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    made = made.replace("<!-- Generated with Rich https://www.textualize.io -->", "")
    return re.sub(r"@font-face \{.*?\}\s*", "", made, flags=re.DOTALL)


if __name__ == "__main__":
    Path(__file__).with_name("demo.svg").write_text(svg(recorded()))
