"""
GGUF models of any shape: real headers, and weights that are all zero in a file with a hole, or random ones that follow from a seed.

llama.cpp loads them and makes its buffers. Nothing of zero weights is written or read, so a model of a gigabyte takes no space and no time;
what it would answer means nothing. Random weights give a model that generates, the same on every machine, since numpy keeps the stream of
a bit generator the same (NEP 19).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

#: Elements and bytes of a block, with the name that the package gguf has for it.
_TYPES = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_K": (256, 144), "Q6_K": (256, 210)}
Architecture = Literal["llama", "qwen2", "qwen3", "qwen3moe", "bert", "phi3", "gemma3"]


#: A tensor: its name, its dimensions with rows first, and its type.
Listed = tuple[str, tuple[int, ...], str]


class Shape(Struct, frozen=True, kw_only=True):
    """What a model is made of."""

    architecture: Architecture = "llama"
    width: int = 256
    layers: int = 2
    heads: int = 4
    heads_kv: int = 4
    head_width: int = 0  #: 0: width by heads.
    feed_forward: int = 512
    vocabulary: int = 1024
    context: int = 2048
    experts: int = 0
    experts_used: int = 2
    type: str = "F16"
    tied: bool = False  #: The output layer is the embedding's.
    sliding: int = 0  #: Tokens of a sliding window.
    pooling: int = 0  #: How one vector is made of a text's (gguf.PoolingType); 0: none is.

    @property
    def key_width(self) -> int:
        """Components of one head's key."""
        return self.head_width or self.width // self.heads


def write(shape: Shape, path: Path, seed: int | None = None) -> Path:
    """Write the model of *shape* to *path*, and return it; with a *seed*, its weights (F16 and F32 only) are random, and norms one."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, shape.architecture)
    _describe(writer, gguf, shape)
    _tokens(writer, gguf, shape)
    for name, dimensions, kind in _tensors(shape):
        elements, size = _TYPES[kind]
        raw = getattr(gguf.GGMLQuantizationType, kind)
        count = int(np.prod(dimensions))
        stored = (*dimensions[:-1], dimensions[-1] // elements * size) if elements > 1 else dimensions
        dtype = np.dtype(np.uint8 if elements > 1 else np.float32 if kind == "F32" else np.float16)
        writer.add_tensor_info(name, stored, dtype, count // elements * size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = [-(-info.nbytes // 32) * 32 for tensors in writer.tensors for info in tensors.values()]
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + sum(sizes))
        if seed is not None:
            file.seek(start)
            stream = np.random.Generator(np.random.PCG64(seed))
            for (name, dimensions, kind), size in zip(_tensors(shape), sizes, strict=True):
                file.write(_weights(stream, name, dimensions, kind).ljust(size, b"\0"))
    return path


def _weights(stream: Any, name: str, dimensions: tuple[int, ...], kind: str) -> bytes:
    """Return the bytes of a tensor: a norm's are one, others small numbers that half precision holds exactly."""
    import numpy as np

    count = int(np.prod(dimensions))
    if name.endswith("norm.weight"):
        return np.ones(count, dtype=np.float32).tobytes()
    numbers = np.frombuffer(stream.bytes(count), dtype=np.int8).astype(np.float32) / np.float32(512)
    return bytes(numbers.astype(np.float16 if kind == "F16" else np.float32).tobytes())


def _describe(writer: Any, gguf: Any, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    if shape.architecture == "bert":
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        return
    writer.add_head_count_kv(shape.heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.key_width)
    if shape.head_width:
        writer.add_key_length(shape.head_width)
        writer.add_value_length(shape.head_width)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    if shape.pooling:
        writer.add_pooling_type(gguf.PoolingType(shape.pooling))
    if shape.sliding:
        writer.add_sliding_window(shape.sliding)


def _tokens(writer: Any, gguf: Any, shape: Shape) -> None:
    kinds = gguf.TokenType
    if shape.architecture == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*special, *(f"\u2581w{number}" for number in range(shape.vocabulary - len(special)))]
        writer.add_tokenizer_model("bert")
        writer.add_token_type_count(2)
        writer.add_bos_token_id(2)
        writer.add_sep_token_id(3)
        writer.add_pad_token_id(0)
        writer.add_mask_token_id(4)
    else:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{octet:02X}>" for octet in range(256))]
        words += [f"w{number}" for number in range(shape.vocabulary - len(words))]
        writer.add_tokenizer_model("llama")
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_token_scores([0.0] * shape.vocabulary)
    bytes_ = range(3, 259) if shape.architecture != "bert" else range(0)
    writer.add_token_list(words)
    writer.add_token_types([kinds.BYTE if index in bytes_ else kinds.CONTROL if index < 3 else kinds.NORMAL for index in range(len(words))])


