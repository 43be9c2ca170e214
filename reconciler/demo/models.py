"""
Tiny real models: GGUF files that llama.cpp loads and that generate, in tens of kilobytes.

Their weights come from a hash-counter stream, so that the same name gives the same bytes on every machine; the committed lock of the
demo network holds their digests. They know nothing and say so at length: what they show is the machinery.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from reconciler.core.errors import RuntimeMissing

_BYTES = 256
#: Unknown, begin, end, then one token for each byte.
_VOCABULARY = 3 + _BYTES
_FEED_FORWARD = 2
_CONTEXT = 256

CHAT_TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant] "


class Shape(Struct, frozen=True, kw_only=True):
    """What kind of model to make, and how large."""

    seed: str
    kind: Literal["completion", "chat", "embedding"] = "completion"
    width: int = 32
    layers: int = 1
    heads: int = 2
    #: What its last matrix is multiplied with, a power of two: the more, the further first choices lead.
    sharpness: int = 1


def write(shape: Shape, path: Path) -> None:
    """
    Write the model of *shape* to *path*.

    Raises:
        RuntimeMissing: the package ``gguf`` is not installed.
    """
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape)
    _add_tokenizer(writer, gguf)
    for name, dimensions in _tensors(shape):
        made = _ones(dimensions) if name.endswith("norm.weight") else _weights(f"{shape.seed}/{name}", dimensions)
        writer.add_tensor(name, made * made.dtype.type(shape.sharpness) if name == "output.weight" else made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        message = "the package gguf, which writes the demo's models, is not installed"
        raise RuntimeMissing(message, hint="`pip install gguf` installs it") from None
    return gguf


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_name(shape.seed)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(_FEED_FORWARD * shape.width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_file_type(1)  # mostly f16
    if shape.kind == "chat":
        writer.add_chat_template(CHAT_TEMPLATE)
    if shape.kind == "embedding":
        writer.add_pooling_type(_gguf().PoolingType.MEAN)


def _add_tokenizer(writer: Any, gguf: Any) -> None:
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_BYTES))])
    writer.add_token_scores([0.0] * _VOCABULARY)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *([kinds.BYTE] * _BYTES)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide = shape.width, _FEED_FORWARD * shape.width
    yield "token_embd.weight", (_VOCABULARY, width)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (width,)
        for part in ("q", "k", "v", "output"):
            yield f"{block}.attn_{part}.weight", (width, width)
        yield f"{block}.ffn_norm.weight", (width,)
        yield f"{block}.ffn_gate.weight", (wide, width)
        yield f"{block}.ffn_up.weight", (wide, width)
        yield f"{block}.ffn_down.weight", (width, wide)
    yield "output_norm.weight", (width,)
    yield "output.weight", (_VOCABULARY, width)


def _ones(dimensions: tuple[int, ...]) -> Any:
    import numpy as np

    return np.ones(dimensions, dtype=np.float32)


def _weights(seed: str, dimensions: tuple[int, ...]) -> Any:
    """Return small half-precision weights from SHA-256 over a counter: integers scaled by a power of two, so no rounding differs."""
    import numpy as np

    count = int(np.prod(dimensions))
    raw = np.frombuffer(_stream(seed, count), dtype=np.uint8).astype(np.int32) - 128
    return (raw / np.float32(512)).astype(np.float16).reshape(dimensions)


def _stream(seed: str, count: int) -> bytes:
    """Return *count* bytes that *seed* alone decides."""
    made = bytearray()
    counter = 0
    while len(made) < count:
        made += hashlib.sha256(f"{seed}/{counter}".encode()).digest()
        counter += 1
    return bytes(made[:count])


# -- archives --------------------------------------------------------------------------------------


def tar(files: dict[str, bytes]) -> bytes:
    """Return a POSIX ustar archive of *files*, the same on every machine: no times, no owners."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
    return made.getvalue()


def zst(data: bytes) -> bytes:
    """
    Return *data* as one Zstandard frame of raw blocks (RFC 8878, 3.1.1).

    Written by hand: what a compressor puts out changes with its version, and the committed lock names these very bytes.
    """
    header = b"\x28\xb5\x2f\xfd" + bytes([0b1010_0000]) + len(data).to_bytes(4, "little")  # one segment, 4-byte content size
    blocks = []
    for start in range(0, max(len(data), 1), _BLOCK):
        block = data[start : start + _BLOCK]
        last = start + _BLOCK >= len(data)
        blocks.append(((len(block) << 3) | last).to_bytes(3, "little") + block)
    return header + b"".join(blocks)


_BLOCK = 128 << 10  # Block_Maximum_Size
