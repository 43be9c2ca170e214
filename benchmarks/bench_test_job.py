"""
What a test job costs beside llama.cpp itself, which loads the same model and generates as many tokens in a bare interpreter.

Both are whole: the bare one from the start of its interpreter to its end, ours from the call of ``Tester.test`` to its report, with the
sandbox, the checks of the header and the worker's imports. They take turns. Budget: 0.3 s more.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.bench_sandbox import BUDGET_SECONDS, MODES, _job, _sandboxed
from tests import gguf_files as files

TURNS = 9
BARE = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_gpu_layers=0, n_ctx=256, n_batch=256, verbose=False)
prompt, tokens = model.tokenize(sys.argv[2].encode()), int(sys.argv[3])
print(len([token for token, _ in zip(model.generate(prompt, temp=0.0), range(tokens))]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "model.gguf").write_bytes(files.whole().encode())
    return tmp_path / "tree"


def _bare(tree: Path) -> None:
    job = _job(tree)
    argv = [sys.executable, "-I", "-c", BARE, str(tree / job.entrypoint), job.smoke.prompt, str(job.smoke.max_tokens)]
    done = subprocess.run(argv, capture_output=True, check=True, text=True, timeout=120)
    assert int(done.stdout.split()[-1]) > 0


@pytest.mark.benchmark(group="test job, beside llama.cpp alone")
@pytest.mark.parametrize("mode", MODES)
def test_a_test_job_beside_bare_llama_cpp(benchmark, tree, mode):  # type: ignore[no-untyped-def]
    ours, seconds = _sandboxed(tree, mode), list[tuple[float, float]]()
    for _ in range(TURNS + 1):
        began = time.perf_counter()
        ours()
        between = time.perf_counter()
        _bare(tree)
        seconds.append((between - began, time.perf_counter() - between))
    job, bare = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    own = statistics.median(one - other for one, other in seconds[1:])
    benchmark.extra_info |= {"job_seconds": job, "bare_seconds": bare, "own_seconds": own}
    benchmark.pedantic(ours, rounds=1)
    print(f"\n{mode}: test job {job:.3f} s, llama.cpp alone {bare:.3f} s, own cost {own:.3f} s (median of {TURNS} pairs)")
    assert own <= BUDGET_SECONDS
