"""
How much memory a model takes when it is loaded, estimated from its GGUF header alone, before anything of it is fetched or loaded.

Four parts: the weights, by the layers that are on the GPU; the cache of keys and values, for the context; the buffer in which a batch is
computed; and what the engine takes for itself. The first two follow from the header. The third is what ggml's allocator comes to, and is
the largest of the moments at which most is alive at once:

    logits        a batch's, over the vocabulary, and two states of it
    attention     the products of a batch's queries with all keys, one for each head, the mask, and five states, keys and values
    feed-forward  three times the width between the halves of a layer, for each expert that is used, the mask and five states

With flash attention the products are never whole, and the mask is half as large. ``OVERHEADS`` has what was measured, for each version
of the engine, and where its figures come from; ``benchmarks/fit_table.py`` compares the estimate with what ggml allocates.

Rules that hold here:

1. The same header and the same settings give the same estimate, on every machine. Sizes are bytes.
2. The test job's own settings decide (``runtime.llama_cpp_worker``): its context, batches of at most 512 tokens, no flash attention, and
   a whole cache for layers with a sliding window.
3. Layers go to the GPU from the last to the first, as llama.cpp has it; the embedding of tokens stays in main memory.
"""

from __future__ import annotations

from msgspec import Struct

from reconciler.core.model_shape import ModelShape

#: Bytes of a component of the cache, as a fraction: those of a block by its components.
CACHE_TYPES: dict[str, tuple[int, int]] = {
    "F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "Q8_0": (34, 32), "Q5_1": (24, 32), "Q5_0": (22, 32), "Q4_1": (20, 32), "Q4_0": (18, 32),
}  # fmt: skip
_BATCH = 512
#: Tokens of context that a test job gets, and what is added for a chat template.
_LEAST_CONTEXT, _MOST_CONTEXT = 512, 8192
_SPECIAL_TOKENS, _TEMPLATE_TOKENS = 64, 512
_FLOAT = 4
#: The cache is made in steps of so many tokens (llama.cpp, GGML_PAD in llama_context).
_CACHE_STEP = 256
#: Texts that the binding prepares an embedding model for at once (llama_cpp.Llama), each with a row of its own in the output.
_EMBEDDING_TEXTS = 256


class Overhead(Struct, frozen=True, kw_only=True):
    """What one version of an engine takes beside the model, and how many states of a batch live at once."""

    version: str  #: The first version for which this holds.
    logit_states: int  #: Besides the logits.
    layer_states: int  #: Within a layer.
    wide_states: int  #: Between the halves of a layer.
    gpu_bytes: int  #: The driver's context and the engine's own buffers on one GPU.
    process_bytes: int  #: The process without a model.
    source: str  #: Where the figures come from.


OVERHEADS: tuple[Overhead, ...] = (
    Overhead(
        version="0.3.16",
        logit_states=2,
        layer_states=5,
        wide_states=3,
        gpu_bytes=512 << 20,
        process_bytes=160 << 20,
        source="llama-cpp-python 0.3.36, buffers as its log has them, on a CPU (benchmarks/RESULTS.md); gpu_bytes: not measured here",
    ),
)


class Job(Struct, frozen=True, kw_only=True):
    """How a model is loaded."""

    context: int = 512  #: Tokens.
    batch: int = _BATCH  #: Tokens that are computed at once; an embedding model takes the whole context.
    layers: int = -1  #: Layers on the GPU, the output among them; -1: all; 0: none.
    key_type: str = "F16"  #: Of the cache.
    value_type: str = "F16"
    flash: bool = False  #: Whether attention is computed in pieces.


class Need(Struct, frozen=True, kw_only=True):
    """What a model takes: bytes on the GPU and in main memory, and of which parts they are."""

    gpu_bytes: int
    memory_bytes: int
    weights: int  #: All of them, wherever they are.
    cache: int
    compute: int
    output: int  #: Of the results that are handed out.


