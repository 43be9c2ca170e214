"""
Compares the estimate of a model's memory with what llama.cpp allocates for it on this machine's CPU: a table for benchmarks/RESULTS.md.

    python -m benchmarks.fit_table [FILE.gguf]...

The models are made here, with real headers and weights that are holes in a file, of sizes that are in use; FILEs are added to them. Every
part is the engine's own word (its log): weights, cache, compute buffer, results. It is kept from repacking weights for this processor, as a
GPU has no such thing. Ends with 1 where an estimate is off by more than a tenth.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from reconciler.core import fit, gguf
from tests import engine_memory, gguf_shapes
from tests.gguf_shapes import Shape

_MIB = 1 << 20
MOST_OFF = 0.10
Job = fit.Job
SHAPES: dict[str, tuple[Shape, Job]] = {
    "dense, F16, as many heads for keys": (
        Shape(width=1024, layers=8, heads=16, heads_kv=16, feed_forward=2816, vocabulary=32_000), Job()),
    "dense, Q4_K, grouped heads, large vocabulary": (
        Shape(width=2048, layers=16, heads=32, heads_kv=8, feed_forward=8192, vocabulary=128_256, type="Q4_K"), Job()),
    "dense, Q4_K, 8,192 tokens": (
        Shape(width=2048, layers=16, heads=32, heads_kv=8, feed_forward=5632, vocabulary=32_000, type="Q4_K", context=131_072),
        Job(context=8192)),
    "long context: 32,768 tokens": (
        Shape(width=1024, layers=8, heads=16, heads_kv=4, feed_forward=2816, vocabulary=32_000, type="Q8_0", context=131_072),
        Job(context=32_768)),
    "long context, cache in Q8_0, flash attention": (
        Shape(width=1024, layers=8, heads=16, heads_kv=4, feed_forward=2816, vocabulary=32_000, type="Q8_0", context=131_072),
        Job(context=32_768, key_type="Q8_0", value_type="Q8_0", flash=True)),
    "8,192 tokens, keys in Q8_0": (
        Shape(width=1024, layers=8, heads=16, heads_kv=4, feed_forward=2816, vocabulary=32_000, type="Q8_0", context=131_072),
        Job(context=8192, key_type="Q8_0")),
    "Qwen2, output tied": (
        Shape(architecture="qwen2", width=896, layers=24, heads=14, heads_kv=2, feed_forward=4864, vocabulary=151_936, type="Q8_0",
              tied=True), Job()),
    "Qwen3, wide heads, 2,048 tokens": (
        Shape(architecture="qwen3", width=1024, layers=12, heads=16, heads_kv=8, head_width=128, feed_forward=3072, vocabulary=151_936,
              type="Q8_0", tied=True), Job(context=2048)),
    "mixture of 8 experts, 2 used": (
        Shape(width=1024, layers=8, heads=16, heads_kv=4, feed_forward=3584, vocabulary=32_000, experts=8, type="Q4_K"), Job(context=1024)),
    "mixture of 64 experts, 8 used (Qwen3)": (
        Shape(architecture="qwen3moe", width=2048, layers=6, heads=32, heads_kv=4, head_width=128, feed_forward=768, vocabulary=151_936,
              experts=64, experts_used=8, type="Q4_K"), Job(context=1024)),
    "mixture of 16 experts, 8 used, small vocabulary": (
        Shape(width=512, layers=2, heads=8, heads_kv=8, feed_forward=2048, vocabulary=1000, experts=16, experts_used=8,
              type="Q8_0"), Job()),
    "Phi-3, 4,096 tokens": (
        Shape(architecture="phi3", width=1536, layers=8, heads=16, heads_kv=16, feed_forward=4096, vocabulary=32_064, type="Q8_0",
              context=4096, sliding=2047), Job(context=4096)),
    "Gemma 3, sliding window": (
        Shape(architecture="gemma3", width=1152, layers=12, heads=4, heads_kv=1, head_width=256, feed_forward=6912, vocabulary=262_144,
              type="Q8_0", tied=True, sliding=512), Job(context=1024)),
    "embedding (BERT), F16": (
        Shape(architecture="bert", width=768, layers=12, heads=12, heads_kv=12, feed_forward=3072, vocabulary=30_522, context=512), Job()),
    "embedding (BERT), small": (
        Shape(architecture="bert", width=384, layers=6, heads=12, heads_kv=12, feed_forward=1536, vocabulary=30_522, context=512), Job()),
    "embedding of a decoder (Qwen3), Q8_0": (
        Shape(architecture="qwen3", width=1024, layers=12, heads=16, heads_kv=8, head_width=128, feed_forward=3072, vocabulary=151_669,
              type="Q8_0", tied=True, pooling=3), Job()),
    "wide between the halves of a layer": (
        Shape(width=512, layers=2, heads=8, heads_kv=8, feed_forward=16_384, vocabulary=1000, type="Q8_0"), Job()),
}  # fmt: skip


def compare(path: Path, job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """Return the parts as estimated and as measured, by the same names."""
    shape = gguf.check(path).shape
    need = fit.estimate(shape, job)
    measured = engine_memory.measure(path, job, embedding=shape.embedding)
    parts = {"model": need.weights, "KV": need.cache, "compute": need.compute, "output": need.output}
    return parts, {name: measured.get(name, 0) for name in parts}


def main(arguments: list[str]) -> int:
    print("| model | weights | cache | compute | results | in all: estimated | measured | off |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        made = [(name, gguf_shapes.write(shape, Path(folder, f"{number}.gguf")), job)
                for number, (name, (shape, job)) in enumerate(SHAPES.items())]  # fmt: skip
        made += [(Path(file).name, Path(file), Job(context=2048)) for file in arguments]
        for name, path, job in made:
            estimated, measured = compare(path, job)
            off = sum(estimated.values()) / sum(measured.values()) - 1
            worst = max(worst, abs(off))
            parts = " | ".join(f"{estimated[part] / _MIB:,.1f} / {measured[part] / _MIB:,.1f}" for part in estimated)
            whole = " | ".join(f"{sum(sizes.values()) / _MIB:,.1f}" for sizes in (estimated, measured))
            print(f"| {name} | {parts} | {whole} | {100 * off:+.1f} % |", flush=True)
    print(f"\nestimated / measured, in MiB; the worst is off by {100 * worst:.1f} %")
    return int(worst > MOST_OFF)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