def _tensors(shape: Shape) -> list[Listed]:
    """Return every tensor with its dimensions, rows first, and its type."""
    if shape.architecture == "bert":
        return _bert(shape)
    kind, width = shape.type, shape.width
    query, value = shape.heads * shape.key_width, shape.heads_kv * shape.key_width
    made: list[Listed] = [("token_embd.weight", (shape.vocabulary, width), kind)]
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        made += [(f"{block}.attn_norm.weight", (width,), "F32"), (f"{block}.ffn_norm.weight", (width,), "F32")]
        if shape.architecture == "phi3":
            made += [(f"{block}.attn_qkv.weight", (query + 2 * value, width), kind)]
        else:
            made += [(f"{block}.attn_q.weight", (query, width), kind), (f"{block}.attn_k.weight", (value, width), kind)]
            made += [(f"{block}.attn_v.weight", (value, width), kind)]
        made += [(f"{block}.attn_output.weight", (width, query), kind)]
        if shape.architecture == "qwen2":
            made += [(f"{block}.attn_{part}.bias", (rows,), "F32") for part, rows in (("q", query), ("k", value), ("v", value))]
        if shape.architecture in {"qwen3", "qwen3moe", "gemma3"}:
            made += [(f"{block}.attn_{part}_norm.weight", (shape.key_width,), "F32") for part in ("q", "k")]
        if shape.architecture == "gemma3":
            made += [(f"{block}.post_{part}_norm.weight", (width,), "F32") for part in ("attention", "ffw")]
        made += _feed_forward(shape, block)
    made += [("output_norm.weight", (width,), "F32")]
    return made if shape.tied else [*made, ("output.weight", (shape.vocabulary, width), kind)]


def _feed_forward(shape: Shape, block: str) -> list[Listed]:
    width, wide, kind = shape.width, shape.feed_forward, shape.type
    if shape.experts:
        several: list[Listed] = [(f"{block}.ffn_gate_inp.weight", (shape.experts, width), "F32")]
        several += [(f"{block}.ffn_{part}_exps.weight", (shape.experts, wide, width), kind) for part in ("gate", "up")]
        return [*several, (f"{block}.ffn_down_exps.weight", (shape.experts, width, wide), kind)]
    down: Listed = (f"{block}.ffn_down.weight", (width, wide), kind)
    if shape.architecture == "phi3":
        return [(f"{block}.ffn_up.weight", (2 * wide, width), kind), down]
    return [*((f"{block}.ffn_{part}.weight", (wide, width), kind) for part in ("gate", "up")), down]


def _bert(shape: Shape) -> list[Listed]:
    kind, width, wide = shape.type, shape.width, shape.feed_forward
    made: list[Listed] = [("token_embd.weight", (shape.vocabulary, width), kind), ("position_embd.weight", (shape.context, width), "F32")]
    made += [("token_types.weight", (2, width), "F32")]
    made += [(f"token_embd_norm.{part}", (width,), "F32") for part in ("weight", "bias")]
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            made += [(f"{block}.{part}.weight", (width, width), kind), (f"{block}.{part}.bias", (width,), "F32")]
        made += [(f"{block}.ffn_up.weight", (wide, width), kind), (f"{block}.ffn_up.bias", (wide,), "F32")]
        made += [(f"{block}.ffn_down.weight", (width, wide), kind), (f"{block}.ffn_down.bias", (width,), "F32")]
        norms = [f"{block}.{norm}_norm" for norm in ("attn_output", "layer_output")]
        made += [(f"{norm}.{part}", (width,), "F32") for norm in norms for part in ("weight", "bias")]
    return made
