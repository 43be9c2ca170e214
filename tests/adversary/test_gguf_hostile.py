"""Hostile model files, each through a real test job in a real sandbox: failed, with a reason, and nothing outside touched."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reconciler.core import snapshot
from reconciler.ports import TestJob, TestReport
from reconciler.runtime.smoke_test import SandboxedTester
from reconciler.sandbox import choose
from tests import gguf_files as files
from tests.demand import working
from tests.jobs import make_tester

Make = Callable[[], bytes]
RUNTIME = snapshot.Runtime(engine="llama-cpp")


@pytest.fixture(scope="module")
def tester(tmp_path_factory: pytest.TempPathFactory) -> SandboxedTester:
    if not choose.probe("bubblewrap").works:
        working("landlock")
    folder = tmp_path_factory.mktemp("tester")
    return make_tester(folder)


def ran(tester: SandboxedTester, folder: Path, data: bytes, smoke: snapshot.Smoke | None = None) -> TestReport:
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "model.gguf").write_bytes(data)
    smoke = smoke or snapshot.Smoke(max_tokens=4, timeout="60s")
    report = tester.test(TestJob(model="m:v1", tree=tree, entrypoint="model.gguf", runtime=RUNTIME, smoke=smoke))
    assert (tree / "model.gguf").read_bytes() == data
    assert [path.name for path in tree.iterdir()] == ["model.gguf"]
    return report


def test_the_sound_file_passes_or_every_refusal_below_says_nothing(tester: SandboxedTester, tmp_path: Path) -> None:
    report = ran(tester, tmp_path, files.whole().encode())
    assert (report.verdict, report.reason, report.tokens) == ("passed", "", 4)


PLAIN = {
    "empty", "magic-only", "bad-magic", "tensors--1", "keys--1", f"tensors-{2**40}", f"keys-{2**40}", f"string-{2**63}",
    f"strings-{2**63}", "alignment-0", "overlapping-tensors", "tensor-past-the-end", "offset-wraps", "block-count-600",
    f"context-{2**31 - 1}", "scores-too-short", "tensor-of-everything", "key-twice",
}  # fmt: skip


LIES = {name: make for name, make, _ in files.lies() if name in PLAIN}


@pytest.mark.parametrize("make", LIES.values(), ids=LIES)
def test_a_plain_lie_fails_before_the_engine_sees_it(tester: SandboxedTester, tmp_path: Path, make: Make) -> None:
    report = ran(tester, tmp_path, make())
    assert report.verdict == "bad"
    assert report.reason.startswith("not a sound GGUF file: ")


def test_a_file_cut_short_fails(tester: SandboxedTester, tmp_path: Path) -> None:
    for length, data in list(files.truncations())[::12]:
        report = ran(tester, tmp_path, data)
        assert (length, report.verdict) == (length, "bad")
        assert re.search("offset|reaches to byte|an empty file", report.reason)


def _with(key: str, number: int) -> Make:
    return files.whole().with_key(key, files.UINT32, number).encode


def _nan_weights() -> bytes:
    return files.whole().with_tensor("output.weight", data=struct.pack("<f", float("nan")) * files.WIDTH * files.VOCABULARY).encode()


def subtle() -> Iterator[tuple[str, Make]]:
    """What a header check cannot see, and an engine must choke on."""
    yield "layer-without-tensors", _with("llama.block_count", 2)
    yield "no-heads", _with("llama.attention.head_count", 0)
    yield "more-heads-than-width", _with("llama.attention.head_count", 2**31 - 1)
    yield "no-width", _with("llama.embedding_length", 0)
    yield "wide-feed-forward", _with("llama.feed_forward_length", 2**31 - 1)
    yield "wide-embedding", _with("llama.embedding_length", 2**31 - 1)
    yield "unknown-architecture", files.whole().with_key("general.architecture", files.STRING, "warbler").encode
    yield "unknown-tokenizer", files.whole().with_key("tokenizer.ggml.model", files.STRING, "warbler").encode
    yield "tensor-of-another-shape", files.whole().with_tensor("output.weight", shape=(files.VOCABULARY, files.WIDTH)).encode
    yield "tensor-of-a-type-of-tomorrow", files.whole().with_tensor("blk.0.attn_q.weight", kind=99).encode
    yield "nan-weights", _nan_weights


SUBTLE = tuple(subtle())


@pytest.mark.parametrize("make", [make for _, make in SUBTLE], ids=[name for name, _ in SUBTLE])
def test_what_only_an_engine_can_see_fails_too_and_we_live(tester: SandboxedTester, tmp_path: Path, make: Make) -> None:
    report = ran(tester, tmp_path, make())
    assert report.verdict == "bad"
    assert report.reason


# -- templates: code from a stranger -----------------------------------------------------------------

_REACH = """{% for c in ''.__class__.__mro__[-1].__subclasses__() %}{{ c.__init__.__globals__['__builtins__']['open']('@', 'w') }}
{% endfor %}"""

TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "eats-memory": "{{ 'a' * 100000000000 }}",
    "grows": "{% set ns = namespace(s='a') %}{% for a in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "computes": "{{ 9 ** (9 ** 9) }}",
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "opens-a-file": _REACH,
    "opens-a-file-through-a-cycler": "{{ cycler.__init__.__globals__.os.open('@', 65) }}",
    "is-no-template": "{% for %}{{ {{",
    "includes": "{% include '/etc/passwd' %}",
    "says-nothing": "",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_template_fails_and_touches_nothing(tester: SandboxedTester, tmp_path: Path, template: str) -> None:
    canary = tmp_path / "canary"
    smoke = snapshot.Smoke(task="chat", max_tokens=4, timeout="3s")
    report = ran(tester, tmp_path, files.whole(template=template.replace("@", str(canary))).encode(), smoke)
    assert report.verdict == "bad"
    assert report.reason
    assert not canary.exists()


def test_a_template_in_a_model_that_does_not_chat_is_not_rendered(tester: SandboxedTester, tmp_path: Path) -> None:
    report = ran(tester, tmp_path, files.whole(template=TEMPLATES["loops"]).encode(), snapshot.Smoke(max_tokens=2, timeout="30s"))
    assert report.verdict == "passed"


def test_an_expected_expression_that_backtracks_for_ever_ends(tester: SandboxedTester, tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}"
    smoke = snapshot.Smoke(task="chat", max_tokens=32, timeout="3s", expect=snapshot.Expect(regex=r"(?s)^(.|.)*(.|.)*(.|.)*\x00\x00never$"))
    report = ran(tester, tmp_path, files.whole(template=template).encode(), smoke)
    assert report.verdict == "bad"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'46' * 32}\nsize 4368438944\n".encode(),
            "a git LFS pointer to sha256:4646",
        ),
        (b"<!doctype html><title>Sign in</title>", 'a web page ("Sign in")'),
        (b"PK\x03\x04" + bytes(40), "a zip archive; if the model is inside, its publisher adds it with --unpack zip"),
        (b"GGUF\x00\x00\x00\x03" + bytes(64), "a big-endian GGUF file (version 3)"),
    ],
)
def test_the_reason_of_a_failed_model_names_what_stands_in_its_place(
    tester: SandboxedTester, tmp_path: Path, data: bytes, said: str
) -> None:
    report = ran(tester, tmp_path, data)
    assert report.verdict == "bad"
    assert report.reason.startswith("not a sound GGUF file: it is ")
    assert said in report.reason