def context_of(*, prompt_bytes: int, tokens: int, chat: bool, most: int) -> int:
    """
    Return the tokens of context that a test job with such a prompt gets; *tokens* may be generated, the model itself has at most *most*.

    No tokenizer makes more tokens than bytes, beside a few special ones.
    """
    wanted = prompt_bytes + tokens + _SPECIAL_TOKENS + (_TEMPLATE_TOKENS if chat else 0)
    given = min(max(_LEAST_CONTEXT, -(-wanted // _CACHE_STEP) * _CACHE_STEP), _MOST_CONTEXT)
    return min(given, most) if most else given


def estimate(shape: ModelShape, job: Job, version: str = "") -> Need:
    """Return what a model of *shape* takes, loaded as *job* says, by an engine of *version*; an unknown version counts as the newest."""
    overhead = _overhead(version)
    blocks = len(shape.layer_bytes)
    above = blocks + 1 if job.layers < 0 else min(job.layers, blocks + 1)  # the output counts as one
    first = blocks + 1 - above  # on the GPU
    on_output = (shape.output_bytes + (shape.input_bytes if shape.tied else 0)) if above else 0
    gpu_weights = sum(shape.layer_bytes[first:]) + on_output
    weights = sum(shape.layer_bytes) + shape.input_bytes + shape.output_bytes
    caches = [_cache(shape, layer, job) for layer in range(blocks)]
    compute, output = _compute(shape, job, overhead), _output(shape)
    gpu = (gpu_weights + sum(caches[first:]) + compute + overhead.gpu_bytes) if above else 0
    left = weights - sum(shape.layer_bytes[first:]) - (shape.output_bytes if above else 0) + sum(caches[:first])
    memory = left + output + overhead.process_bytes + (compute if first or not above else _inputs(shape, job))
    return Need(gpu_bytes=gpu, memory_bytes=memory, weights=weights, cache=sum(caches), compute=compute, output=output)


def _overhead(version: str) -> Overhead:
    parts = _numbers(version)
    older = [one for one in OVERHEADS if not parts or _numbers(one.version) <= parts]
    return (older or OVERHEADS[:1])[-1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def _cache(shape: ModelShape, layer: int, job: Job) -> int:
    if shape.encoder:
        return 0
    tokens = -(-job.context // _CACHE_STEP) * _CACHE_STEP
    sizes = ((shape.keys, job.key_type), (shape.values, job.value_type))
    return sum(
        tokens * (widths[layer] if layer < len(widths) else 0) * CACHE_TYPES[kind][0] // CACHE_TYPES[kind][1] for widths, kind in sizes
    )


def _compute(shape: ModelShape, job: Job, overhead: Overhead) -> int:
    """Return the bytes of the buffer in which a batch is computed: the moment at which most of it is alive."""
    batch = min(job.batch, job.context)
    state = batch * shape.width * _FLOAT
    seen = batch if shape.encoder else -(-job.context // _CACHE_STEP) * _CACHE_STEP
    mask = batch * seen * (2 if job.flash else _FLOAT)
    own = batch * (max(shape.keys, default=0) + max(shape.values, default=0)) * _FLOAT
    products = 0 if job.flash else batch * seen * shape.heads * _FLOAT
    logits = 0 if shape.encoder else batch * shape.vocabulary * _FLOAT + overhead.logit_states * state
    attention = products + mask + overhead.layer_states * state + own
    wide = overhead.wide_states * batch * shape.feed_forward * shape.experts_used * _FLOAT + mask + overhead.layer_states * state
    return max(logits, attention, wide)


def _output(shape: ModelShape) -> int:
    """Return the bytes of the results: a row of logits, or of an embedding too, for each text."""
    rows = _EMBEDDING_TEXTS if shape.embedding else 1
    return rows * (shape.vocabulary + (shape.width if shape.embedding else 0)) * _FLOAT


def _inputs(shape: ModelShape, job: Job) -> int:
    """Return the bytes of what is handed to a GPU for each batch: the states of its tokens, and the mask."""
    batch = min(job.batch, job.context)
    return batch * shape.width * _FLOAT + batch * job.context * _FLOAT
