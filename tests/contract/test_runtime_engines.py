"""One contract for every engine: what a test job must tell of a good model, of one that answers wrongly, and of one that is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from reconciler.core import snapshot
from reconciler.ports import TestJob, TestReport
from tests import gguf_files as files
from tests.demand import needs_bubblewrap, working
from tests.jobs import make_tester

pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}[assistant] "
SERVER = [sys.executable, "-m", "llama_cpp.server", "--model", "{model}", "--host", "127.0.0.1", "--port", "{port}", "--n_ctx", "256"]
ENGINES = ("llama-cpp", "openai")


class Bench:
    """One engine, ready to test models."""

    def __init__(self, engine: str, folder: Path) -> None:
        self.engine = engine
        self.folder = folder

    def test(self, data: bytes | None, more: tuple[str, ...] = (), **smoke: object) -> TestReport:
        tree = self.folder / "tree"
        tree.mkdir(exist_ok=True)
        (tree / "model.gguf").unlink(missing_ok=True)
        if data is not None:
            (tree / "model.gguf").write_bytes(data)
        text = f"[runtime.llama-cpp]\nthreads = 1\n[runtime.openai]\nargv = {json.dumps([*SERVER, *more])}\n"
        tester = make_tester(self.folder, text)
        wanted = snapshot.Smoke(**{"max_tokens": 4, "timeout": "120s"} | smoke)  # type: ignore[arg-type]  # a test's own words
        runtime = snapshot.Runtime(engine=self.engine)
        return tester.test(TestJob(model="m:v1", tree=tree, entrypoint="model.gguf", runtime=runtime, smoke=wanted))


@pytest.fixture(params=ENGINES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    needs_bubblewrap()
    if request.param == "openai" and importlib.util.find_spec("uvicorn") is None:
        pytest.skip("llama-cpp-python[server] is not installed: uvicorn is lacking")
    return Bench(request.param, tmp_path)


def test_a_good_model_passes_and_says_what_it_did(bench: Bench) -> None:
    report = bench.test(files.whole().encode())
    assert (report.verdict, report.reason, report.engine) == ("passed", "", bench.engine)
    assert (report.device, report.gpu_layers, report.sandbox) == ("cpu", 0, "bubblewrap")
    assert report.tokens >= 4  # this server counts again in the text that it made, and bytes are no letters
    assert report.load_seconds > 0
    assert report.tokens_per_second > 0
    assert report.engine_version


def test_a_chat_model_chats_through_its_own_template(bench: Bench) -> None:
    report = bench.test(files.whole(template=TEMPLATE).encode(), task="chat")
    assert (report.verdict, report.reason) == ("passed", "")
    assert report.tokens >= 1


def test_an_embedding_model_embeds(bench: Bench) -> None:
    report = bench.test(files.whole(pooling=1).encode(), ("--embedding", "true"), task="embedding")
    assert (report.verdict, report.reason, report.dimension) == ("passed", "", files.WIDTH)


def test_a_dimension_that_is_not_expected_is_bad(bench: Bench) -> None:
    expect = snapshot.Expect(dimension=files.WIDTH + 1)
    report = bench.test(files.whole(pooling=1).encode(), ("--embedding", "true"), task="embedding", expect=expect)
    assert (report.verdict, report.reason) == ("bad", "its embedding has 4 components, expected 5")


def test_zeros_are_no_embedding(bench: Bench) -> None:
    zero = bytes(4 * files.WIDTH)
    sketch = files.whole(pooling=1).with_tensor("output_norm.weight", data=zero)
    report = bench.test(sketch.encode(), ("--embedding", "true"), task="embedding")
    assert report.verdict == "bad"
    assert "zeros" in report.reason or "finite" in report.reason


@pytest.mark.parametrize(
    ("expect", "said"),
    [
        (snapshot.Expect(text="\x00never\x00"), "does not contain"),
        (snapshot.Expect(regex="^never$"), "does not match"),
        (snapshot.Expect(min_tokens=64), "expected at least 64"),
        (snapshot.Expect(min_rate=2**53 - 1), "tokens a second"),
    ],
    ids=["text", "regex", "min-tokens", "min-rate"],
)
def test_an_answer_that_is_not_expected_is_bad(bench: Bench, expect: snapshot.Expect, said: str) -> None:
    report = bench.test(files.whole().encode(), expect=expect)
    assert report.verdict == "bad"
    assert said in report.reason


def test_a_file_that_is_no_model_is_bad(bench: Bench) -> None:
    report = bench.test(b"<html>not found</html>" * 100)
    assert report.verdict == "bad"
    assert report.reason.startswith("not a sound GGUF file")


def test_a_model_that_only_the_engine_can_refuse_is_bad(bench: Bench) -> None:
    report = bench.test(files.whole().with_key("general.architecture", files.STRING, "warbler").encode())
    assert report.verdict == "bad"
    assert report.reason


def test_a_model_that_is_not_there_is_bad(bench: Bench) -> None:
    assert bench.test(None).verdict == "bad"


# -- what one engine alone can tell -----------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Bench:
    needs_bubblewrap()
    return Bench("llama-cpp", tmp_path)


def test_the_same_tokens_come_each_time_and_are_golden(local: Bench) -> None:
    data = files.whole().encode()
    golden = local.test(data).token_ids
    assert len(golden) == 4
    assert local.test(data, expect=snapshot.Expect(tokens=golden)).verdict == "passed"
    other = local.test(files.whole(seed=77).encode(), expect=snapshot.Expect(tokens=golden))
    assert other.verdict == "bad"
    assert "expected" in other.reason


def test_a_long_job_gets_the_context_that_it_needs(local: Bench) -> None:
    sketch = files.whole().with_key("llama.context_length", files.UINT32, 4096)
    report = local.test(sketch.encode(), prompt="x" * 700, max_tokens=600, timeout="120s")
    assert (report.verdict, report.tokens) == ("passed", 600)


def test_a_job_past_the_models_context_is_refused_and_not_cut(local: Bench) -> None:
    report = local.test(files.whole().encode(), prompt="x" * 250, max_tokens=64)
    assert report.verdict == "bad"
    assert "its context holds 256" in report.reason


def test_the_other_parts_of_a_split_model_are_looked_at_too(local: Bench) -> None:
    sketch = files.whole().with_key("split.count", files.UINT32, 2).with_key("split.no", files.UINT32, 0)
    (local.folder / "tree").mkdir()
    (local.folder / "tree" / "model-00002-of-00002.gguf").write_bytes(b"GGUF, or not")
    report = local.test(sketch.encode())
    assert (report.verdict, report.reason[:49]) == ("bad", "model-00002-of-00002.gguf: not a sound GGUF file:")


# -- a server that is not what it should be ---------------------------------------------------------


def test_a_command_that_is_wrong_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_bubblewrap()
    for argv in (["/usr/bin/there-is-no-such-server"], [sys.executable, "-m", "llama_cpp.server", "--nothing-like-it"]):
        monkeypatch.setattr(f"{__name__}.SERVER", argv)
        report = Bench("openai", tmp_path).test(files.whole().encode())
        assert (report.verdict, report.reason[:21]) == ("unable", "server did not start:")


def test_a_server_without_a_network_of_its_own_is_tested_where_the_kernel_restricts_tcp(tmp_path: Path) -> None:
    working("landlock")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "model.gguf").write_bytes(files.whole().encode())
    text = f'[smoke]\nsandbox = "landlock"\n[runtime.openai]\nargv = {json.dumps(SERVER)}\n'
    tester = make_tester(tmp_path, text)
    smoke = snapshot.Smoke(max_tokens=4, timeout="60s")
    job = TestJob(model="m:v1", tree=tree, entrypoint="model.gguf", runtime=snapshot.Runtime(engine="openai"), smoke=smoke)
    report = tester.test(job)
    assert (report.verdict, report.reason, report.sandbox) == ("passed", "", "landlock")


def test_no_golden_tokens_are_expected_of_an_interface_that_tells_none(tmp_path: Path) -> None:
    needs_bubblewrap()
    report = Bench("openai", tmp_path).test(files.whole().encode(), expect=snapshot.Expect(tokens=(1, 2)))
    assert report.verdict == "bad"
    assert "token ids" in report.reason
