"""
A look at a GGUF file's header before any engine sees it (ggml's gguf.md, versions 2 and 3).

Engines abort on some malformed headers and read past the end on others, and their fixes were bypassed within months. What is plainly
malformed is refused here, in a language without pointers, with a sentence that says where. It is no proof that an engine is safe with
the rest: that is what the sandbox is for.

Every length is checked against what is left of the file before anything is read, so memory and time are bounded by the header itself.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Any

from msgspec import Struct

MAGIC = b"GGUF"
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_STRING = 64 << 20
MAX_KEY = 65_535
MAX_LAYERS = 512  # llama.cpp's own bound, LLAMA_MAX_LAYERS: it aborts past it
MAX_DEPTH = 1  # arrays of arrays are in no file that an engine reads

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

#: Elements and bytes of a block, by ggml type: f32, f16, the quantised ones, integers, f64, bf16.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36), 10: (256, 84), 11: (256, 110),
    12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50),
    20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

#: Names of ``general.file_type``, for people.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip


class Malformed(ValueError):
    """The file is not a sound GGUF file; the message says where."""


class GgufFacts(Struct, frozen=True, kw_only=True):
    """What a header tells about its model."""

    version: int
    architecture: str
    name: str
    context_length: int
    embedding_length: int
    block_count: int
    quantisation: str
    parameters: int
    chat_template: bool
    embedding: bool
    tensor_bytes: int
    #: Weights, a cache for 4,096 tokens at most, and a fifth for buffers: an estimate, to be confirmed by measuring.
    gpu_bytes_estimate: int


class _Tensor(Struct, frozen=True):
    name: str
    elements: int
    offset: int
    size: int


def check(path: Path) -> GgufFacts:
    """
    Check the file at *path* and return what its header tells.

    Raises:
        Malformed: it breaks a rule; the message names the offset, the key or the tensor.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode):
            raise Malformed("not a plain file")
        if seen.st_size < 24:
            raise Malformed(f"{seen.st_size} bytes are too few for a header")
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data:
            return _Reader(data, seen.st_size).facts()
    finally:
        os.close(fd)


