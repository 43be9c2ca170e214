"""Children that misbehave, each in each mode of the sandbox: they stay bounded, are judged by what they did, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from reconciler.core import snapshot
from reconciler.core.errors import DiskFull, StoreError, UnpackRefused
from reconciler.ports import TestJob, TestReport
from reconciler.runtime import smoke_test
from reconciler.sandbox import choose, confine, supervision
from reconciler.sandbox.process import Mode, SandboxJob
from reconciler.sandbox.supervision import ProcessResult
from reconciler.unpack import in_sandbox
from tests import jobs
from tests.demand import working
from tests.node import tiny
from tests.processes import outliving

TOP = Path(__file__).resolve().parents[2]
MODES: tuple[Mode, ...] = ("bubblewrap", "landlock")
#: Long beside what any of these takes, short beside a test run.
PATIENCE = 60.0


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    return working(request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    """Whatever a test did, no descendant of this process outlives it."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [(child.pid, child.cmdline()) for child in left if child.is_running()] == []


def run(mode: Mode, way: str, *, seconds: float = PATIENCE, memory: int = 0, **job: Any) -> ProcessResult:
    return choose.make_sandbox(mode).run(
        SandboxJob(module="tests.children.misbehave", job=job | {"way": way}, seconds=seconds, read=(TOP / "tests",), memory_bytes=memory)
    )


def judged(ended: ProcessResult, *, roomy: bool = False) -> TestReport:
    runtime, smoke = snapshot.Runtime(engine="llama-cpp"), snapshot.Smoke()
    job = TestJob(model="m:v1", tree=Path("/nowhere"), entrypoint="m.gguf", runtime=runtime, smoke=smoke)
    return smoke_test._report_of(ended, job, roomy=roomy)


