"""GGUF files made by hand, byte by byte, so that any one of their fields can be a lie. The whole one loads and generates."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32 = 0
WIDTH, WIDE, VOCABULARY = 4, 8, 259

_CODES = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", UINT64: "<Q", BOOL: "<B"}

Key = tuple[str, int, Any]


def string(data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    if isinstance(content, bytes):
        return content  # as it stands: for lies
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        element, items = content
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, item) for item in items)
    return struct.pack(_CODES[kind], content)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int = F32
    data: bytes = b""
    #: Where it says that it begins; None: where it does.
    offset: int | None = None


@dataclass(frozen=True)
class Sketch:
    """What a file will say. None stands for the truth."""

    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    keys: tuple[Key, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    alignment: int = 32
    tail: bytes = b""

    def with_key(self, key: str, kind: int, content: Any) -> Sketch:
        """The same, with one more key, or another value of one."""
        kept = tuple(one for one in self.keys if one[0] != key)
        return replace(self, keys=(*kept, (key, kind, content)))

    def without_key(self, key: str) -> Sketch:
        return replace(self, keys=tuple(one for one in self.keys if one[0] != key))

    def with_tensor(self, which: str, /, **changes: Any) -> Sketch:
        return replace(self, tensors=tuple(replace(one, **changes) if one.name == which else one for one in self.tensors))

    def header(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        made = self.magic + struct.pack("<Iqq", self.version, tensors, keys)
        for key, kind, content in self.keys:
            made += string(key) + struct.pack("<I", kind) + value(kind, content)
        at = 0
        for tensor in self.tensors:
            made += string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}q", len(tensor.shape), *tensor.shape)
            made += struct.pack("<IQ", tensor.kind, at if tensor.offset is None else tensor.offset)
            at += len(self._padded(tensor.data))
        return made

    def encode(self) -> bytes:
        return self._padded(self.header()) + b"".join(self._padded(tensor.data) for tensor in self.tensors) + self.tail

    def _padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)


def floats(count: int, seed: int) -> bytes:
    """Small weights that differ from each other and from file to file, the same each time."""
    made, state = [], seed * 2654435761 % 2**32 or 1
    for _ in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        made.append((state >> 16) / 65536 - 0.5)
    return struct.pack(f"<{count}f", *made)


def tensor(name: str, *shape: int, seed: int = 1, data: bytes | None = None) -> Tensor:
    count = 1
    for side in shape:
        count *= side
    return Tensor(name, shape, F32, floats(count, seed) if data is None else data)


def whole(*, template: str | None = None, pooling: int | None = None, seed: int = 1) -> Sketch:
    """The smallest llama that loads and generates: one layer, 256 byte tokens and three special ones."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{octet:02X}>" for octet in range(256))]
    keys: list[Key] = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "tiny"),
        ("llama.context_length", UINT32, 256),
        ("llama.embedding_length", UINT32, WIDTH),
        ("llama.block_count", UINT32, 1),
        ("llama.feed_forward_length", UINT32, WIDE),
        ("llama.attention.head_count", UINT32, 1),
        ("llama.attention.head_count_kv", UINT32, 1),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        ("llama.rope.dimension_count", UINT32, WIDTH),
        ("llama.vocab_size", UINT32, VOCABULARY),
        ("general.file_type", UINT32, 0),
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.scores", ARRAY, (FLOAT32, [0.0] * VOCABULARY)),
        ("tokenizer.ggml.token_type", ARRAY, (INT32, [2, 3, 3] + [6] * 256)),
        ("tokenizer.ggml.bos_token_id", UINT32, 1),
        ("tokenizer.ggml.eos_token_id", UINT32, 2),
        ("tokenizer.ggml.unknown_token_id", UINT32, 0),
    ]
    if template is not None:
        keys.append(("tokenizer.chat_template", STRING, template))
    if pooling is not None:
        keys.append(("llama.pooling_type", UINT32, pooling))
    ones = struct.pack(f"<{WIDTH}f", *[1.0] * WIDTH)
    tensors = (
        tensor("token_embd.weight", WIDTH, VOCABULARY, seed=seed),
        tensor("blk.0.attn_norm.weight", WIDTH, data=ones),
        *(tensor(f"blk.0.attn_{part}.weight", WIDTH, WIDTH, seed=seed + index) for index, part in enumerate(("q", "k", "v", "output"), 2)),
        tensor("blk.0.ffn_norm.weight", WIDTH, data=ones),
        tensor("blk.0.ffn_gate.weight", WIDTH, WIDE, seed=seed + 6),
        tensor("blk.0.ffn_up.weight", WIDTH, WIDE, seed=seed + 7),
        tensor("blk.0.ffn_down.weight", WIDE, WIDTH, seed=seed + 8),
        tensor("output_norm.weight", WIDTH, data=ones),
        tensor("output.weight", WIDTH, VOCABULARY, seed=seed + 9),
    )
    return Sketch(keys=tuple(keys), tensors=tensors)