class _Reader:
    """Walks the header from front to back; no read goes past the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self._size = size
        self._at = 0

    def facts(self) -> GgufFacts:
        if self._take(4, "the magic") != MAGIC:
            raise Malformed("it does not begin with the magic GGUF")
        version = self._number("I", "the version")
        if version not in {2, 3}:
            raise Malformed(f"version {version} is not known; 2 and 3 are")
        tensors, keys = self._number("q", "the number of tensors"), self._number("q", "the number of keys")
        if not 0 <= tensors <= MAX_TENSORS:
            raise Malformed(f"{tensors} tensors are not from 0 to {MAX_TENSORS:,}")
        if not 0 <= keys <= MAX_KEYS:
            raise Malformed(f"{keys} keys are not from 0 to {MAX_KEYS:,}")
        found = self._keys(keys)
        alignment = _alignment(found)
        listed = [self._tensor(index, alignment) for index in range(tensors)]
        start = -(-self._at // alignment) * alignment
        _check_tensors(listed, start, self._size)
        return _facts(version, found, listed)

    # -- keys --------------------------------------------------------------------------------------

    def _keys(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(count):
            where = f"key {index}"
            key = self._string(where, MAX_KEY)
            if key in found:
                raise Malformed(f"the key {key[:80]!r} is there twice")
            kind = self._number("I", f"the type of {key[:80]!r}")
            found[key] = self._value(kind, key[:80])
        return found

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(kind, key)
        if kind == _STRING:
            return self._string(f"the value of {key!r}", MAX_STRING)
        if kind == _ARRAY and depth < MAX_DEPTH:
            return self._array(key, depth)
        raise Malformed(f"{key!r} has the type {kind}, which is not known here")

    def _scalar(self, kind: int, key: str) -> Any:
        if kind == 7 and self._peek() > 1:
            raise Malformed(f"{key!r} is neither true nor false")
        return self._number(_SCALARS[kind], f"the value of {key!r}")

    def _array(self, key: str, depth: int) -> Any:
        kind, count = self._number("I", f"the type in {key!r}"), self._number("Q", f"the length of {key!r}")
        least = struct.calcsize("<" + _SCALARS[kind]) if kind in _SCALARS else 8
        if count * least > self._size - self._at:
            raise Malformed(f"the array {key!r} claims {count:,} elements at offset {self._at}, more than the file has bytes for")
        if kind in _SCALARS:
            self._at += count * least
            return count
        for _ in range(count):
            self._value(kind, key, depth + 1)
        return count

    # -- tensors -----------------------------------------------------------------------------------

    def _tensor(self, index: int, alignment: int) -> _Tensor:
        name = self._string(f"the name of tensor {index}", MAX_KEY)
        shown = name[:80]
        dimensions = self._number("I", f"the dimensions of {shown!r}")
        if not 1 <= dimensions <= 4:
            raise Malformed(f"tensor {shown!r} has {dimensions} dimensions, not 1 to 4")
        shape = [self._number("q", f"a dimension of {shown!r}") for _ in range(dimensions)]
        if any(side <= 0 for side in shape):
            raise Malformed(f"tensor {shown!r} has the dimensions {shape}")
        kind = self._number("I", f"the type of {shown!r}")
        if kind not in _BLOCKS:
            raise Malformed(f"tensor {shown!r} has the type {kind}, which is not known here")
        offset = self._number("Q", f"the offset of {shown!r}")
        if offset % alignment:
            raise Malformed(f"tensor {shown!r} begins at {offset}, which is not a multiple of {alignment}")
        return _Tensor(name, _product(shape), offset, _bytes(shown, shape, kind))

    # -- bytes -------------------------------------------------------------------------------------

    def _string(self, where: str, most: int) -> str:
        length = self._number("Q", f"the length of {where}")
        if length > most:
            raise Malformed(f"{where} claims {length:,} bytes at offset {self._at}, more than {most:,}")
        return self._take(length, where).decode(errors="replace")

    def _number(self, code: str, where: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), where))[0]

    def _peek(self) -> int:
        return self._data[self._at] if self._at < self._size else 0

    def _take(self, length: int, where: str) -> bytes:
        if length > self._size - self._at:
            raise Malformed(f"{where} at offset {self._at} reaches past the end of the file")
        self._at += length
        return self._data[self._at - length : self._at]


def _alignment(keys: dict[str, Any]) -> int:
    found = keys.get("general.alignment", 32)
    if not isinstance(found, int) or isinstance(found, bool) or not 8 <= found <= 65_536 or found & (found - 1):
        raise Malformed(f"general.alignment is {found!r}, not a power of two from 8 to 65536")
    return found


def _product(shape: list[int]) -> int:
    found = 1
    for side in shape:
        found *= side
    return found


def _bytes(name: str, shape: list[int], kind: int) -> int:
    elements, size = _BLOCKS[kind]
    if shape[0] % elements:
        raise Malformed(f"tensor {name!r} has rows of {shape[0]}, which its type packs by {elements}")
    return _product(shape) // elements * size


def _check_tensors(listed: list[_Tensor], start: int, size: int) -> None:
    names: set[str] = set()
    end = 0
    for tensor in sorted(listed, key=lambda one: one.offset):
        if tensor.name in names:
            raise Malformed(f"tensor {tensor.name[:80]!r} is there twice")
        names.add(tensor.name)
        if tensor.offset < end:
            raise Malformed(f"tensor {tensor.name[:80]!r} overlaps the one before it")
        end = tensor.offset + tensor.size
        if start + end > size:
            raise Malformed(f"tensor {tensor.name[:80]!r} reaches to byte {start + end:,} of a file with {size:,}")


def _facts(version: int, keys: dict[str, Any], listed: list[_Tensor]) -> GgufFacts:
    architecture = keys.get("general.architecture", "")
    if not isinstance(architecture, str) or not architecture:
        raise Malformed("general.architecture is missing")
    blocks = _whole(keys, f"{architecture}.block_count")
    if blocks > MAX_LAYERS:
        raise Malformed(f"{architecture}.block_count is {blocks:,}, more than {MAX_LAYERS}")
    width, context = _whole(keys, f"{architecture}.embedding_length"), _whole(keys, f"{architecture}.context_length")
    weights = sum(tensor.size for tensor in listed)
    cache = 2 * 2 * blocks * width * min(context, 4096)
    return GgufFacts(
        version=version,
        architecture=architecture,
        name=str(keys.get("general.name", ""))[:256],
        context_length=context,
        embedding_length=width,
        block_count=blocks,
        quantisation=FILE_TYPES.get(_whole(keys, "general.file_type"), "unknown") if "general.file_type" in keys else "unknown",
        parameters=sum(tensor.elements for tensor in listed),
        chat_template="tokenizer.chat_template" in keys,
        embedding=f"{architecture}.pooling_type" in keys,
        tensor_bytes=weights,
        gpu_bytes_estimate=(weights + cache) * 6 // 5,
    )


def _whole(keys: dict[str, Any], key: str) -> int:
    found = keys.get(key, 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise Malformed(f"{key} is {found!r}, not a whole number")
    return found
