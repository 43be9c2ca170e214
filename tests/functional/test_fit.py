"""The estimate of a model's memory: compared with what llama.cpp allocates, shown before a download, and used where nothing is signed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from msgspec import structs

from reconciler.core import fit, gguf
from reconciler.core.fit import Job
from reconciler.core.model_shape import ModelShape
from reconciler.core.plan import ModelChange
from reconciler.report import terminal
from reconciler.runtime import llama_cpp_worker
from reconciler.runtime.result import CannotTest
from tests import engine_memory, gguf_shapes
from tests.gguf_shapes import Shape
from tests.node import Node, run, tiny

MIB = 1 << 20
#: As large as that a tenth is not the engine's rounding, and as small as that they are made and loaded in moments.
SHAPES = {
    "dense": (Shape(width=512, heads=8, heads_kv=8, feed_forward=1408, vocabulary=8000), Job()),
    "grouped heads, quantised": (Shape(width=512, layers=4, heads=8, heads_kv=2, vocabulary=8000, type="Q4_K"), Job()),
    "long context": (Shape(layers=4, heads=8, heads_kv=8, context=65_536, type="Q8_0"), Job(context=8192)),
    "quantised cache, flash attention": (
        Shape(width=512, layers=4, heads=4, heads_kv=4, context=65_536, type="Q8_0"),
        Job(context=16_384, key_type="Q8_0", value_type="Q8_0", flash=True),
    ),
    "quantised keys": (Shape(width=512, layers=4, heads=4, context=65_536, type="Q8_0"), Job(context=4096, key_type="Q8_0")),
    "tied output": (Shape(architecture="qwen2", width=512, heads=8, heads_kv=2, vocabulary=20_000, type="Q8_0", tied=True), Job()),
    "wide heads": (Shape(architecture="qwen3", width=256, heads=8, heads_kv=4, head_width=128, vocabulary=8000), Job(context=1024)),
    "experts": (Shape(width=512, heads=8, heads_kv=2, feed_forward=1024, vocabulary=8000, experts=8, type="Q4_K"), Job()),
    "many experts": (
        Shape(architecture="qwen3moe", width=512, heads=8, heads_kv=2, head_width=64, feed_forward=256, experts=32, experts_used=8), Job(),
    ),
    "sliding window": (
        Shape(architecture="gemma3", width=256, layers=6, heads=4, heads_kv=1, vocabulary=30_000, tied=True, sliding=512),
        Job(context=2048),
    ),
    "encoder": (Shape(architecture="bert", width=384, layers=4, heads=6, heads_kv=6, vocabulary=8000, context=512), Job()),
    "decoder that embeds": (Shape(architecture="qwen3", width=256, heads=4, vocabulary=8000, tied=True, pooling=3), Job()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_within_a_tenth_of_what_the_engine_allocates(name: str, tmp_path: Path) -> None:
    shape, job = SHAPES[name]
    path = gguf_shapes.write(shape, tmp_path / "model.gguf")
    facts = gguf.check(path)
    need = fit.estimate(facts.shape, job)
    measured = engine_memory.measure(path, job, embedding=facts.embedding)
    estimated = {"model": need.weights, "KV": need.cache, "compute": need.compute, "output": need.output}
    assert sum(estimated.values()) == pytest.approx(sum(measured.values()), rel=0.1), (estimated, measured)
    assert need.cache == pytest.approx(measured.get("KV", 0), rel=0.02)
    assert need.weights == pytest.approx(measured["model"], rel=0.02)


def facts_of(tmp_path: Path, shape: Shape) -> gguf.GgufFacts:
    return gguf.check(gguf_shapes.write(shape, tmp_path / "shape.gguf"))


def test_layers_go_to_the_gpu_from_the_last_and_take_their_cache_along(tmp_path: Path) -> None:
    found = facts_of(tmp_path, Shape(layers=4)).shape
    needs = [fit.estimate(found, Job(layers=layers)) for layers in range(6)]
    assert needs[0].gpu_bytes == 0
    assert needs[5] == fit.estimate(found, Job(layers=-1))
    assert needs[5].gpu_bytes - needs[4].gpu_bytes == found.layer_bytes[0] + needs[0].cache // 4
    assert all(a.memory_bytes > b.memory_bytes for a, b in itertools.pairwise(needs))


def test_a_tied_output_is_on_the_gpu_and_in_main_memory(tmp_path: Path) -> None:
    tied = facts_of(tmp_path, Shape(architecture="qwen2", vocabulary=8000, tied=True)).shape
    need, none = fit.estimate(tied, Job()), fit.estimate(tied, Job(layers=0))
    on_gpu = need.gpu_bytes - need.compute - need.cache - fit.OVERHEADS[-1].gpu_bytes
    assert on_gpu == sum(tied.layer_bytes) + tied.output_bytes + tied.input_bytes == none.weights


def test_an_older_or_unknown_engine_has_an_estimate_too(tmp_path: Path) -> None:
    shape = facts_of(tmp_path, Shape()).shape
    assert (
        fit.estimate(shape, Job(), "0.2.0")
        == fit.estimate(shape, Job(), "99")
        == fit.estimate(shape, Job(), "")
        == fit.estimate(shape, Job())
    )


def test_a_header_that_says_nothing_of_its_shape_costs_nothing_but_its_weights() -> None:
    need = fit.estimate(ModelShape(output_bytes=1000), Job())
    assert (need.weights, need.cache) == (1000, 0)


def test_a_test_job_for_which_the_gpu_has_no_room_now_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, Shape())
    smoke = {"prompt": "Hello", "max_tokens": 4, "task": "completion", "expect": {}}
    job = {"smoke": smoke, "options": {"gpu_layers": -1}, "record": False, "gpu": {"free": 100 * MIB, "total": 8192 * MIB}}
    with pytest.raises(CannotTest, match=r"the GPU is busy: it needs about 52\d\.\d MiB of 8\.0 GiB, and 100\.0 MiB are free"):
        llama_cpp_worker._check_fit(job, facts, "0.3.36")
    llama_cpp_worker._check_fit(job | {"gpu": {"free": 4096 * MIB, "total": 8192 * MIB}}, facts, "0.3.36")
    llama_cpp_worker._check_fit(job | {"options": {"gpu_layers": 0}}, facts, "0.3.36")
    llama_cpp_worker._check_fit(job | {"gpu": {"free": 0, "total": 0}}, facts, "0.3.36")


def test_snapshot_add_writes_the_estimate_for_the_test_job_with_what_is_loaded_beside(tmp_path: Path) -> None:
    file, beside, listed = tmp_path / "model.gguf", tmp_path / "draft.gguf", str(tmp_path / "list.json")
    file.write_bytes(tiny("a", width=64))
    beside.write_bytes(tiny("b"))
    assert run("snapshot", "new", listed, "--network", "testnet").code == 0
    both = [str(file), str(beside), "--entrypoint", "model.gguf", "--role", "draft.gguf=draft"]
    assert run("snapshot", "add", listed, "alone:v1", str(file)).code == 0
    assert run("snapshot", "add", listed, "both:v1", *both).code == 0
    models = {one["id"]: one["gpu_memory"] for one in run("snapshot", "inspect", listed, "--json").json["models"]}
    assert models["alone:v1"] == fit.estimate(gguf.check(file).shape, Job(context=256, batch=256)).gpu_bytes
    assert models["both:v1"] == models["alone:v1"] + beside.stat().st_size


@pytest.mark.parametrize(
    ("prompt", "tokens", "chat", "most", "context"),
    [
        (5, 16, False, 0, 512),
        (3000, 100, False, 32_768, 3328),
        (3000, 100, True, 32_768, 3840),
        (9999, 9, False, 0, 8192),
        (5, 16, False, 256, 256),
    ],
)
def test_the_tested_context_holds_the_job_and_is_never_more_than_the_model_has(
    prompt: int, tokens: int, chat: bool, most: int, context: int
) -> None:
    assert fit.context_of(prompt_bytes=prompt, tokens=tokens, chat=chat, most=most) == context


def test_a_plan_says_what_a_model_needs_of_the_gpu_memory_that_there_is(tmp_path: Path) -> None:
    change = ModelChange(id="a:v1", op="install", from_="absent", to="active", reason="not-installed: x", gpu_memory=int(6.1 * (1 << 30)))
    assert terminal.gpu_need(change, 8 << 30) == "needs 6.1 GiB of 8.0 GiB"
    assert terminal.gpu_need(structs.replace(change, gpu_memory=0), 8 << 30) == ""


def test_a_plan_for_a_described_node_shows_it_before_anything_is_fetched(node: Node, tmp_path: Path) -> None:
    node.publish(node.item("a:v1", tiny("a"), gpu_memory=6 << 30))
    (tmp_path / "gpu.toml").write_text(
        'schema = 1\nmemory = "64GiB"\n[engines]\nllama-cpp = "0.3.36"\n[[gpu]]\nname = "L4"\nmemory = "8GiB"\n'
    )
    ran = node.run("plan", "--node", str(tmp_path / "gpu.toml"))
    assert ran.code in {0, 2}, ran
    assert "6.0 GiB of 8.0 GiB" in ran.out
