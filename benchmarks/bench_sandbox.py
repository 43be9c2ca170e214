"""
What the sandbox costs a test job: the same child, the same model, with and without it, in turns, in one run.

Budget: 0.3 s more than the bare child. Cold starts are not counted: the first run of each brings Python's and the engine's files into
the page cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.core import gguf, snapshot
from reconciler.ports import TestJob
from reconciler.runtime.smoke_test import job_document
from reconciler.sandbox import choose, process
from tests import gguf_files as files
from tests.jobs import make_tester

BUDGET_SECONDS = 0.3
TURNS = 15
TOP = Path(__file__).resolve().parents[1]
#: Starts without a sandbox what the sandbox starts: the same interpreter, flags, environment and module.
BARE = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_module('reconciler.runtime.llama_cpp_worker', run_name='__main__')"
MODES = ("bubblewrap", "landlock")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "model.gguf").write_bytes(files.whole().encode())
    return tmp_path / "tree"


def _job(tree: Path) -> TestJob:
    return TestJob(model="m:v1", tree=tree, entrypoint="model.gguf", runtime=snapshot.Runtime(engine="llama-cpp"), smoke=snapshot.Smoke())


def _bare(tree: Path) -> None:
    """Run the child as it is, without a sandbox, on a model that we made ourselves."""
    job = {"nonce": "n"} | job_document(_job(tree), {"gpu_layers": 0, "threads": 0}, seconds=60)
    argv = [sys.executable, "-I", "-B", "-c", BARE, str(TOP)]
    done = subprocess.run(argv, input=json.dumps(job).encode(), capture_output=True, check=True, env=process._fixed_variables("/"))  # noqa: SLF001
    assert json.loads(done.stdout)["verdict"] == "passed"


def _sandboxed(tree: Path, mode: str) -> Callable[[], None]:
    probed = next(found for found in choose.probe_all() if found.mode == mode)
    if not probed.works:
        pytest.skip(f"{mode} cannot work on this machine: {probed.detail}")  # what a mode costs is measured where it works
    text = f'[smoke]\nsandbox = "{mode}"\n[runtime.llama-cpp]\ngpu_layers = 0\n'
    tester = make_tester(tree.parent, text)
    job = _job(tree)

    def run() -> None:
        report = tester.test(job)
        assert (report.verdict, report.sandbox) == ("passed", mode), report.reason

    return run


@pytest.mark.benchmark(group="test job")
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_test_job(benchmark, tree, mode):  # type: ignore[no-untyped-def]
    run = (lambda: _bare(tree)) if mode == "none" else _sandboxed(tree, mode)
    benchmark.pedantic(run, rounds=TURNS, warmup_rounds=1)


@pytest.mark.benchmark(group="overhead of the sandbox")
@pytest.mark.parametrize("mode", MODES)
def test_the_overhead_is_within_its_budget(benchmark, tree, mode):  # type: ignore[no-untyped-def]
    boxed = _sandboxed(tree, mode)
    overheads = [_seconds(boxed) - _seconds(lambda: _bare(tree)) for _ in range(TURNS + 1)]
    benchmark.pedantic(boxed, rounds=1)
    benchmark.extra_info["overhead_seconds"] = overhead = statistics.median(overheads[1:])
    assert overhead <= BUDGET_SECONDS


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@pytest.mark.benchmark(group="header check")
def test_a_header_with_150000_tokens(benchmark, tmp_path):  # type: ignore[no-untyped-def]
    tokens = [f"token-{number:06}" for number in range(150_000)]
    sketch = files.whole().with_key("tokenizer.ggml.tokens", files.ARRAY, (files.STRING, tokens))
    sketch = sketch.with_key("tokenizer.ggml.merges", files.ARRAY, (files.STRING, [f"{token} x" for token in tokens]))
    sketch = sketch.without_key("tokenizer.ggml.scores").without_key("tokenizer.ggml.token_type")
    path = tmp_path / "model.gguf"
    path.write_bytes(sketch.encode())
    benchmark(gguf.check, path)