#: A name for each lie, what makes it of a sound file, and a part of the sentence that must name it.
Lie = tuple[str, Callable[[], bytes], str]


def lies() -> Iterator[Lie]:
    """Every way in which a header can be plainly wrong."""
    sound = whole()
    far = 2**40

    def made(sketch: Sketch) -> Callable[[], bytes]:
        return sketch.encode

    yield "empty", lambda: b"", "an empty file"
    yield "magic-only", lambda: b"GGUF", "the version"
    yield "zeros", lambda: bytes(4096), "zero bytes"
    yield "a web page", lambda: b"<!DOCTYPE html><title>404</title>" * 20, 'a web page ("404")'
    yield "bad-magic", made(replace(sound, magic=b"GGML")), "the magic"
    yield "big-endian", made(replace(sound, version=3 << 24)), "a big-endian GGUF file (version 3)"
    yield "version-1", made(replace(sound, version=1)), "version 1"
    yield "version-99", made(replace(sound, version=99)), "version 99"
    for count in (-1, 2**40, 2**63 - 1):
        yield f"tensors-{count}", made(replace(sound, tensor_count=count)), "tensors"
        yield f"keys-{count}", made(replace(sound, key_count=count)), "keys"
    yield "one-tensor-too-many", made(replace(sound, tensor_count=len(sound.tensors) + 1)), "tensor 12"
    yield "one-key-too-many", made(replace(sound, key_count=len(sound.keys) + 1)), ""
    yield "one-key-too-few", made(replace(sound, key_count=len(sound.keys) - 1)), ""
    for length in (2**63, 2**64 - 1, far, 2**31):
        lie = struct.pack("<Q", length)
        yield f"string-{length}", made(sound.with_key("general.name", STRING, lie)), "'general.name'"
        yield f"strings-{length}", made(sound.with_key("x.list", ARRAY, struct.pack("<IQ", STRING, length))), "'x.list'"
        yield f"numbers-{length}", made(sound.with_key("x.list", ARRAY, struct.pack("<IQ", UINT64, length))), "'x.list'"
        yield f"string-in-list-{length}", made(sound.with_key("x.list", ARRAY, struct.pack("<IQQ", STRING, 1, length))), "'x.list'"
    yield "list-of-lists", made(sound.with_key("x.list", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))), "'x.list'"
    yield "list-of-nothing-known", made(sound.with_key("x.list", ARRAY, struct.pack("<IQ", 77, 1))), "type 77"
    yield "key-of-nothing-known", made(sound.with_key("x.key", 77, b"")), "type 77"
    yield "neither-true-nor-false", made(sound.with_key("x.bool", BOOL, b"\x07")), "neither true nor false"
    yield "key-twice", made(replace(sound, keys=(*sound.keys, sound.keys[1]))), "'general.name' is there twice"
    yield "key-without-name", made(replace(sound, keys=(("", UINT32, 1), *sound.keys))), "no name"
    yield "key-name-too-long", made(replace(sound, keys=(("k" * 5000, UINT32, 1), *sound.keys))), "5,000 bytes"
    for alignment in (0, 3, 33, 2**31):
        yield f"alignment-{alignment}", made(sound.with_key("general.alignment", UINT32, alignment)), "general.alignment"
    yield "alignment-of-another-type", made(sound.with_key("general.alignment", STRING, "32")), "general.alignment"
    yield "no-architecture", made(sound.without_key("general.architecture")), "general.architecture"
    yield "architecture-is-a-number", made(sound.with_key("general.architecture", UINT32, 7)), "general.architecture"
    yield "architecture-is-a-path", made(sound.with_key("general.architecture", STRING, "../../etc")), "general.architecture"
    for blocks in (2, 13, 600, 2**31 - 1, 2**32 - 1):
        if blocks > 12:
            yield f"block-count-{blocks}", made(sound.with_key("llama.block_count", UINT32, blocks)), "llama.block_count"
    yield "block-count-is-text", made(sound.with_key("llama.block_count", STRING, "1")), "llama.block_count"
    yield "block-beyond-the-count", made(sound.with_tensor("blk.0.ffn_up.weight", name="blk.7.ffn_up.weight")), "layer 7"
    for context in (2**27, 2**31 - 1, 2**32 - 1):
        yield f"context-{context}", made(sound.with_key("llama.context_length", UINT32, context)), "context_length"
    yield "scores-too-short", made(sound.with_key("tokenizer.ggml.scores", ARRAY, (FLOAT32, [0.0]))), "tokenizer.ggml.scores"
    yield "scores-of-bytes", made(sound.with_key("tokenizer.ggml.scores", ARRAY, (BOOL, [0] * VOCABULARY))), "tokenizer.ggml.scores"
    yield "types-too-short", made(sound.with_key("tokenizer.ggml.token_type", ARRAY, (INT32, [1]))), "token_type"
    yield "tokens-are-numbers", made(sound.with_key("tokenizer.ggml.tokens", ARRAY, (UINT32, [1, 2]))), "tokenizer.ggml.tokens"
    yield "tokens-missing", made(sound.without_key("tokenizer.ggml.tokens")), "0 tokens"
    name = "blk.0.attn_q.weight"
    yield "overlapping-tensors", made(sound.with_tensor(name, offset=0)), "overlaps"
    yield "tensor-past-the-end", made(sound.with_tensor("output.weight", offset=2**20)), "'output.weight' reaches to byte"
    yield "tensor-far-past-the-end", made(sound.with_tensor("output.weight", offset=2**63)), "'output.weight' reaches to byte"
    yield "offset-wraps", made(sound.with_tensor("output.weight", offset=2**64 - 32)), "'output.weight' reaches to byte"
    yield "offset-unaligned", made(sound.with_tensor("output.weight", offset=33)), "not a multiple of 32"
    yield "tensor-of-no-dimension", made(sound.with_tensor(name, shape=())), "0 dimensions"
    yield "tensor-of-five-dimensions", made(sound.with_tensor(name, shape=(1, 1, 1, 1, 1))), "5 dimensions"
    yield "tensor-of-nothing", made(sound.with_tensor(name, shape=(0, 4))), "the dimensions"
    yield "tensor-of-less-than-nothing", made(sound.with_tensor(name, shape=(-4, -4))), "the dimensions"
    yield "tensor-of-everything", made(sound.with_tensor("output.weight", shape=(2**62, 2**62))), "reaches to byte"
    yield "tensor-of-no-type", made(sound.with_tensor(name, kind=2**31)), "does not exist"
    yield "tensor-packed-wrongly", made(sound.with_tensor(name, kind=2)), "packs by 32"
    yield "tensor-twice", made(sound.with_tensor(name, name="blk.0.attn_k.weight")), "is there twice"
    yield "tensor-name-too-long", made(sound.with_tensor(name, name="t" * 4096)), "tensor 2"


def truncations() -> Iterator[tuple[int, bytes]]:
    """The sound file, cut at every 64 bytes of its header and some times in its weights."""
    data, header = whole().encode(), len(whole().header())
    for length in [*range(0, header + 64, 64), (header + len(data)) // 2, len(data) - 64]:
        yield length, data[:length]
