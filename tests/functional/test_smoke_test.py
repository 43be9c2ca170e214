"""Test jobs with llama.cpp for real: what comes out, what may be expected of it, and whose fault it is when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reconciler.core.node import Gpu
from reconciler.ports import TestReport
from reconciler.runtime import devices, gpu_use, smoke_test
from reconciler.runtime.gpu_use import GpuUse
from reconciler.runtime.llama_cpp_worker import Log
from reconciler.sandbox.supervision import ProcessResult
from tests import jobs
from tests.demand import working
from tests.node import Node, tiny

GIB = 1 << 30


def ran(folder: Path, data: bytes, text: str = "", **changes: Any) -> TestReport:
    return jobs.make_tester(folder, text).test(jobs.job(folder, data, **changes))


@pytest.fixture
def golden(tmp_path: Path) -> TestReport:
    """What the model says, once and for all: temperature 0 has no luck in it."""
    report = ran(tmp_path, tiny("a"))
    assert report.verdict == "passed"
    return report


# -- what comes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bubblewrap", "landlock"])
def test_a_completion_says_what_when_how_fast_and_where(tmp_path: Path, mode: Any) -> None:
    report = ran(tmp_path, tiny("a"), f'[smoke]\nsandbox = "{working(mode)}"\n')
    assert (report.verdict, report.reason) == ("passed", "")
    assert (report.engine, report.sandbox, report.tokens, len(report.token_ids)) == ("llama-cpp", mode, 4, 4)
    assert report.engine_version
    assert report.load_seconds > 0
    assert report.tokens_per_second == pytest.approx(report.tokens / report.run_seconds)


def test_the_same_job_gives_the_same_tokens_in_either_sandbox(tmp_path: Path, golden: TestReport) -> None:
    again = [ran(tmp_path, tiny("a"), f'[smoke]\nsandbox = "{working(mode)}"\n') for mode in ("bubblewrap", "landlock")]
    assert [report.token_ids for report in again] == [golden.token_ids] * 2


def test_a_chat_goes_through_the_files_own_template(tmp_path: Path) -> None:
    chat, plain = ran(tmp_path, tiny("c", "chat"), task="chat"), ran(tmp_path, tiny("c", "chat"))
    assert chat.verdict == "passed"
    assert chat.token_ids != plain.token_ids


def test_an_embedding_has_its_dimension(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("e", "embedding"), task="embedding")
    assert (report.verdict, report.dimension) == ("passed", 32)


def test_a_model_is_tested_for_what_it_is_for(tmp_path: Path) -> None:
    assert ran(tmp_path, tiny("e", "embedding")).reason == "it is an embedding model, and is asked for completion"
    assert ran(tmp_path, tiny("e", "embedding"), task="chat").reason == "it is an embedding model, and is asked for chat"
    assert ran(tmp_path, tiny("a"), task="embedding").reason.startswith("it is no embedding model: ")
    assert ran(tmp_path, tiny("a"), task="chat").reason == "it is to chat, and its file has no chat template"


@pytest.mark.parametrize("changes", [{"prompt": "x" * 4000}, {"max_tokens": 4096}])
def test_a_job_that_the_models_context_cannot_hold_fails_and_is_not_cut_in_silence(tmp_path: Path, changes: dict[str, Any]) -> None:
    report = ran(tmp_path, tiny("a"), **changes)
    assert report.verdict == "bad"
    assert report.reason.endswith("and its context holds 256")
    assert ran(tmp_path, tiny("e", "embedding"), prompt="x" * 4000, task="embedding").verdict == "bad"


# -- what may be expected ----------------------------------------------------------------------------


def test_every_expectation_that_holds_passes(tmp_path: Path, golden: TestReport) -> None:
    expect = {"text": golden.text[0], "regex": "(?s)^.", "min_tokens": 4, "tokens": list(golden.token_ids), "min_rate": 1}
    assert ran(tmp_path, tiny("a"), expect=expect).verdict == "passed"
    assert ran(tmp_path, tiny("e", "embedding"), task="embedding", expect={"dimension": 32}).verdict == "passed"


@pytest.mark.parametrize(
    ("expect", "said"),
    [
        ({"text": "Paris"}, "its answer does not contain 'Paris'; it said "),
        ({"regex": "^Paris$"}, "its answer does not match '^Paris$'; it said "),
        ({"min_tokens": 5}, "it generated 4 tokens, expected at least 5"),
        ({"tokens": [1, 2, 3, 4]}, "it generated the tokens ["),
        ({"min_rate": 10**9}, "tokens a second, expected at least 1000000000"),
        ({"dimension": 32}, "its embedding has None components, expected 32"),
    ],
)
def test_every_expectation_that_does_not_hold_fails_and_says_both(tmp_path: Path, expect: dict[str, Any], said: str) -> None:
    report = ran(tmp_path, tiny("a"), expect=expect)
    assert report.verdict == "bad"
    assert said in report.reason


def test_another_dimension_fails(tmp_path: Path) -> None:
    report = ran(tmp_path, tiny("e", "embedding"), task="embedding", expect={"dimension": 768})
    assert (report.verdict, report.reason) == ("bad", "its embedding has 32 components, expected 768")


def test_one_token_that_differs_fails(tmp_path: Path, golden: TestReport) -> None:
    *first, last = golden.token_ids
    assert ran(tmp_path, tiny("a"), expect={"tokens": [*first, last + 1]}).verdict == "bad"
    assert ran(tmp_path, tiny("a"), expect={"tokens": first}).verdict == "bad"


def test_an_expression_that_never_ends_is_ended_by_the_time_limit(tmp_path: Path) -> None:
    """It comes from the network and is tried in the sandbox: there its time is bounded, and this process never meets it."""
    report = ran(tmp_path, tiny("a"), max_tokens=48, timeout="2s", expect={"regex": r"(?s)^(.|.)*(.|.)*(.|.)*(.|.)*Q{9}$"})
    assert (report.verdict, report.reason) == ("bad", "its test job did not end in time, while matching the expected expression")


# -- whose fault -------------------------------------------------------------------------------------


def test_an_engine_that_is_not_here_leaves_the_model_untested(tmp_path: Path) -> None:
    for engine in ("vllm", "openai"):
        report = ran(tmp_path, tiny("a"), engine=engine)
        assert (report.verdict, report.reason) == ("unable", f"the engine {engine} is not installed")


def test_a_model_that_asks_for_a_gpu_where_there_is_none_is_not_tested_on_the_cpu(tmp_path: Path) -> None:
    if devices.gpus():
        pytest.skip("this machine has a GPU, and none is to be taken away from it")
    report = ran(tmp_path, tiny("a"), gpu_memory=GIB)
    assert (report.verdict, report.reason) == ("unable", "it asks for a GPU, and none answers now")


def test_a_gpu_that_is_full_is_no_fault_of_the_model(tmp_path: Path) -> None:
    full = (Gpu(name="G", total_bytes=8 * GIB, free_bytes=GIB), Gpu(name="G", total_bytes=8 * GIB, free_bytes=2 * GIB))
    assert (
        smoke_test._gpu_shortage(jobs.job(tmp_path, b"", gpu_memory=4 * GIB), full) == "the GPU is busy: 2.0 GiB are free, it needs 4.0 GiB"
    )
    assert smoke_test._gpu_shortage(jobs.job(tmp_path, b"", gpu_memory=2 * GIB), full) == ""


def test_on_a_node_with_a_gpu_a_test_that_ran_beside_it_could_not_be_made(tmp_path: Path) -> None:
    gpus = (Gpu(name="NVIDIA X", total_bytes=8 * GIB, free_bytes=8 * GIB),)
    asked, did_not = jobs.job(tmp_path, b"", gpu_memory=GIB), jobs.job(tmp_path, b"")
    beside, on = TestReport(verdict="passed"), TestReport(verdict="passed", gpu_layers=2)
    use = GpuUse(gpus=gpus)
    for job in (asked, did_not):
        found = gpu_use.judged(beside, job, use, on_gpu=False, server=False)
        assert (found.verdict, found.device) == ("unable", "cpu")
        assert found.reason.startswith("the GPU was not used: ")
        assert "gpu_layers = 0" in found.reason
    assert gpu_use.judged(on, asked, use, on_gpu=False, server=False).verdict == "passed"
    assert gpu_use.judged(on, asked, use, on_gpu=False, server=False).device == "NVIDIA X"
    assert gpu_use.judged(beside, asked, use, on_gpu=False, server=True).verdict == "unable"
    assert gpu_use.judged(beside, did_not, use, on_gpu=False, server=True).verdict == "passed"
    assert gpu_use.judged(beside, asked, use, on_gpu=False, server=True, seen=False).verdict == "passed"  # nothing of it can be seen
    assert gpu_use.judged(beside, did_not, GpuUse(on_cpu=True), on_gpu=False, server=False).verdict == "passed"


def test_a_failed_engines_last_word_on_memory_is_weighed_by_what_the_node_had(tmp_path: Path) -> None:
    word = {"nonce": "n", "verdict": "bad", "reason": "the engine does not load it: Failed to create llama_context"}
    log = "llama_context: ok\nggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 1099511627776\nbye"
    ended = ProcessResult(answer=word, confined=True, code=0, signal=0, timed_out=False, errors=log)
    job = jobs.job(tmp_path, b"")
    assert smoke_test._report_of(ended, job, roomy=True).verdict == "bad"
    busy = smoke_test._report_of(ended, job, roomy=False)
    assert busy.verdict == "unable"
    assert busy.reason.startswith("the device could not take it now: ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate")


# -- the engine's own log, the one witness of where it ran ---------------------------------------------

ON_TWO_GPUS = """\
load_tensors: offloading 28 repeating layers to GPU
load_tensors: offloaded 29/29 layers to GPU
load_tensors:   CPU_Mapped model buffer size =   292.36 MiB
load_tensors:        CUDA0 model buffer size =  2048.00 MiB
load_tensors:        CUDA1 model buffer size =  1024.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =     8.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.58 MiB
sched_reserve:      CUDA0 compute buffer size =    96.00 MiB
sched_reserve:      CUDA0 compute buffer size =    98.00 MiB
~llama_context:      CUDA0 compute buffer size is  98.0000 MiB, matches expectation of  98.0000 MiB
"""


def heard(text: str) -> Log:
    log = Log()
    for line in text.splitlines(keepends=True):
        log.note(line)
    return log


def test_layers_and_memory_on_the_gpu_are_what_the_engine_says() -> None:
    log = heard(ON_TWO_GPUS)
    assert log.gpu_layers == 29
    assert log.gpu_bytes == (2048 + 1024 + 16 + 8 + 98) << 20


@pytest.mark.parametrize(
    "text",
    [
        "load_tensors: offloaded 0/29 layers to GPU\nload_tensors:   CPU_Mapped model buffer size =   292.36 MiB\n",
        "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected\nload_tensors:  CPU model buffer size = 9.00 MiB\n",
        "llama_model_loader: - kv   1: general.name str = load_tensors: offloaded 29/29 layers to GPU\n",
        "print_info: general.name     = x load_tensors: CUDA0 model buffer size = 99.00 MiB\n",
        "",
    ],
)
def test_a_fall_back_to_the_cpu_is_seen_and_a_name_cannot_hide_it(text: str) -> None:
    log = heard(text)
    assert (log.gpu_layers, log.gpu_bytes) == (0, 0)


def test_a_name_with_lines_of_its_own_is_one_message() -> None:
    log = Log()
    log.note("print_info: general.name     = x\nload_tensors: offloaded 29/29 layers to GPU\n")
    assert log.gpu_layers == 0


# -- on a whole node ---------------------------------------------------------------------------------


def test_what_is_expected_and_not_found_fails_the_model_and_no_other(node: Node) -> None:
    wrong = {"prompt": "Hello", "max_tokens": 4, "timeout": "60s", "expect": {"text": "Paris"}}
    node.publish(node.item("good:v1", tiny("a")), node.item("wrong:v1", tiny("b"), smoke=wrong))
    assert node.run("apply").code == 3
    assert node.states() == {"good:v1": "active", "wrong:v1": "failed"}
    assert "does not contain 'Paris'" in node.run("status", "wrong:v1", "--json").json["models"][0]["test"]["reason"]