class Watched:
    """A pipe that remembers which threads use it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.threads: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        self.threads.add(threading.get_ident())
        self._pipe.write(data)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self._pipe.close()


@pytest.mark.parametrize("command", ["exit 1", "exec sleep 60"])
def test_a_child_that_reads_nothing_is_fed_by_one_thread_alone(command: str) -> None:
    """Two that close one file at once raise what nobody expects: a sandbox that did not start was taken for a bad model."""
    started = subprocess.Popen(["sh", "-c", command], stdin=-1, stdout=-1, stderr=-1, start_new_session=True)
    pipe: Any = started.stdin
    child: Any = started
    child.stdin = Watched(pipe)

    ended = supervision.supervise(child, b"x" * (1 << 20), "nonce", seconds=0.5, answer_bytes=99, wrapped=False)

    assert not ended.confined
    assert len(child.stdin.threads) == 1
    assert pipe.closed


# -- the end of a run ---------------------------------------------------------------------------------


def test_a_job_ends_when_the_run_does(mode: Mode) -> None:
    job = SandboxJob(module="tests.children.misbehave", job={"way": "ignore_signals"}, seconds=PATIENCE, read=(TOP / "tests",))
    began = time.monotonic()
    with contextlib.closing(supervision.StopSignal()) as stop:
        timer = threading.Timer(0.5, stop.set)
        timer.start()
        ended = choose.make_sandbox(mode).run(job, stop)
        timer.join()
    assert ended.valid_answer is None
    assert time.monotonic() - began < PATIENCE / 2


def test_a_closed_tester_says_nothing_about_a_model(tmp_path: Path) -> None:
    closed = jobs.make_tester(tmp_path)
    closed.close()
    closed.close()
    report = closed.test(jobs.job(tmp_path, tiny("a")))
    assert (report.verdict, report.reason) == ("unable", "the run was stopped")


# -- time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["hang", "spin", "ignore_signals"])
def test_a_child_that_does_not_end_is_ended_and_the_model_is_bad(mode: Mode, way: str) -> None:
    began = time.monotonic()
    ended = run(mode, way, seconds=1.0)
    assert ended.timed_out
    assert ended.confined
    assert time.monotonic() - began < PATIENCE
    assert judged(ended) == TestReport(verdict="bad", reason="its test job did not end in time", engine="llama-cpp")


@pytest.mark.parametrize("way", ["answer_and_hang", "answer_and_die"])
def test_a_good_word_from_a_child_that_ends_badly_counts_for_nothing(mode: Mode, way: str) -> None:
    ended = run(mode, way, seconds=2.0)
    assert ended.answer is not None
    assert ended.valid_answer is None
    assert judged(ended).verdict == "bad"


# -- memory, processes, output -----------------------------------------------------------------------


def test_a_child_that_eats_memory_gets_what_was_agreed_and_no_more(mode: Mode) -> None:
    ended = run(mode, "eat_memory", memory=256 << 20)
    assert ended.valid_answer is not None
    assert 64 <= ended.valid_answer["mebibytes"] <= 256


def test_a_child_cannot_leave_a_process_behind(mode: Mode) -> None:
    ended = run(mode, "fork")
    assert ended.valid_answer is not None
    assert ended.valid_answer["refused"] == "PermissionError"


def test_a_servers_process_in_a_session_of_its_own_ends_with_the_namespace(tmp_path: Path) -> None:
    working("bubblewrap")
    ended = choose.make_sandbox("bubblewrap").run(
        SandboxJob(
            module="tests.children.misbehave", job={"way": "fork"}, seconds=PATIENCE, read=(TOP / "tests",), write=tmp_path, server=True
        )
    )
    assert ended.valid_answer is not None
    assert ended.valid_answer["refused"] == ""
    assert outliving(_sandboxed_processes(tmp_path)) == []


def _sandboxed_processes(folder: Path) -> set[int]:
    """Processes that run our bootstrap and may write to *folder*, whoever their parent is by now; other tests have others."""
    found = set()
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if confine.BOOTSTRAP in words and any(str(folder) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("to", [1, 2])
def test_a_gibibyte_of_output_fills_no_memory_of_ours(mode: Mode, to: int) -> None:
    before = psutil.Process().memory_info().rss
    ended = run(mode, "flood", mebibytes=1024, to=to)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 64 << 20
    assert len(ended.errors) <= 1 << 16
    if to == 1:
        assert ended.valid_answer is None
        assert judged(ended).verdict == "bad"
    else:
        assert ended.valid_answer is not None


# -- words -------------------------------------------------------------------------------------------

PASSED = '{"verdict": "passed", "tokens": 8'


@pytest.mark.parametrize(
    "data",
    [
        PASSED + "}",
        PASSED + ', "nonce": null}',
        PASSED + ', "nonce": "00000000000000000000000000000000"}',
        PASSED + ', "nonce": ["a"]}',
        "passed",
        "",
        "[]",
        "null",
        "[" * 20_000,
        '{"nonce": NaN}',
        confine.CONFINED.decode() + PASSED + "}",
        "\x00\xff",
    ],
)
def test_a_verdict_without_the_jobs_nonce_is_noise(mode: Mode, data: str) -> None:
    ended = run(mode, "forge", data=data)
    assert ended.confined
    assert ended.answer is None
    report = judged(ended)
    assert report.verdict == "bad"
    assert report.reason == "its test job ended with 0 and no verdict: it said nothing"


@pytest.mark.parametrize(
    "says",
    [
        {"verdict": "splendid"},
        {"tokens": -1},
        {"tokens": 10**30},
        {"tokens": "8"},
        {"tokens_per_second": 1e308},
        {"load_seconds": -1.0},
        {"text": "x" * 10_000},
        {"token_ids": [1.5]},
        {"token_ids": list(range(5000))},
        {"sandbox": "none"},
        {"engine": "another"},
        {"device": "NVIDIA H900"},
    ],
    ids=json.dumps,
)
def test_a_word_of_another_shape_is_nonsense(says: dict[str, Any]) -> None:
    """What is written down of a report must be what can be read again; a child may not speak of what it cannot know."""
    ended = run(working("landlock"), "answer", says=json.dumps(says))
    assert ended.answer is not None
    report = judged(ended)
    assert report.verdict == "bad"
    assert report.reason.startswith("its test job answered nonsense: ")


def test_what_a_child_says_cannot_steer_a_terminal_or_break_an_encoder() -> None:
    says = {"verdict": "bad", "reason": "a\x1b]0;title\x07b\u202ec\nd\ud800", "text": "ok\ud800"}
    report = judged(run(working("landlock"), "answer", says=json.dumps(says)))
    assert report.reason == "a�]0;title�b�c�d�"
    assert report.text.encode() == b"ok?"


def test_what_a_child_complains_of_cannot_steer_a_terminal(mode: Mode) -> None:
    report = judged(run(mode, "complain", data="\x1b[2Jgone\r\n", code=3))
    assert report.reason == "its test job ended with 3 and no verdict: �[2Jgone"


# -- ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 97, 100, 255])
def test_a_child_that_ends_without_a_word_is_bad_whatever_its_code(mode: Mode, code: int) -> None:
    report = judged(run(mode, "leave", code=code))
    assert (report.verdict, report.reason) == ("bad", f"its test job ended with {code} and no verdict: it said nothing")


@pytest.mark.parametrize("data", ["bwrap: Creating new namespace failed", "the sandbox could not be set up: SetupFailed: x"])
def test_a_child_cannot_blame_the_sandbox(mode: Mode, data: str) -> None:
    """A model that could would stay pending for ever, and be tried for ever."""
    for code in (1, confine.SETUP_FAILED):
        assert judged(run(mode, "complain", data=data, code=code)).verdict == "bad"


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_child_that_dies_of_itself_is_bad(mode: Mode, name: str) -> None:
    report = judged(run(mode, "die", signal=name))
    assert report.verdict == "bad"
    assert name in report.reason


def test_a_child_that_somebody_kills_says_nothing_about_the_model(mode: Mode) -> None:
    ended: list[ProcessResult] = []
    before = {one.pid for one in psutil.Process().children()}
    running = threading.Thread(target=lambda: ended.append(run(mode, "hang")))
    running.start()
    while not (mine := [one for one in psutil.Process().children() if one.pid not in before]):
        assert running.is_alive()
    os.kill(mine[0].pid, signal.SIGKILL)
    running.join(PATIENCE)
    assert ended[0].signal == signal.SIGKILL
    assert judged(ended[0]).verdict == "unable"


def test_a_child_that_the_kernel_kills_inside_its_namespace_says_nothing_either() -> None:
    """As when memory runs out: the victim is the child, not bubblewrap, which tells by its code."""
    working("bubblewrap")
    ended = run("bubblewrap", "die", signal="SIGTERM")
    assert ended.signal == signal.SIGTERM
    assert judged(ended).verdict == "unable"


def test_a_child_ends_with_its_parent(mode: Mode, tmp_path: Path) -> None:
    """A run that is killed leaves no test job behind."""
    import subprocess
    import sys

    program = f"from tests.adversary.test_hostile_child import run, PATIENCE\nrun({mode!r}, 'hang')\n"
    with subprocess.Popen([sys.executable, "-c", program], cwd=TOP) as parent:
        while not (family := psutil.Process(parent.pid).children(recursive=True)) or not _confined(family[-1]):
            assert parent.poll() is None
        parent.kill()
    assert outliving(process.pid for process in family) == []


def _confined(process: psutil.Process) -> bool:
    """Whether the filter is on: from then on it is confined."""
    try:
        return "Seccomp:\t2" in Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False


# -- want of memory, and busy devices: whose fault ---------------------------------------------------


def said(errors: str, **changes: Any) -> ProcessResult:
    fields: dict[str, Any] = {"answer": None, "confined": True, "code": 1, "signal": 0, "timed_out": False, "errors": errors}
    return ProcessResult(**fields | changes)


@pytest.mark.parametrize("words", ["ggml_backend_cpu_buffer: failed to allocate buffer of size 9", "terminate: std::bad_alloc"])
def test_a_want_of_memory_is_the_models_fault_where_there_was_plenty(words: str) -> None:
    assert judged(said(words), roomy=True).verdict == "bad"
    assert judged(said(words), roomy=False).verdict == "unable"


@pytest.mark.parametrize("words", ["CUDA error: device busy", "ggml_cuda_init: failed: no CUDA-capable device is detected"])
def test_a_device_that_fails_is_never_the_models_error_of(words: str) -> None:
    assert judged(said(words), roomy=True).verdict == "unable"


def test_a_program_that_cannot_be_loaded_in_the_sandbox_is_never_the_models_error_of(mode: Mode) -> None:
    """As with packages that lie where the sandbox does not look."""
    ended = choose.make_sandbox(mode).run(SandboxJob(module="tests.children.of_nobody", job={}, seconds=PATIENCE, read=(TOP / "tests",)))
    report = judged(ended)
    assert report.verdict == "unable"
    assert report.reason.startswith("sandbox-unavailable: the sandbox could not be set up: ModuleNotFoundError")


def test_a_sandbox_that_did_not_come_up_is_never_the_models_error_of() -> None:
    for changes in ({}, {"timed_out": True}, {"signal": signal.SIGSEGV}, {"code": 0}):
        report = judged(said("bwrap: no such thing", confined=False, **changes))
        assert (report.verdict, report.reason) == ("unable", "sandbox-unavailable: bwrap: no such thing")


def test_an_extractor_that_somebody_kills_says_nothing_about_the_archive() -> None:
    assert isinstance(in_sandbox._error_of(said("", signal=signal.SIGKILL, code=-9)), StoreError)
    for changes in ({"signal": signal.SIGSEGV}, {"timed_out": True}, {"code": 0}):
        assert isinstance(in_sandbox._error_of(said("", **changes)), UnpackRefused)


_ERROR = {"name": "disk-full", "message": "no room", "hint": "make room"}


@pytest.mark.parametrize(
    "says",
    [
        {}, {"members": None}, {"members": 1}, {"members": "ab"}, {"members": {"a": 1}}, {"members": [1]}, {"members": [["a"]]},
        {"members": ["a"], "more": 1}, {"error": "store"}, {"error": []}, {"error": {}}, {"error": _ERROR | {"name": ["store"]}},
        {"error": _ERROR | {"name": "stale-plan"}}, {"error": _ERROR | {"message": 1}}, {"error": _ERROR | {"message": "x" * 9999}},
    ],
    ids=lambda says: str(says)[:60],
)  # fmt: skip
def test_an_extractor_that_answers_nonsense_refuses_its_archive(says: dict[str, Any]) -> None:
    with pytest.raises(UnpackRefused, match="its extractor"):
        in_sandbox._members(said("", code=0, answer={"nonce": "n"} | says))


def test_an_extractors_error_comes_out_whole_and_steers_no_terminal() -> None:
    with pytest.raises(DiskFull, match="no room") as caught:
        in_sandbox._members(said("", code=0, answer={"nonce": "n", "error": _ERROR | {"hint": "make \x1b[31mroom"}}))
    assert caught.value.hint == "make \N{REPLACEMENT CHARACTER}[31mroom"
