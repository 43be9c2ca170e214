"""
A plan with nothing to do, as a whole process: what cron and CI pay, every time.

Budget: 0.15 s over 1,000 models of 2,000 blobs, and linear in models: at most ten times that over 10,000. Beside it, in turns, what one
would use instead: ``dvc status`` over as many tracked files, where ``$DVC`` names the program (``pip install dvc`` into a venv of its own).
Python's byte code is kept as an installed package has it, whatever the surroundings say.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import stores

BUDGET_SECONDS = 0.15
TURNS = 15
#: Models have two blobs each.
TRACKED = 2000


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _node(tmp_path_factory, 1000)


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _node(tmp_path_factory, 10_000)


def _node(factory: pytest.TempPathFactory, models: int) -> Path:
    folder = factory.mktemp("stores") / str(models)
    stores.full(folder, models)
    return folder


def _plan(folder: Path, surroundings: dict[str, str]) -> Callable[[], None]:
    words = [str(Path(sys.executable).with_name("reconcile")), "plan", "--detailed-exitcode", "--config", str(folder / "reconcile.toml")]

    def run() -> None:
        done = subprocess.run(words, env=surroundings, check=True, capture_output=True, text=True)
        assert done.stdout.startswith("No changes: ")

    run()  # byte code is written, files are in the page cache
    return run


def _processor_seconds(run: Callable[[], None]) -> float:
    """Return what the processor worked for one run: what the clock says would be less, were the machine ours alone."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.benchmark(group="plan, nothing to do")
def test_a_thousand_models(benchmark, thousand, surroundings):  # type: ignore[no-untyped-def]
    run = _plan(thousand, surroundings)
    benchmark.extra_info["processor_seconds"] = statistics.median(_processor_seconds(run) for _ in range(TURNS))
    benchmark.pedantic(run, rounds=TURNS)


@pytest.mark.benchmark(group="plan, nothing to do")
def test_ten_thousand_models_cost_at_most_ten_times_as_much(benchmark, thousand, ten_thousand, surroundings):  # type: ignore[no-untyped-def]
    small, large = _plan(thousand, surroundings), _plan(ten_thousand, surroundings)
    pairs = [(_processor_seconds(small), _processor_seconds(large)) for _ in range(5)]
    benchmark.extra_info["ratio"] = ratio = statistics.median(large for _, large in pairs) / statistics.median(small for small, _ in pairs)
    benchmark.pedantic(large, rounds=5)
    assert ratio <= 10


@pytest.mark.benchmark(group="plan, beside dvc status")
def test_dvc_status_over_as_many_files(benchmark, thousand, surroundings, tmp_path):  # type: ignore[no-untyped-def]
    dvc = shutil.which(os.environ.get("DVC", "dvc"))
    if dvc is None:
        pytest.skip("dvc is not installed (it brings a hundred packages, with other versions of some of ours): set DVC to its program")
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "cache")}
    data = tmp_path / "data"
    data.mkdir()
    for number in range(TRACKED):
        (data / str(number)).write_bytes(f"{number}".encode() * 8)
    _dvc(dvc, environment, tmp_path, "init", "--no-scm")
    _dvc(dvc, environment, tmp_path, "add", "--quiet", *(f"data/{number}" for number in range(TRACKED)))

    def status() -> None:
        assert b"up to date" in _dvc(dvc, environment, tmp_path, "status")

    status()
    plan = _plan(thousand, surroundings)
    pairs = [(_seconds(plan), _seconds(status)) for _ in range(3)]
    benchmark.extra_info["plan_seconds"] = statistics.median(ours for ours, _ in pairs)
    benchmark.extra_info["dvc_status_seconds"] = statistics.median(theirs for _, theirs in pairs)
    benchmark.pedantic(status, rounds=1)


def _dvc(dvc: str, environment: dict[str, str], folder: Path, *words: str) -> bytes:
    return subprocess.run([dvc, *words], cwd=folder, env=environment, check=True, capture_output=True).stdout


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
