"""
What starting costs: each command as a whole process, in turns with a bare interpreter that imports click and msgspec.

The ratio counts, and the modules that each imports: ``tests/functional/test_imports.py`` bounds those. Goals, of the bare start:
``--version`` and ``--help`` 1.2, a plan over 1,000 models 1.5, over 10,000 3.5, ``status`` the same, a sync without changes 1.8 and its
one request. The nodes hold all their models: a plan looks at each file of theirs. Byte code is kept as an installed package has it.

``python -m benchmarks.bench_start`` prints one table; ``--json FILE`` also writes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import imported, stores

TURNS = 9
SMALL, LARGE = 1000, 10_000


def commands(small: Path, large: Path) -> dict[str, list[str]]:
    """Return the words of each command that is measured, by its name in the table."""
    thousand, many = (["--config", str(folder / "reconcile.toml")] for folder in (small, large))
    return {
        "--version": ["--version"],
        "--help": ["--help"],
        "plan, 1,000 models": ["plan", *thousand],
        "plan, 10,000 models": ["plan", *many],
        "status, 1,000 models": ["status", *thousand],
        "status, 10,000 models": ["status", *many],
        "sync without changes, 1,000 models": ["sync", *thousand],
    }


def measure(words: dict[str, list[str]], turns: int, bytecode: Path) -> dict[str, dict[str, float]]:
    """Return for each command the median of its seconds, and of their ratio to a bare start of the same turn."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    surroundings = kept | {"PYTHONPYCACHEPREFIX": str(bytecode)}
    runs = {"bare": [sys.executable, "-c", "import click, msgspec"]}
    runs |= {name: [sys.executable, "-m", "reconciler", *given] for name, given in words.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, argv in runs.items():
            began = time.perf_counter()
            subprocess.run(argv, env=surroundings, check=True, capture_output=True)
            if turn:  # the first writes byte code
                seconds[name].append(time.perf_counter() - began)
    ratios = {name: [one / bare for one, bare in zip(found, seconds["bare"], strict=True)] for name, found in seconds.items()}
    return {name: {"seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios[name])} for name in runs}


@pytest.mark.benchmark(group="start")
def test_each_command_beside_a_bare_start(benchmark, tmp_path):  # type: ignore[no-untyped-def]
    small, large = tmp_path / "small", tmp_path / "large"
    stores.full(small, 100)
    stores.full(large, SMALL)
    words = commands(small, large)
    benchmark.extra_info["modules"] = {name: len(imported.own(imported.modules(*given))) for name, given in words.items()}
    benchmark.extra_info["ratios"] = benchmark.pedantic(measure, args=(words, 5, tmp_path / "bytecode"), rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        stores.full(small, SMALL)
        stores.full(large, LARGE)
        words = commands(small, large)
        found = measure(words, given.turns, Path(folder) / "bytecode")
        counts = {name: imported.modules(*one) for name, one in words.items()}
    print("| command | seconds | of a bare start | modules | of them ours |\n|---|---:|---:|---:|---:|")
    for name, row in found.items():
        modules = counts.get(name, frozenset())
        print(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | {len(modules) or '–'} | {len(imported.own(modules)) or '–'} |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
